"""The store behind a network that delays, loses, cuts and delivers late."""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable, Iterable
from contextvars import copy_context
from typing import Any, NamedTuple

import hiredis
from redis.exceptions import ConnectionError as Broken
from redis.exceptions import ResponseError

from llmstream.store import budget_scripts, job_scripts, lanes
from llmstream.store.connection import Refusal
from llmstream.store.pipeline import Script
from tests.simulation.loop import OUTSIDE, VirtualLoop
from tests.simulation.lua import Mutate, Scripts
from tests.simulation.memory import Contents, Memory

EPOCH = 1_700_000_000.0
SLOW_S = 0.25
"""Half a deadline: an answer that takes as long may come too late together with what it takes to connect."""
Command = tuple[bytes, ...]


MODULES = (job_scripts, lanes, budget_scripts)
SCRIPTS = [part for module in MODULES for part in vars(module).values() if isinstance(part, Script)]
_NAMES = {known: script.name for script in SCRIPTS for known in (script.sha.encode(), script.source.encode())}


class Executed(NamedTuple):
    """A command as the store ran it."""

    now_ms: float
    command: Command
    reply: Any


class Server:
    """One store, its connections and its outages."""

    def __init__(
        self, loop: VirtualLoop, rng: random.Random, *, ordered: bool = True, mutate: Mutate | None = None
    ) -> None:
        self.loop = loop
        self.rng = rng
        self.memory = Memory(ordered=ordered)
        self.memory.on_publish = self._publish
        self.scripts = Scripts(self.memory, mutate)
        self.up = True
        self._disk: Contents | None = None
        self.refusing = False
        """Answers every command with an error for now, as a server out of memory does."""
        self.traps: list[str] = []
        """Scripts and commands the answers to which get lost, the next time."""
        self.ambushes: dict[tuple[str, str], Callable[[], None]] = {}
        """What happens as soon as a process sends a command."""
        self.cut: set[str] = set()
        """Processes that cannot reach the store."""
        self.loss = 0.0
        """How likely a batch of commands meets a fault of the network."""
        self.faults = 0
        """Batches that met one, or were slow enough to be given up."""
        self.swift = False
        self.executed = 0
        self.trace: list[Executed] | None = None
        self.links: dict[Link, None] = {}

    def latency(self) -> float:
        rng = self.rng
        return rng.uniform(0.0001, 0.002) if self.swift or rng.random() < 0.85 else rng.uniform(0.002, 0.4)

    def later(self, delay: float, callback: Any, *args: Any) -> None:
        self.loop.call_later(delay, callback, *args, context=OUTSIDE)

    def stop(self) -> None:
        """The server dies; what it has acknowledged is on its disk, its script cache is not."""
        self.up = False
        self.scripts.sources.clear()
        for link in list(self.links):
            link.shatter()

    def start(self) -> None:
        """It comes back, with what its disk holds."""
        self.up = True
        self.memory.restart(self._disk)
        self._disk = None

    def fall_behind(self) -> None:
        """From here on nothing reaches the disk any more: whoever starts next finds only what was written before."""
        self._disk = self.memory.copy()

    def springs(self, owner: str, batch: list[Command]) -> bool:
        """Whether the answers to these commands are to get lost; once for each trap. Lets loose what waits for them."""
        if not self.traps and not self.ambushes:
            return False
        names = [_name(command) for command in batch]
        for name in names:
            if strike := self.ambushes.pop((owner, name), None):
                strike()
        trapped = next((name for name in names if name in self.traps), None)
        if trapped is not None:
            self.traps.remove(trapped)
        return trapped is not None

    def sever(self, owner: str) -> None:
        """Nothing passes any more between a process and the store, and its connections break."""
        self.cut.add(owner)
        for link in list(self.links):
            if link.owner == owner:
                self.later(self.latency(), link.shatter)

    def execute(self, command: Command) -> Any:
        """The reply, or the error reply as an exception."""
        memory = self.memory
        self.executed += 1
        memory.now_ms = (EPOCH + self.loop.time()) * 1000
        if self.refusing and command[0] != b"INFO":
            return ResponseError("OOM command not allowed when used memory > 'maxmemory'.")
        reply: Any
        try:
            if command[0] == b"EVALSHA":
                reply = self.scripts.evalsha(*command[1:])
            elif command[0] == b"EVAL":
                reply = self.scripts.eval(*command[1:])
            else:
                reply = memory(*command)
        except ResponseError as error:
            reply = error
        if self.trace is not None:
            self.trace.append(Executed(memory.now_ms, command, reply))
        return reply

    def _publish(self, channel: bytes, message: bytes) -> int:
        for link in list(self.links):
            if channel in link.subscribed and self.rng.random() >= self.loss:
                self.later(self.latency(), link.deliver, [[b"message", channel, message]])
        return 0


