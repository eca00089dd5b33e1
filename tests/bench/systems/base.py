"""What the benchmark asks of a system, and how one gets an environment of its own."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Protocol

from tests.bench.bench import Bench, Running
from tests.bench.processes import Unavailable
from tests.bench.report import say

INSTALL_S = 900


class System(Protocol):
    """Something between a client and a provider."""

    name: str

    async def prepare(self, bench: Bench) -> str:
        """Installs what it needs and returns its version. Raises Unavailable."""

    def serve(self, bench: Bench) -> AbstractAsyncContextManager[Running]:
        """Runs it on the server's core in front of the mock upstream. Raises Unavailable."""


async def python_environment(cache: Path, name: str, requirement: str) -> Path:
    """A virtual environment with one requirement, made once; returns its ``bin``."""
    place = cache / name
    done = place / f"installed {requirement.replace('/', '_')}"
    if not done.exists():
        say(f"  installing {requirement} into {place} ...")
        await run(sys.executable, "-m", "venv", "--clear", place)
        await run(place / "bin" / "pip", "install", "-q", requirement)
        done.touch()
    return place / "bin"


async def node_package(cache: Path, name: str, package: str, version: str, overrides: Mapping[str, str]) -> Path:
    """A folder with one npm package and what it needs, made once; returns its ``node_modules``.

    ``overrides`` are versions of what the package needs.
    """
    if shutil.which("node") is None or shutil.which("npm") is None:
        raise Unavailable("node and npm are not on the PATH (apt install nodejs npm)")
    place = cache / name
    done = place / f"installed {version}"
    if not done.exists():
        say(f"  installing {package} {version} into {place} ...")
        wanted = {"private": True, "dependencies": {package: version}, "overrides": overrides}
        place.mkdir(parents=True, exist_ok=True)
        (place / "package.json").write_text(json.dumps(wanted))
        await run("npm", "install", "--silent", "--no-audit", "--no-fund", cwd=place)
        done.touch()
    return place / "node_modules"


async def run(*words: str | Path, cwd: Path | None = None) -> str:
    """Runs a command to its end and returns what it printed. Raises Unavailable."""
    process = await asyncio.create_subprocess_exec(
        *map(str, words),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        cwd=cwd,
    )
    try:
        out, _ = await asyncio.wait_for(process.communicate(), INSTALL_S)
    except TimeoutError:
        raise Unavailable(f"{words[0]} took longer than {INSTALL_S} s") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    text = out.decode(errors="replace").strip()
    if process.returncode:
        raise Unavailable(f"{' '.join(map(str, words))} failed: {text[-300:]}")
    return text
