"""What one writes first: an aiohttp server, redis-py, and one awaited XADD for each chunk."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tests.bench.bench import Bench, Running
from tests.bench.machine import ROOT
from tests.bench.processes import running, serves_chat, until_ready


class Naive:
    name = "naive"

    async def prepare(self, bench: Bench) -> str:
        return "tests/bench/systems/naive_server.py"

    @asynccontextmanager
    async def serve(self, bench: Bench) -> AsyncIterator[Running]:
        folder, port = bench.new_folder(self.name), bench.port()
        words = [port, f"http://127.0.0.1:{bench.upstream_port}", bench.store.url]
        command = [sys.executable, "-m", "tests.bench.systems.naive_server", *map(str, words)]
        log = folder / "log.txt"
        async with running(command, core=bench.cores.server, log=log, cwd=ROOT) as process:
            await until_ready(process, log, lambda: serves_chat(port, {}))
            yield Running(self.name, port, process.pid, keeps_log=True)
