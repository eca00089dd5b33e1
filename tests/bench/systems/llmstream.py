"""llmstream as a user runs it: ``serve``; unless told otherwise everything is logged before it is seen."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from tests.bench.bench import Bench, Running
from tests.bench.machine import ROOT
from tests.bench.processes import running, serves_chat, until_ready


class Llmstream:
    """``settings`` have dotted keys and go before the benchmark's own."""

    def __init__(self, settings: Mapping[str, object] | None = None, *, name: str = "llmstream") -> None:
        self.name = name
        self._settings = settings or {}

        self._durability = str(self._settings.get("store.durability", "full"))

    async def prepare(self, bench: Bench) -> str:
        return f"{bench.report.machine['llmstream']}, durability {self._durability}"

    @asynccontextmanager
    async def serve(self, bench: Bench, *, core: str | None = None) -> AsyncIterator[Running]:
        folder, port = bench.new_folder(self.name), bench.port()
        settings = {
            "store.url": bench.store.url,
            "providers.upstream.base_url": f"http://127.0.0.1:{bench.upstream_port}/v1",
            "providers.upstream.models": "*",
            "server.shutdown_grace_s": 1,
            **self._settings,
        }
        flags = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
        command = [sys.executable, "-m", "llmstream", "serve", "--port", str(port), "--data-dir", str(folder), *flags]
        log = folder / "log.txt"
        async with running(command, core=core or bench.cores.server, log=log, cwd=ROOT) as process:
            await until_ready(process, log, lambda: serves_chat(port, {}))
            yield Running(self.name, port, process.pid, keeps_log=self._durability != "memory")
