"""Nothing in between: what load generator and upstream do by themselves."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tests.bench.bench import Bench, Running


class Direct:
    name = "direct"

    async def prepare(self, bench: Bench) -> str:
        return "the mock upstream itself"

    @asynccontextmanager
    async def serve(self, bench: Bench) -> AsyncIterator[Running]:
        yield Running(self.name, bench.upstream_port, None)
