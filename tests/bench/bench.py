"""What every case is given: the machine's cores, the mock upstream, a store, free ports, and the report."""

from __future__ import annotations

import asyncio
import itertools
import socket
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import NamedTuple, Self

import aiohttp
import msgspec

from tests.bench.effort import Effort
from tests.bench.machine import Cores
from tests.bench.proc import cpu_seconds
from tests.bench.processes import Unavailable, running, serves_chat, until_ready
from tests.bench.report import Report
from tests.bench.store import BenchStore, open_bench_store
from tests.bench.tools import Answers, Load, build, generating

PORTS = 11


class Running(NamedTuple):
    """A system that answers chat completions."""

    name: str
    port: int
    pid: int | None
    """Leader of its processes; None where there is nothing between the load and the upstream."""
    headers: Mapping[str, str] = MappingProxyType({})
    keeps_log: bool = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


class Upstream(msgspec.Struct, frozen=True):
    """Counters of the mock upstream."""

    answers: int
    """Begun so far."""
    open_streams: int
    """Open now."""


class Cost(NamedTuple):
    """CPU of one load."""

    answers: Answers
    server_s: float
    store_s: float


class Bench:
    """Builds the tools; starts the mock upstream and a store while the context is open.

    Raises Unavailable, saying what to do.
    """

    def __init__(
        self,
        folder: Path,
        cache: Path,
        *,
        cores: Cores,
        effort: Effort,
        report: Report,
        first_port: int,
        systems: Collection[str],
    ) -> None:
        self.folder = folder
        self.cache = cache
        self.cores = cores
        self.effort = effort
        self.report = report
        self.systems = systems
        """Names of those that were asked for."""
        self.tools = build(cache / "tools")
        self.store: BenchStore
        self.upstream_port = 0
        self._ports = itertools.cycle(range(first_port, first_port + PORTS))
        self._folders = itertools.count()
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            port = self.upstream_port = self.port()
            log = self.folder / "upstream.log"
            command = (self.tools.upstream, str(port))
            process = await stack.enter_async_context(running(command, core=self.cores.load, log=log))
            await until_ready(process, log, lambda: serves_chat(port, {}))
            store = open_bench_store(self.new_folder("store"), self.cores.store)
            self.store = await stack.enter_async_context(store)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    def port(self) -> int:
        """The next port on which nobody listens."""
        for port in itertools.islice(self._ports, PORTS):
            with socket.socket() as tried:
                tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    tried.bind(("127.0.0.1", port))
                except OSError:
                    continue
                return port
        raise Unavailable("all ports of the range are taken; choose another with --port")

    def new_folder(self, name: str) -> Path:
        folder = self.folder / f"{next(self._folders)}-{name}"
        folder.mkdir()
        return folder

    async def load(self, system: Running, load: Load) -> Answers:
        """Runs a load and reports wrong answers of llmstream."""
        async with self.under(system, load) as answers:
            return await answers

    @asynccontextmanager
    async def under(self, system: Running, load: Load) -> AsyncIterator[asyncio.Task[Answers]]:
        """A load in the background, ended with the context."""
        core, headers = self.cores.load, system.headers
        async with generating(self.tools, load, system.port, core=core, headers=headers) as answers:
            yield answers
        if answers.result().wrong:
            self.report.fault(load.model, system.name, answers.result().faults)

    async def cost(self, system: Running, load: Load) -> Cost:
        """Runs a load and counts the CPU it takes in the server and in the store."""
        assert system.pid is not None
        server, store = cpu_seconds(system.pid), cpu_seconds(self.store.pid)
        answers = await self.load(system, load)
        return Cost(answers, cpu_seconds(system.pid) - server, cpu_seconds(self.store.pid) - store)

    async def upstream(self) -> Upstream:
        """What the mock upstream has done so far."""
        async with aiohttp.ClientSession() as http, http.get(f"http://127.0.0.1:{self.upstream_port}/stats") as answer:
            return msgspec.json.decode(await answer.read(), type=Upstream)

    @asynccontextmanager
    async def fresh_store(self) -> AsyncIterator[BenchStore]:
        """An empty store in place of the shared one, for a case that fills it."""
        shared = self.store
        async with open_bench_store(self.new_folder("store"), self.cores.store) as self.store:
            try:
                yield self.store
            finally:
                self.store = shared
