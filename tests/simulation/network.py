"""The store behind a network that delays, loses, cuts and delivers late."""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Iterable
from typing import Any, NamedTuple

import hiredis
from redis.exceptions import ConnectionError as Broken
from redis.exceptions import ResponseError

from llmstream.store.connection import Refusal
from tests.simulation.loop import OUTSIDE, VirtualLoop
from tests.simulation.lua import Mutate, Scripts
from tests.simulation.memory import Memory

EPOCH = 1_700_000_000.0
Command = tuple[bytes, ...]


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
        self.refusing = False
        """Answers every command with an error for now, as a server out of memory does."""
        self.cut: set[str] = set()
        """Processes that cannot reach the store."""
        self.loss = 0.0
        """How likely a batch of commands meets a fault of the network."""
        self.executed = 0
        self.trace: list[Executed] | None = None
        self.links: dict[Link, None] = {}

    def latency(self) -> float:
        rng = self.rng
        return rng.uniform(0.0001, 0.002) if rng.random() < 0.85 else rng.uniform(0.002, 0.4)

    def later(self, delay: float, callback: Any, *args: Any) -> None:
        self.loop.call_later(delay, callback, *args, context=OUTSIDE)

    def stop(self) -> None:
        """The server dies; what it has acknowledged is on its disk, its script cache is not."""
        self.up = False
        self.scripts.sources.clear()
        for link in list(self.links):
            link.shatter()

    def start(self) -> None:
        self.up = True

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
        if self.refusing:
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
        self._replies.clear()
        self._server.links[self] = None

    @property
    def closed_by_server(self) -> bool:
        return self not in self._server.links

    async def close(self) -> None:
        self.is_connected = False
        self._server.links.pop(self, None)
        self.subscribed = ()
        self._wake()

    def shatter(self) -> None:
        """The other side is gone; whoever reads finds out, whoever does not will."""
        self._server.links.pop(self, None)
        self.subscribed = ()
        self._wake()

    def deliver(self, replies: list[Any], era: int | None = None) -> None:
        if self in self._server.links and (era is None or era == self._era) and self.owner not in self._server.cut:
            self._replies.extend(replies)
            self._wake()

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    async def send(self, packed: Iterable[bytes]) -> None:
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
        if rng.random() >= server.loss:
            self._travel(batch, server.latency())
            return
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
            server.loop.call_at(start, self._arrive, part, self._era, answered, context=OUTSIDE)
            start += 0 if len(parts) == 1 else server.latency()
        if answered:
            self._free_at = start

    def _arrive(self, part: list[Command], era: int, answered: bool) -> None:
        if not self._reachable:
            return
        server = self._server
        replies = [server.execute(command) for command in part]
        if answered and era == self._era:
            self._answered_at = max(server.loop.time() + server.latency(), self._answered_at)
            server.loop.call_at(self._answered_at, self.deliver, replies, era, context=OUTSIDE)

    async def receive(self, at_most: int) -> list[Any]:
        while not self._replies:
            if self not in self._server.links:
                raise Broken("Connection closed by server.")
            self._reader = self._server.loop.create_future()
            await self._reader
        replies = [self._replies.popleft() for _ in range(min(at_most, len(self._replies)))]
        return [Refusal(str(reply)) if isinstance(reply, ResponseError) else reply for reply in replies]


def _unpack(packed: Iterable[bytes]) -> list[Command]:
    parser = hiredis.Reader()
    parser.feed(b"".join(packed))
    batch: list[Command] = []
    while (command := parser.gets()) is not False:
        batch.append(tuple(command))
    return batch
