"""Downloads: another program fetches, one process at a time; this side shows how far it is and can stop it."""

from __future__ import annotations

import asyncio
import fcntl
import os
import re
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

Progress = Callable[[int, int | None], None]
"""``progress(done, total)``: bytes of the download so far and in all, None where the total is not known."""

_PROGRESS = re.compile(rb"Progress (\d+) of (\d+)\s*")


async def run(command: list[str], report: Progress, env: Mapping[str, str] | None = None) -> str | None:
    """Runs a downloader, passing on its progress lines; returns what went wrong in its own words, or None."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=env,
        limit=1 << 20,
    )
    said: deque[str] = deque(maxlen=40)
    try:
        while process.stdout and (line := await process.stdout.readline()):
            if match := _PROGRESS.fullmatch(line):
                report(int(match[1]), int(match[2]) or None)
            elif text := line.decode(errors="replace").strip():
                said.append(text)
        if await process.wait() == 0:
            return None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    errors = [text.removeprefix("ERROR: ") for text in said if text.startswith("ERROR: ")]
    return " ".join(errors or list(said)[-3:]) or f"it ended with status {process.returncode}"


@asynccontextmanager
async def alone(target: Path) -> AsyncIterator[None]:
    """Keeps other pulls of ``target`` waiting; the kernel lets go when this process dies."""
    lock = os.open(target.with_name(f".{target.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                await asyncio.sleep(0.1)
        yield
    finally:
        os.close(lock)
