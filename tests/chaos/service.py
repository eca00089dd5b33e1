"""``llmstream serve`` as a process of its own, found as other commands find it."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

from llmstream.config import StoreSettings
from llmstream.store.store import Store, open_store
from tests.waiting import wait_until


class Service:
    """Started again it goes on in the same data directory."""

    def __init__(self, data_dir: Path, settings: Mapping[str, object]) -> None:
        data_dir.mkdir(exist_ok=True)
        self.data_dir = data_dir
        self.url = ""
        self.spawn: dict[str, Any] = {}
        """More about how the process is made."""
        self._settings = {"server.port": 0, **settings}
        self._stderr = data_dir / "stderr.txt"

    async def start(self) -> None:
        """Returns when it listens."""
        flags = [word for key, value in self._settings.items() for word in ("--set", f"{key}={value}")]
        with self._stderr.open("ab") as stderr:
            spawn = {"stdout": asyncio.subprocess.DEVNULL, "stderr": stderr, "start_new_session": True, **self.spawn}
            command = (sys.executable, "-m", "llmstream", "serve", "--data-dir", str(self.data_dir), *flags)
            self.process = await asyncio.create_subprocess_exec(*command, **spawn)
        await wait_until(self._listens, timeout=60)

    def _listens(self) -> bool:
        assert self.process.returncode is None, self.log
        try:
            found = json.loads((self.data_dir / "server.json").read_bytes())
        except (OSError, ValueError):
            return False
        self.url = found["url"]
        return bool(found["pid"] == self.process.pid)

    @property
    def log(self) -> str:
        return self._stderr.read_text()

    async def end(self, number: signal.Signals = signal.SIGKILL) -> int:
        """Sends a signal and waits for the process."""
        if self.process.returncode is None:
            self.process.send_signal(number)
        async with asyncio.timeout(30):
            return await self.process.wait()

    async def close(self) -> None:
        """Ends what runs, also what is stopped."""
        if hasattr(self, "process"):
            await self.end()

    @asynccontextmanager
    async def store(self) -> AsyncIterator[Store]:
        """The service's own store, looked at from outside."""
        settings = StoreSettings.model_validate({"url": f"unix://{self.data_dir}/store/valkey.sock"})
        async with open_store(settings, self.data_dir) as store:
            yield store

    async def submit(self, **echo: object) -> tuple[str, str]:
        """Asks the echo model; the id of the job and the path of its stream."""
        body = {"message": "go", "model": "echo", "echo": echo}
        async with aiohttp.ClientSession(self.url) as http, http.post("/chat/async", json=body) as answer:
            assert answer.status == 202, await answer.text()
            told = await answer.json()
            return told["task_id"], told["stream_url"]
