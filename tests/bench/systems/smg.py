"""smg, the gateway of the SGLang project: Rust, logs nothing."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tests.bench.bench import Bench, Running
from tests.bench.processes import running, serves_chat, until_ready
from tests.bench.systems.base import python_environment, run

REQUIREMENT = "smg==1.13.*"


class Smg:
    name = "smg"

    async def prepare(self, bench: Bench) -> str:
        programs = await python_environment(bench.cache, self.name, REQUIREMENT)
        return await run(programs / "python", "-c", "from importlib.metadata import version; print(version('smg'))")

    @asynccontextmanager
    async def serve(self, bench: Bench) -> AsyncIterator[Running]:
        programs = await python_environment(bench.cache, self.name, REQUIREMENT)
        folder, port, metrics_port = bench.new_folder(self.name), bench.port(), bench.port()
        log = folder / "log.txt"
        words = {
            "--backend": "openai",
            "--worker-urls": f"http://127.0.0.1:{bench.upstream_port}",
            "--host": "127.0.0.1",
            "--port": port,
            "--prometheus-host": "127.0.0.1",
            "--prometheus-port": metrics_port,
            "--log-level": "warn",
            # Its defaults refuse what the cases with many streams open.
            "--max-concurrent-requests": 100_000,
        }
        flags = [str(word) for pair in words.items() for word in pair]
        async with running([programs / "smg", "launch", *flags], core=bench.cores.server, log=log) as process:
            await until_ready(process, log, lambda: serves_chat(port, {}), timeout_s=60)
            yield Running(self.name, port, process.pid)