class Link:
    """A connection of one process, as far as the service knows connections."""

    def __init__(self, server: Server, owner: str) -> None:
        self.owner = owner
        self.is_connected = False
        self.subscribed: tuple[bytes, ...] = ()
        self._server = server
        self._replies: deque[Any] = deque()
        self._reader: asyncio.Future[None] | None = None
        self._heard: Callable[[list[Any]], None] | None = None
        self._lost: Callable[[Exception], None] | None = None
        self._context = OUTSIDE
        self._free_at = 0.0
        self._answered_at = 0.0
        self._era = 0

    @property
    def _reachable(self) -> bool:
        return self._server.up and self.owner not in self._server.cut

    async def connect(self) -> None:
        await asyncio.sleep(self._server.latency())
        if not self._reachable:
            raise Broken("Connection refused.")
        self._era += 1
        self.is_connected = True
        self._heard = self._lost = None
        self._replies.clear()
        self._server.links[self] = None

    @property
    def closed_by_server(self) -> bool:
        return self not in self._server.links

    async def close(self) -> None:
        self.is_connected = False
        self._heard = self._lost = None
        self._server.links.pop(self, None)
        self.subscribed = ()
        self._wake()

    def abort(self) -> None:
        self.shatter()

    def shatter(self) -> None:
        """The other side is gone; whoever reads finds out, whoever does not will."""
        if self._server.links.pop(self, True) is None and self._lost is not None:
            self._server.loop.call_soon(self._tell_lost, context=self._context)
        self.subscribed = ()
        self._wake()

    def _tell_lost(self) -> None:
        if self._lost is not None:
            self._lost(Broken("Connection closed by server."))

    def deliver(self, replies: list[Any], era: int | None = None) -> None:
        if self in self._server.links and (era is None or era == self._era) and self.owner not in self._server.cut:
            self._replies.extend(replies)
            if self._heard is None:
                self._wake()
            else:
                self._server.loop.call_soon(self._tell, self._era, context=self._context)

    def _tell(self, era: int) -> None:
        if self._heard is not None and era == self._era and self._replies:
            self._heard(self._take(len(self._replies)))

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def listen(self, heard: Callable[[list[Any]], None], lost: Callable[[Exception], None]) -> None:
        self._heard, self._lost, self._context = heard, lost, copy_context()

    def write(self, packed: Iterable[bytes]) -> None:
        server, rng = self._server, self._server.rng
        batch = _unpack(packed)
        if batch[0][0] == b"SUBSCRIBE":
            self.subscribed = batch[0][1:]
            return
        if self.subscribed:  # the only thing a subscriber asks is whether anybody is there
            server.later(server.latency(), self.deliver, [[b"pong", b""]])
            return
        if self not in server.links:
            raise Broken("Connection reset by peer.")
        if server.springs(self.owner, batch):
            self._travel(batch, server.latency(), answered=False)
            server.later(rng.uniform(0.003, 0.1), self.shatter)
            return
        if rng.random() >= server.loss:
            self._travel(batch, server.latency())
            return
        server.faults += 1
        match rng.randrange(5):
            case 0:  # nothing arrives, and the connection breaks
                server.later(server.latency(), self.shatter)
            case 1:  # nothing arrives, and nobody says so
                pass
            case 2:  # all or some of it happens, the answers get lost
                self._travel(batch[: rng.randint(1, len(batch))], server.latency(), answered=False)
                server.later(rng.choice((0.0005, 0.05, 0.5)), self.shatter)
            case 3:  # some of it happens and some of that is answered
                self._travel(batch[: rng.randrange(len(batch) + 1)], server.latency())
                server.later(0.5, self.shatter)
            case _:  # the connection breaks, and what was sent arrives long after
                self._travel(batch, rng.uniform(0.001, 3.0), answered=False)
                server.later(rng.uniform(0, 0.01), self.shatter)

    def _travel(self, batch: list[Command], delay: float, *, answered: bool = True) -> None:
        """Sends commands on their way: usually together, at times with those of others in between."""
        server = self._server
        start = max(server.loop.time() + delay, self._free_at)
        parts = [batch] if len(batch) == 1 or server.rng.random() < 0.7 else [[command] for command in batch]
        for part in parts:
            era, run_id, sent = self._era, server.memory.run_id, server.loop.time()
            server.loop.call_at(start, self._arrive, part, era, run_id, sent, answered, context=OUTSIDE)
            start += 0 if len(parts) == 1 else server.latency()
        if answered:
            self._free_at = start

    def _arrive(self, part: list[Command], era: int, run_id: int, sent: float, answered: bool) -> None:
        server = self._server
        if not self._reachable or server.memory.run_id != run_id:  # a connection does not outlive the server
            return
        replies = [server.execute(command) for command in part]
        if answered and era == self._era:
            self._answered_at = max(server.loop.time() + server.latency(), self._answered_at)
            server.faults += self._answered_at - sent > SLOW_S
            server.loop.call_at(self._answered_at, self.deliver, replies, era, context=OUTSIDE)

    async def ask(self, *command: bytes | str | int) -> Any:
        self.write([hiredis.pack_command(command)])  # type: ignore[arg-type]  # its stub knows commands of one word only
        (reply,) = await self.receive(1)
        if isinstance(reply, Refusal):
            raise reply
        return reply

    async def receive(self, at_most: int) -> list[Any]:
        while not self._replies:
            if self not in self._server.links:
                raise Broken("Connection closed by server.")
            self._reader = self._server.loop.create_future()
            await self._reader
        return self._take(min(at_most, len(self._replies)))

    def _take(self, count: int) -> list[Any]:
        replies = [self._replies.popleft() for _ in range(count)]
        return [Refusal(str(reply)) if isinstance(reply, ResponseError) else reply for reply in replies]


def _name(command: Command) -> str:
    return _NAMES.get(command[1], "") if command[0] in (b"EVALSHA", b"EVAL") else command[0].decode()


def _unpack(packed: Iterable[bytes]) -> list[Command]:
    parser = hiredis.Reader()
    parser.feed(b"".join(packed))
    batch: list[Command] = []
    while (command := parser.gets()) is not False:
        batch.append(tuple(command))
    return batch
