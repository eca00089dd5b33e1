"""A store spread over the nodes of a Redis Cluster.

Every command goes to the node that has its key; each node has its own pipelines. Which node that is may change at any
time: a node that no longer has a key says where it went.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import logging
import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot

from llmstream.errors import StoreError, StoreUnavailable
from llmstream.store.connection import LOST, Arg, Connection, Refusal, connector
from llmstream.store.keys import Keys
from llmstream.store.node import Node
from llmstream.store.pipeline import Command, Lazy, Sender, Settle
from llmstream.store.presence import Presence

LOOK_S = 0.5
"""So often the nodes are asked who they are, also when nothing is wrong: a silent node may have died."""
PAUSE_S = 0.02
"""Between two tries of a command whose slot is on the move, and between two looks at the map."""
PROMPT_HOPS = 3
"""Redirections that are followed at once."""

Range = tuple[int, int, str]
"""First slot, last slot, address of the node that has them."""

logger = logging.getLogger(__name__)


class Cluster:
    """The nodes that have keys, as far as this process knows, and who has which.

    A node that had no keys before may be a replica that was promoted and lacks what was written last. When it has only
    joined, being taken for one costs a moment without new claims.
    """

    def __init__(self, urls: Sequence[str], timeout_s: float, presence: Presence, keys: Keys) -> None:
        self.presence = presence
        self.timeout_s = timeout_s
        self._urls = urls
        self._keys = keys
        self._nodes: dict[str, Node] = {}
        self._owners = [""] * REDIS_CLUSTER_HASH_SLOTS
        """Address by slot; empty where none is known."""
        self._map: list[Range] = []
        self._own_keys: dict[str, str] = {}
        self._doubtful = asyncio.Event()
        self._watcher: asyncio.Task[None] | None = None
        self._leaving: set[asyncio.Task[None]] = set()
        self._lent: tuple[str, Connection] | None = None
        self.writes = Routed(self, lambda node: node.writes)
        self.synced = Routed(self, lambda node: node.synced)
        self.reads = Routed(self, lambda node: node.reads)

    @property
    def nodes(self) -> Collection[Node]:
        return self._nodes.values()

    @property
    def kind(self) -> str:
        return f", cluster of {len(self._nodes)} nodes"

    async def open(self) -> None:
        """Raises StoreUnavailable when no node answers or a slot has none."""
        problem = "no node answers"
        for url in self._urls:
            try:
                async with asyncio.timeout(self.timeout_s):
                    self._learn(await _ask_stranger(url))
            except (*LOST, Refusal) as error:
                problem = f"{type(error).__name__}: {error}"
                continue
            if "" not in self._owners:
                self._watcher = asyncio.create_task(self._watch(), name="store-cluster")
                return
            problem = "some hash slots have no node"
        raise StoreUnavailable(f"The Redis Cluster is not complete ({problem}).")

    async def close(self) -> None:
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)
        await asyncio.gather(*(node.close() for node in self._nodes.values()), *self._leaving)

    def connect(self) -> Connection:
        """Makes a connection to any node; it is broken when the node leaves."""
        address, node = random.choice(list(self._nodes.items()))  # noqa: S311 - spreads load
        self._lent = address, node.connect()
        return self._lent[1]

    def renew(self) -> None:
        for node in self._nodes.values():
            node.renew()

    async def probe(self) -> None:
        # By key and not by node: who has it now is to take it.
        await asyncio.gather(*(self.writes.call(*node.touch()) for node in self._nodes.values()))

    def owner(self, slot: int) -> str:
        """Address of the node that has a slot."""
        return self._owners[slot]

    def node(self, address: str) -> Node:
        """The node at an address."""
        node = self._nodes.get(address)
        if node is None:
            connect = connector(_at(self._urls[0], address), self.timeout_s)
            stranger = self._watcher is not None
            own_key = functools.partial(self._own_key, address)
            node = Node(connect, self.timeout_s, self.presence, own_key, stranger=stranger)
            node.synced.waits = all(other.synced.waits for other in self._nodes.values())
            self._nodes[address] = node
        return node

    def moved(self, slot: int, address: str) -> None:
        """Takes note that a slot has another node now."""
        self._assign([(slot, slot, address)])
        self._map = []
        self.doubt()

    def doubt(self) -> None:
        """Says that the map of slots may be out of date."""
        self._doubtful.set()

    def _learn(self, ranges: list[Range]) -> None:
        if ranges == self._map:
            return
        self._map = ranges
        self._assign(ranges)
        # Slots without a node stay with the last one that had them.
        for address in self._nodes.keys() - set(self._owners):
            self._leave(address, self._nodes.pop(address))

    def _assign(self, ranges: list[Range]) -> None:
        for first, last, address in ranges:
            self.node(address)
            self._owners[first : last + 1] = [address] * (last + 1 - first)

    def _leave(self, address: str, node: Node) -> None:
        if self._lent is not None and self._lent[0] == address:
            self._lent[1].abort()
        self._own_keys.pop(address, None)
        task = asyncio.create_task(node.close(), name="store-node-leaves")
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    def _own_key(self, address: str) -> str:
        """A key that means nothing and belongs to the node at ``address``."""
        key = self._own_keys.get(address) or self._keys.probe()
        if self._owners[_slot(key)] != address and address in self._owners:
            keys = map(self._keys.probe, itertools.count())
            key = self._own_keys[address] = next(key for key in keys if self._owners[_slot(key)] == address)
        return key

    async def _watch(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await self._doubtful.wait()
            self._doubtful.clear()
            for node in self._nodes.values():
                # Whether it died, was born again or takes no writes shows when one is sent.
                node.writes.defer(node.touch(), _ignore)
            try:
                await self._look()
            except Exception:  # without the map the replica would be lost
                logger.exception("looking at the cluster failed")
            await asyncio.sleep(PAUSE_S)

    async def _look(self) -> None:
        """Asks the nodes in any order, then the configured ones, for the map of slots."""
        nodes = list(self._nodes.items())
        random.shuffle(nodes)
        for address, node in nodes:
            with contextlib.suppress(StoreUnavailable, TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    self._learn(_ranges(await node.reads.call("CLUSTER", "SLOTS"), address))
                    return
        for url in self._urls:
            with contextlib.suppress(*LOST, Refusal):
                async with asyncio.timeout(LOOK_S):
                    self._learn(await _ask_stranger(url))
                    return


@dataclass(slots=True)
class _Errand:
    """A command on its way to the node that has its key."""

    command: Command | Lazy
    settle: Settle
    slot: int
    deadline: float
    hops: int = 0


class Routed(Sender):
    """One of the pipelines of every node: each command goes to the node of its key, one without a key to any."""

    def __init__(self, cluster: Cluster, pick: Callable[[Node], Sender]) -> None:
        self._cluster = cluster
        self._pick = pick

    def defer(self, command: Command | Lazy, settle: Settle) -> None:
        key = command.key if isinstance(command, Lazy) else _key(command)
        deadline = asyncio.get_running_loop().time() + self._cluster.timeout_s
        self._send(_Errand(command, settle, _slot(key), deadline))

    def _send(self, errand: _Errand) -> None:
        self._send_to(errand, self._cluster.owner(errand.slot))

    def _send_to(self, errand: _Errand, address: str, *, asking: bool = False) -> None:
        def landed(reply: Any, error: Exception | None) -> None:
            if error is None:
                errand.settle(reply, None)
            else:
                self._failed(errand, address, error)

        sender = self._pick(self._cluster.node(address))
        if asking:  # holds for the next command of the connection
            sender.defer(("ASKING",), _ignore)
        sender.defer(errand.command, landed)

    def _failed(self, errand: _Errand, address: str, error: Exception) -> None:
        if not isinstance(error, StoreError):
            self._cluster.doubt()
            errand.settle(None, error)
            return
        match error.message.split():
            case ["MOVED", _, place]:
                self._cluster.moved(errand.slot, _resolve(place, address))
                self._again(errand, error)
            case ["ASK", _, place]:
                self._again(errand, error, ask=_resolve(place, address))
            case ["TRYAGAIN", *_]:  # some of its keys are here, some there
                errand.hops = PROMPT_HOPS
                self._again(errand, error)
            case _:
                errand.settle(None, error)

    def _again(self, errand: _Errand, error: StoreError, ask: str = "") -> None:
        loop = asyncio.get_running_loop()
        if loop.time() > errand.deadline:
            errand.settle(None, StoreUnavailable(f"The cluster changes ({error.message}).", retry_after=1))
            return
        errand.hops += 1
        if ask:
            self._send_to(errand, ask, asking=True)
        elif errand.hops > PROMPT_HOPS:
            loop.call_later(PAUSE_S, self._send, errand)
        else:
            self._send(errand)


def _key(command: Command) -> Arg:
    position = 3 if command[0] in ("EVAL", "EVALSHA") else 1
    return command[position] if len(command) > position else ""


def _slot(key: Arg) -> int:
    return int(key_slot(key if isinstance(key, bytes) else str(key).encode("utf-8", "replace")))


def _ignore(_reply: Any, _error: Exception | None) -> None: ...


async def _ask_stranger(url: str) -> list[Range]:
    parts, connection = urlsplit(url), connector(url, LOOK_S)()
    try:
        await connection.connect()
        return _ranges(await connection.ask("CLUSTER", "SLOTS"), f"{parts.hostname}:{parts.port}")
    finally:
        await connection.close()


def _ranges(reply: list[Any], asked: str) -> list[Range]:
    """Reads the reply to ``CLUSTER SLOTS`` of the node at ``asked``."""
    return [
        (first, last, _resolve(f"{(primary[0] or b'').decode()}:{primary[1]}", asked))
        for first, last, primary, *_replicas in reply
    ]


def _resolve(place: str, asked: str) -> str:
    """A place that a node names: without a host it means its own."""
    host, _, port = place.rpartition(":")
    return place if host not in ("", "?") else f"{asked.rpartition(':')[0]}:{port}"


def _at(url: str, address: str) -> str:
    """The URL of another node, reached in the same way."""
    host, _, port = address.rpartition(":")
    parts = urlsplit(url)
    user, at, _ = parts.netloc.rpartition("@")
    netloc = f"{user}{at}[{host}]:{port}" if ":" in host else f"{user}{at}{host}:{port}"
    return parts._replace(netloc=netloc).geturl()
