"""Portkey's gateway on Node. It has no option for the address: while it is measured, it listens on all of them."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tests.bench.bench import Bench, Running
from tests.bench.processes import running, serves_chat, until_ready
from tests.bench.systems.base import node_package

PACKAGE = "@portkey-ai/gateway"
VERSION = "1.15"
OVERRIDES = {"@hono/node-server": "1.13.8"}
"""With later ones every streamed answer is a 500: they give out headers that cannot be changed."""


class Portkey:
    name = "portkey"

    async def prepare(self, bench: Bench) -> str:
        modules = await node_package(bench.cache, self.name, PACKAGE, VERSION, OVERRIDES)
        return str(json.loads((modules / "@portkey-ai" / "gateway" / "package.json").read_text())["version"])

    @asynccontextmanager
    async def serve(self, bench: Bench) -> AsyncIterator[Running]:
        modules = await node_package(bench.cache, self.name, PACKAGE, VERSION, OVERRIDES)
        folder, port = bench.new_folder(self.name), bench.port()
        headers = {
            "x-portkey-provider": "openai",
            "x-portkey-custom-host": f"http://127.0.0.1:{bench.upstream_port}/v1",
            "Authorization": "Bearer none",
        }
        log, program = folder / "log.txt", modules / "@portkey-ai" / "gateway" / "build" / "start-server.js"
        command = ("node", program, f"--port={port}", "--headless")
        async with running(command, core=bench.cores.server, log=log, cwd=program.parents[1]) as process:
            await until_ready(process, log, lambda: serves_chat(port, headers), timeout_s=60)
            yield Running(self.name, port, process.pid, headers)
