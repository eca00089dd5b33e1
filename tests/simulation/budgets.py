"""Replicas that reserve from the limits of one target, on a network and with a store that a seed makes go wrong."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple
from unittest.mock import patch

from llmstream.errors import StoreUnavailable
from llmstream.store import budget_scripts
from llmstream.store import budgets as budgets_module
from llmstream.store.budgets import SLICES, Budgets, Limits, Reservation
from llmstream.store.pipeline import Script
from tests.simulation import network
from tests.simulation.loop import OUTSIDE, Process, VirtualLoop
from tests.simulation.lua import Mutate
from tests.simulation.network import EPOCH, Command, Server
from tests.simulation.owner import store_of
from tests.simulation.world import complaints

TARGET = "openai/gpt"
WINDOW_S = 6.0
LEASE_S = 2.0
BEAT_S = 0.5
CHAOS_S = 12.0
PATIENCE_S = 300.0
RECONCILE_RENEWALS = 4
SETTLED_S = 3.0
"""After the last request: enough to compare reservations and for whatever is late to arrive."""
SCRIPTS = {
    known: script.name
    for script in vars(budget_scripts).values()
    if isinstance(script, Script)
    for known in (script.sha.encode(), script.source.encode())
}


@dataclass
class Request:
    """One try, as the target sees it."""

    replica: str
    tokens: int
    used: int
    sent_at: float | None = None
    over_at: float | None = None
    counted_at: float = 0.0
    """When the store has counted it."""


class Watched(Server):
    """A store that takes note of who reserves what when."""

    def __init__(self, loop: VirtualLoop, rng: random.Random, mutate: Mutate | None) -> None:
        super().__init__(loop, rng, mutate=mutate)
        self.requests: dict[str, Request] = {}
        self.touches: dict[str, list[float]] = {}
        """When each replica was last heard of."""
        self.broken: list[str] = []

    def execute(self, command: Command) -> Any:
        name = SCRIPTS.get(command[1]) if command[0] in (b"EVAL", b"EVALSHA") else None
        if name is None:
            return super().execute(command)
        keys, args = command[3:8], command[8:]
        held = self.memory.data.get(keys[1], {})
        known = name == "reserve" and args[7] in held
        counted = self._counted(keys[0])
        reply = super().execute(command)
        if known and self._counted(keys[0]) > counted:
            self.broken.append("the same request was counted twice")
        if isinstance(reply, Exception):
            if not str(reply).startswith(("NOSCRIPT", "OOM")):
                raise reply
            return reply
        self.touches.setdefault(args[0].decode(), []).append(self.loop.time())
        if name == "reserve" and reply[0] == 1 and not known:
            request = self.requests.get(args[7].decode().partition("|")[2])
            if request is not None and request.sent_at is None:
                request.counted_at = self.loop.time()
        return reply

    def _counted(self, window: bytes) -> int:
        return int(self.memory.data.get(window, {}).get(b"requests", b"0"))


class Customer:
    """A replica that sends requests to the target as its limits allow."""

    def __init__(self, server: Watched, name: str, limits: Limits) -> None:
        self.process = Process(name)
        self.killed_at: float | None = None
        self.limits = limits
        self._server, self._loop = server, server.loop
        self.tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        self._loop.spawn(self.process, self._live(), self.process.name)

    def _open(self) -> None:
        self.store = store_of(self._loop, self._server, self.process)
        store = self.store
        self.budgets = Budgets(
            store.writes, store.keys, store.presence, self.process.name, lease_s=LEASE_S, window_s=WINDOW_S
        )
        store.signals.on_room = self.budgets.wake

    async def _live(self) -> None:
        self._open()
        (node,) = self.store.nodes
        await node.open()
        await self.store.signals.open()
        self.store.presence.open(node.probe)
        while True:
            await asyncio.sleep(BEAT_S)
            with contextlib.suppress(StoreUnavailable):
                await self.budgets.renew()

    def send(self, name: str, request: Request, busy_s: float, *, gives_up: bool, fails_early: bool) -> None:
        work = self._send(name, request, busy_s, gives_up=gives_up, fails_early=fails_early)
        self.tasks.append(self._loop.spawn(self.process, work, name))

    async def _send(self, name: str, request: Request, busy_s: float, *, gives_up: bool, fails_early: bool) -> None:
        loop = self._loop
        self._server.requests[name] = request
        if gives_up:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(busy_s):
                    self.budgets.cancel(await self._acquire(name, request.tokens))
        reservation = await self._acquire(name, request.tokens)
        if fails_early:
            self.budgets.cancel(reservation)
            return
        request.sent_at = loop.time()
        await asyncio.sleep(busy_s)
        request.over_at = loop.time()
        self.budgets.settle(reservation, request.used)

    async def _acquire(self, name: str, tokens: int) -> Reservation:
        while True:
            try:
                return await self.budgets.acquire(TARGET, self.limits, tokens, name, EPOCH + self._loop.time())
            except StoreUnavailable:
                await asyncio.sleep(0.2)

    def kill(self) -> None:
        self.killed_at = self._loop.time()
        self.process.frozen = True
        for link in [link for link in self._server.links if link.owner == self.process.name]:
            link.shatter()


class Outcome(NamedTuple):
    seed: int
    faults: tuple[str, ...]
    sent: int


class World:
    """Everything that a seed decides."""

    def __init__(self, seed: int, mutate: Mutate | None) -> None:
        self.rng = rng = random.Random(seed)
        self.loop = VirtualLoop()  # type: ignore[abstract]  # nobody asks for the rest
        self.server = Watched(self.loop, rng, mutate)
        self.server.swift = rng.random() < 0.5
        self.limits = Limits(rng.choice((None, 1, 2, 4)), rng.choice((None, 3, 8)), rng.choice((None, 300, 1000)))
        self.customers = [Customer(self.server, f"r{number}", self.limits) for number in range(3)]
        self.auditor = Customer(self.server, "auditor", Limits(slots=1))
        self.kills = 0

    def run(self) -> Iterator[str]:
        rng, loop = self.rng, self.loop
        for customer in (*self.customers, self.auditor):
            customer.start()
        for number in range(rng.randint(5, 30)):
            self._plan(f"j{number}")
        self._add_troubles()
        loop.run(lambda: False, CHAOS_S)
        self.server.loss = 0.0

        def over() -> bool:
            return all(task.done() for one in self.customers if one.killed_at is None for task in one.tasks)

        if not loop.run(over, PATIENCE_S):
            yield "somebody waits for ever"
        self.server.swift = True
        loop.run(lambda: False, loop.time() + SETTLED_S)
        yield from self.server.broken
        yield from self._counted()
        yield from self._windows()
        yield from self._slots()
        yield from (f"uncaught: {error.get('exception') or error}" for error in loop.errors)

    def _plan(self, name: str) -> None:
        rng = self.rng
        customer, tokens = rng.choice(self.customers), rng.randint(0, 300)
        request = Request(customer.process.name, tokens, rng.randint(0, tokens))
        fate = {"gives_up": rng.random() < 0.15, "fails_early": rng.random() < 0.1}
        busy_s = rng.choice((0.001, 0.1, 1.0, 7.0))

        def send() -> None:
            if customer.killed_at is None:
                customer.send(name, request, busy_s, **fate)

        self.loop.call_at(rng.uniform(0.1, CHAOS_S), send, context=OUTSIDE)

    def _add_troubles(self) -> None:
        rng, loop, server = self.rng, self.loop, self.server
        if not server.swift:
            server.loss = rng.choice((0.0, 0.02, 0.1))
        for customer in self.customers[: rng.choice((0, 0, 1, 2))]:
            self.kills += 1
            loop.call_at(rng.uniform(0.5, CHAOS_S), customer.kill, context=OUTSIDE)
        for _ in range(rng.choice((0, 1, 4))):
            trap = rng.choice(("reserve", "settle budget", "reconcile", "renew"))
            loop.call_at(rng.uniform(0, CHAOS_S), server.traps.append, trap, context=OUTSIDE)
        if rng.random() < 0.1:
            when = rng.uniform(0, CHAOS_S)
            loop.call_at(when, server.stop, context=OUTSIDE)
            loop.call_at(when + rng.uniform(0.05, 1), server.start, context=OUTSIDE)
        if rng.random() < 0.2:
            back = EPOCH - rng.uniform(0.1, 2 * WINDOW_S)
            loop.call_at(rng.uniform(0, CHAOS_S), setattr, network, "EPOCH", back, context=OUTSIDE)

    def _counted(self) -> Iterator[str]:
        """What the store counts is what was sent, and no slot is left."""
        task = self.loop.spawn(self.auditor.process, self.auditor.budgets.spent(TARGET), "audit")
        self.loop.run(task.done, self.loop.time() + 5)
        now, spent = self.loop.time(), task.result()
        sent = [one for one in self.server.requests.values() if one.sent_at is not None]
        inside = [one for one in sent if one.counted_at > now - WINDOW_S]
        maybe = [one for one in sent if one.counted_at > now - WINDOW_S - WINDOW_S / SLICES - 0.5]
        if spent.requests < len(inside) or (spent.requests > len(maybe) and not self.kills):
            yield f"{spent.requests} requests are counted, but {len(inside)} were sent"
        if spent.tokens < sum(one.used for one in inside):
            yield f"{spent.tokens} tokens are counted, but {sum(one.used for one in inside)} were used"
        self.loop.run(lambda: False, now + LEASE_S)
        last = self.loop.spawn(self.auditor.process, self.auditor._acquire("last", 0), "audit")
        if not self.loop.run(last.done, self.loop.time() + 5):
            yield "a slot is left"

    def _windows(self) -> Iterator[str]:
        """No window, wherever it ends, holds more than the limits."""
        sent = sorted((one for one in self.server.requests.values() if one.sent_at is not None), key=_counted_at)
        for last in sent:
            now = last.counted_at
            inside = [one for one in sent if now - WINDOW_S < one.counted_at <= now]
            tokens = sum(one.used if one.over_at is not None and one.over_at <= now else one.tokens for one in inside)
            if len(inside) > (self.limits.requests or len(inside)):
                yield f"{len(inside)} requests within {WINDOW_S} s"
            if tokens > (self.limits.tokens or tokens):
                yield f"{tokens} tokens within {WINDOW_S} s"

    def _slots(self) -> Iterator[str]:
        """No more requests are under way than there are slots, except those of replicas that nobody heard of."""
        killed = {one.process.name: one.killed_at for one in self.customers}
        steps = []
        for one in self.server.requests.values():
            if one.sent_at is None:
                continue
            end = min(filter(None, (one.over_at, killed[one.replica], self.loop.time())))
            steps += [(one.sent_at, 1), (end, -1)]
            touches = [at for at in self.server.touches[one.replica] if at < end]
            if any(b - a > LEASE_S - 1 for a, b in pairwise([*touches, end])):
                return
        under_way = 0
        for _, step in sorted(steps):
            under_way += step
            if under_way > (self.limits.slots or under_way):
                yield f"{under_way} requests at once"

    def destroy(self) -> None:
        self.server.stop()
        for customer in self.customers:
            self.loop.thaw(customer.process)
        for _ in range(20):
            pending = [task for task in self.loop.tasks if not task.done()]
            for task in pending:
                task.cancel()
            self.loop.run(lambda: True, self.loop.time())


def _counted_at(request: Request) -> float:
    return request.counted_at


def simulate_budgets(seed: int, mutate: Mutate | None = None) -> Outcome:
    """Runs the schedule of one seed; the same seed gives the same schedule."""
    world = World(seed, mutate)
    often = patch.object(budgets_module, "RECONCILE_RENEWALS", RECONCILE_RENEWALS)
    clock = patch.object(network, "EPOCH", EPOCH)
    with world.loop.running(), complaints() as complained, often, clock:
        faults = list(world.run())
        sent = sum(one.sent_at is not None for one in world.server.requests.values())
        world.destroy()
    return Outcome(seed, (*faults, *complained), sent)
