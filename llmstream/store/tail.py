"""Watches, over one connection, every log that is followed here but written elsewhere."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import Any

from llmstream.errors import StoreError
from llmstream.store.channel import Channel
from llmstream.store.connection import LOST, Arg, Connect, Connection, Refusal
from llmstream.store.entry import decode_entry
from llmstream.store.keys import Keys
from llmstream.store.pipeline import Pipeline
from llmstream.types import EventId

BLOCK_MS = 2_000
ANSWER_S = 5.0
"""What the server gets to answer, beside the time it blocks on purpose."""
MANY = 64
"""From so many logs on, reads are spaced: each one names all of them."""
PAUSE_S = 0.02
NEWBORN_S = 0.05
"""How long a log created here may take to start here before it is watched."""
RECHECK_S = 10.0
"""Followers that heard nothing for so long look into the store themselves: no lost wake-up lasts."""

logger = logging.getLogger(__name__)


class Tail:
    """One blocking XREAD over all logs in :attr:`channels` that this process does not write itself."""

    def __init__(self, connect: Connect, control: Pipeline, keys: Keys) -> None:
        self.channels: dict[str, Channel] = {}
        self._connect = connect
        self._control = control
        self._keys = keys
        self._changed = asyncio.Event()
        self._client_id: int | None = None
        self._watched: frozenset[str] = frozenset()
        self._heard: dict[str, float] = {}
        self._task: asyncio.Task[None] | None = None

    async def open(self) -> None:
        self._task = asyncio.create_task(self._run(), name="store-tail")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def expect(self, channel: Channel) -> None:
        """Like :meth:`update`, but a log with nothing in it yet usually starts here a moment later, so it is given
        that moment first."""
        if channel.empty:
            asyncio.get_running_loop().call_later(NEWBORN_S, self.update, channel)
        else:
            self.update(channel)

    def update(self, channel: Channel) -> None:
        """Looks again whether a log has to be watched: who follows or writes it has changed."""
        if self._is_wanted(channel) != (channel.job_id in self._watched) and not self._changed.is_set():
            self._changed.set()
            self._unblock()

    def _unblock(self) -> None:
        if self._changed.is_set() and self._client_id is not None and self._watched:
            self._control.defer(("CLIENT", "UNBLOCK", self._client_id), self._unblocked)

    def _unblocked(self, reply: Any, _error: Exception | None) -> None:
        if reply == 0:  # it came before the read had begun to block
            asyncio.get_running_loop().call_later(0.005, self._unblock)

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

    def _wanted(self) -> dict[str, EventId]:
        return {channel.job_id: channel.tip for channel in self.channels.values() if self._is_wanted(channel)}

    async def _run(self) -> None:
        delay = 0.05
        while True:
            connection = self._connect()
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
        self._changed.clear()
        self._nudge_silent()
        wanted = self._wanted()
        self._watched = frozenset(wanted)
        if not wanted:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(BLOCK_MS / 1000):
                    await self._changed.wait()
            return
        command: list[Arg] = ["XREAD", "COUNT", 200, "BLOCK", BLOCK_MS, "STREAMS"]
        command += [self._keys.log(job_id) for job_id in wanted]
        command += [str(position) for position in wanted.values()]
        async with asyncio.timeout(BLOCK_MS / 1000 + ANSWER_S):
            reply = await connection.ask(*command)
        names = {self._keys.log(job_id).encode(): job_id for job_id in wanted}
        for key, entries in reply or ():
            self._deliver(names[key], wanted[names[key]], entries)
        if reply and len(wanted) > MANY:
            await asyncio.sleep(PAUSE_S)

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
            if now - heard >= RECHECK_S:
                self.channels[job_id].wake()
