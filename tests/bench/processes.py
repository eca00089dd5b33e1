"""Starts programs on a core of their own and ends them, with everything they started."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import aiohttp

END_S = 5.0


class Unavailable(Exception):
    """Something cannot be measured here; says why."""


def environment(**more: str) -> dict[str, str]:
    """Ours, without proxies: all traffic stays on this machine."""
    kept = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    return {**kept, **more}


@asynccontextmanager
async def running(
    command: Sequence[str | Path],
    *,
    core: str,
    log: Path,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> AsyncIterator[asyncio.subprocess.Process]:
    """A program pinned to ``core`` while the context is open; what it prints goes to ``log``."""
    with log.open("ab") as output:
        process = await asyncio.create_subprocess_exec(
            # It ends with us, also when we are killed.
            *("setpriv", "--pdeathsig", "TERM", "taskset", "-c", core, *command),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment(**(env or {})),
            cwd=cwd,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        await _end(process)


async def until_ready(
    process: asyncio.subprocess.Process, log: Path, answers: Callable[[], Awaitable[bool]], *, timeout_s: float = 30
) -> None:
    """Waits until ``answers`` says yes. Raises Unavailable with the end of the log."""
    deadline = asyncio.get_running_loop().time() + timeout_s
    while True:
        if await answers():
            return
        if process.returncode is not None or asyncio.get_running_loop().time() > deadline:
            state = f"ended with {process.returncode}" if process.returncode is not None else "did not answer"
            raise Unavailable(f"it {state}; its log ends: {_end_of(log)}")
        await asyncio.sleep(0.05)


def _end_of(log: Path) -> str:
    return " | ".join(log.read_text(errors="replace").splitlines()[-6:])[-600:]


async def serves_chat(port: int, headers: Mapping[str, str]) -> bool:
    """Whether a chat completion comes back from the mock upstream through this port."""
    body = {"model": "mock-n2-d0", "messages": [{"role": "user", "content": "ready?"}]}
    with suppress(aiohttp.ClientError, TimeoutError, OSError):
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as http,
            http.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=body, headers=headers) as answer,
        ):
            return answer.status == 200 and "tok0001" in await answer.text()
    return False


async def _end(process: asyncio.subprocess.Process) -> None:
    """Ends the process group that the program leads: politely, then not."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), END_S)
