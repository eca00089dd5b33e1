"""Watches every log that is followed here but written elsewhere."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from abc import ABC, abstractmethod
from collections import deque
from typing import Any

from llmstream.errors import StoreError
from llmstream.store.channel import Channel
from llmstream.store.connection import LOST, Arg, Connect, Connection, Refusal
from llmstream.store.entry import decode_entry
from llmstream.store.keys import Keys
from llmstream.store.pipeline import Sender
from llmstream.types import EventId

BLOCK_MS = 2_000
ANSWER_S = 5.0
"""What the server gets to answer, beside the time it blocks on purpose."""
MANY = 64
"""From so many logs on, reads are spaced: each one names all of them."""
PAUSE_S = 0.02
COUNT = 200
"""Entries of one log taken at once."""
POLL_S = 0.01
"""Between two looks at logs of a cluster while something happens; in a silence it grows to MAX_POLL_S."""
MAX_POLL_S = 0.1
POLL_S_OF_ONE = 0.0001
"""The least pause for each log that is looked at."""
NEWBORN_S = 0.05
"""How long a log created here may take to start here before it is watched."""
RECHECK_S = 10.0
"""Followers that heard nothing for so long look into the store themselves: no lost wake-up lasts."""

logger = logging.getLogger(__name__)


class Tail(ABC):
    """Brings what is new in all logs in :attr:`channels` that this process does not write itself."""

    def __init__(self, keys: Keys) -> None:
        self.channels: dict[str, Channel] = {}
        self._keys = keys
        self._changed = asyncio.Event()
        self._watched: frozenset[str] = frozenset()
        self._heard: dict[str, float] = {}
        self._newborn: deque[tuple[float, Channel]] = deque()
        """Logs that are to start here, with the time at which they are watched if they have not; soonest first."""
        self._task: asyncio.Task[None] | None = None

    async def open(self) -> None:
        self._task = asyncio.create_task(self._run(), name="store-tail")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    @abstractmethod
    async def _run(self) -> None: ...

    def renew(self) -> None:  # noqa: B027 - a tail without a connection has nothing to do
        """Begins a new connection."""

    def expect(self, channel: Channel) -> None:
        """Like :meth:`update`, but a log with nothing in it yet usually starts here a moment later, so it is given
        that moment first."""
        if not channel.empty:
            self.update(channel)
            return
        loop = asyncio.get_running_loop()
        self._newborn.append((loop.time() + NEWBORN_S, channel))
        if len(self._newborn) == 1:
            loop.call_later(NEWBORN_S, self._look_at_newborn)

    def _look_at_newborn(self) -> None:
        """One timer for all that were expected to start here."""
        loop, newborn = asyncio.get_running_loop(), self._newborn
        now = loop.time() + 0.001  # a timer may be a moment early
        while newborn and newborn[0][0] <= now:
            _, channel = newborn.popleft()
            if not channel.owned:
                self.update(channel)
        if newborn:
            loop.call_later(max(0.0, newborn[0][0] - now), self._look_at_newborn)

    def update(self, channel: Channel) -> None:
        """Looks again whether a log has to be watched: who follows or writes it has changed."""
        if self._is_wanted(channel) != (channel.job_id in self._watched) and not self._changed.is_set():
            self._changed.set()
            self._unblock()

    def _unblock(self) -> None:  # noqa: B027 - a tail that does not block has nothing to do
        """Lets the tail look at :attr:`_changed` now."""

    def listen(self, channel: Channel) -> None:
        """From now on the channel is woken when it has been silent for a recheck interval."""
        self._heard.setdefault(channel.job_id, time.monotonic())

    def suspect(self, channel: Channel) -> bool:
        """True once per recheck interval for a channel that has been silent: its follower should read the store."""
        if channel.owned:
            return False
        now = time.monotonic()
        heard = self._heard.setdefault(channel.job_id, now)
        if now - heard < RECHECK_S:
            return False
        self._heard[channel.job_id] = now
        return True

    @staticmethod
    def _is_wanted(channel: Channel) -> bool:
        return channel.followers > 0 and channel.located and not channel.owned and not channel.finished

    async def _next(self) -> dict[str, EventId]:
        """The logs to watch and what is known of them; without any it waits a while for the first."""
        self._changed.clear()
        self._nudge_silent()
        wanted = {channel.job_id: channel.tip for channel in self.channels.values() if self._is_wanted(channel)}
        self._watched = frozenset(wanted)
        if not wanted:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(BLOCK_MS / 1000):
                    await self._changed.wait()
        return wanted

    def _deliver(self, job_id: str, previous: EventId, entries: list[Any]) -> None:
        channel = self.channels.get(job_id)
        if channel is None:
            return
        try:
            for entry_id, fields in entries:
                entry = decode_entry(entry_id, fields)
                channel.publish(entry.after(previous), previous)
                previous = entry.last
        except StoreError as error:
            # Its followers find out by themselves; the other logs go on.
            logger.error("a log cannot be followed: %s", error.message, extra={"job_id": job_id})
            channel.located = False
            channel.wake()
        self._heard[job_id] = time.monotonic()

    def _nudge_silent(self) -> None:
        now = time.monotonic()
        self._heard = {job_id: heard for job_id, heard in self._heard.items() if job_id in self.channels}
        for job_id, heard in self._heard.items():
            if self.channels[job_id].owned:
                self._heard[job_id] = now  # nothing reaches it past us
            elif now - heard >= RECHECK_S:
                self.channels[job_id].wake()


class BlockingTail(Tail):
    """One blocking XREAD over all logs, on a connection of its own."""

    def __init__(self, keys: Keys, connect: Connect, control: Sender) -> None:
        super().__init__(keys)
        self._connect = connect
        self._control = control
        self._client_id: int | None = None
        self._connection: Connection | None = None

    def renew(self) -> None:
        if self._connection is not None:
            self._connection.abort()

    def _unblock(self) -> None:
        if self._changed.is_set() and self._client_id is not None and self._watched:
            self._control.defer(("CLIENT", "UNBLOCK", self._client_id), self._unblocked)

    def _unblocked(self, reply: Any, _error: Exception | None) -> None:
        if reply == 0:  # it came before the read had begun to block
            asyncio.get_running_loop().call_later(0.005, self._unblock)

    async def _run(self) -> None:
        delay = 0.05
        while True:
            connection = self._connection = self._connect()
            try:
                async with asyncio.timeout(ANSWER_S):
                    await connection.connect()
                    self._client_id = await connection.ask("CLIENT", "ID")
                while True:
                    await self._step(connection)
                    delay = 0.05
            except Exception as error:
                if not isinstance(error, (*LOST, Refusal)):
                    logger.exception("the tail of foreign logs failed and begins again")
                await asyncio.sleep(delay)
                delay = min(delay * 2, 1.0)
            finally:
                self._client_id = None
                await connection.close()

    async def _step(self, connection: Connection) -> None:
        wanted = await self._next()
        if not wanted:
            return
        command: list[Arg] = ["XREAD", "COUNT", COUNT, "BLOCK", BLOCK_MS, "STREAMS"]
        command += [self._keys.log(job_id) for job_id in wanted]
        command += [str(position) for position in wanted.values()]
        async with asyncio.timeout(BLOCK_MS / 1000 + ANSWER_S):
            reply = await connection.ask(*command)
        names = {self._keys.log(job_id).encode(): job_id for job_id in wanted}
        for key, entries in reply or ():
            self._deliver(names[key], wanted[names[key]], entries)
        if reply and len(wanted) > MANY:
            await asyncio.sleep(PAUSE_S)


class PollingTail(Tail):
    """Short looks, for a cluster, where no command may name the logs of two hash slots.

    A look costs one small read for each log (about 13 us of CPU here), all of a node in one batch. The pause grows with
    their number, so that it stays at about a sixth of one core however many there are.
    """

    def __init__(self, keys: Keys, reads: Sender) -> None:
        super().__init__(keys)
        self._reads = reads
        self._asked: set[str] = set()
        """Logs with a look under way; a node that hangs holds up its own logs only."""
        self._quiet_s = 0.0

    async def _run(self) -> None:
        while True:
            wanted = await self._next()
            for job_id, tip in wanted.items():
                if job_id not in self._asked:
                    self._look(job_id, tip)
            await asyncio.sleep(max(POLL_S, len(wanted) * POLL_S_OF_ONE))
            self._quiet_s = min(self._quiet_s + POLL_S / 5, MAX_POLL_S)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._quiet_s):
                    await self._changed.wait()

    def _look(self, job_id: str, tip: EventId) -> None:
        def answered(reply: Any, error: Exception | None) -> None:
            self._asked.discard(job_id)
            if error is None and reply:
                self._quiet_s = 0.0
                self._deliver(job_id, tip, reply)

        self._asked.add(job_id)
        self._reads.defer(("XRANGE", self._keys.log(job_id), f"({tip}", "+", "COUNT", COUNT), answered)
