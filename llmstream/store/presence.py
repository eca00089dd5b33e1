"""Whether the store can be used now, and whether it is still the one that took what was written."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from llmstream.errors import StoreError, StoreUnavailable
from llmstream.store.connection import Connection

RECOVERY_S = 2.0
"""After the server came back: what every replica gets to write again what was lost before anybody acts on its
absence."""
PROBE_S = 0.1
PROBE_TTL_MS = 60_000

logger = logging.getLogger(__name__)

Call = Callable[..., Awaitable[object]]


class Presence:
    """What one process knows about the server behind its URL.

    A server that was restarted, restored or replaced by its replica may have forgotten the last moments. It is
    recognised at the next connection, before any command goes out on it: :attr:`life` grows by one.
    """

    def __init__(self, probe_key: str) -> None:
        self.trouble: StoreUnavailable | None = None
        """Why the store takes no writes at the moment; None while it does."""
        self.life = 0
        """Counts the servers that this process has written to."""
        self.on_rebirth: list[Callable[[], None]] = []
        self._probe_key = probe_key
        self._identity: tuple[str, str] | None = None
        self._recovered = asyncio.Event()
        self._recovered.set()
        self._call: Call | None = None
        self._probe: asyncio.Task[None] | None = None

    def open(self, call: Call) -> None:
        """``call`` sends one command, for looking whether the store is back."""
        self._call = call

    async def close(self) -> None:
        self._call = None
        if self._probe is not None:
            self._probe.cancel()
            await asyncio.gather(self._probe, return_exceptions=True)

    async def greet(self, connection: Connection) -> None:
        """Looks who answers on a new connection.

        Raises ConnectionError while the server reads its files, and once for each new server: what was decided before
        is not for it.
        """
        info = parse_info(await connection.ask("INFO", "server", "replication", "persistence"))
        if info.get("loading") == "1":
            raise ConnectionError("the store is loading its data")
        identity = info.get("run_id", ""), info.get("master_replid", "")
        known, self._identity = self._identity, identity
        if known not in (None, identity):
            self._reborn()
            raise ConnectionError("another server answers than before")

    def _reborn(self) -> None:
        loop = asyncio.get_running_loop()
        self.life += 1
        self._recovered.clear()
        loop.call_later(RECOVERY_S, self._end_recovery, self.life)
        logger.warning("another store server answers; what it may have lost is written again")
        for tell in self.on_rebirth:
            loop.call_soon(tell)

    @property
    def recovering(self) -> bool:
        """True for a moment after a rebirth, while what is missing may still be written again by somebody."""
        return not self._recovered.is_set()

    async def recovered(self) -> None:
        """Waits until nobody has to be waited for any more."""
        await self._recovered.wait()

    def _end_recovery(self, life: int) -> None:
        if life == self.life:
            self._recovered.set()

    def troubled(self, error: StoreUnavailable) -> None:
        """Takes note that the store does not answer or refuses writes; from here on it is asked until it is well."""
        if self._call is None:
            return
        if self.trouble is None:
            logger.warning("the store is away: %s", error.message)
        self.trouble = error
        if self._probe is None or self._probe.done():
            self._probe = asyncio.create_task(self._until_well(self._call), name="store-probe")

    async def _until_well(self, call: Call) -> None:
        while True:
            try:
                # A write: a server that is full or read-only answers every PING.
                await call("SET", self._probe_key, 1, "PX", PROBE_TTL_MS)
                break
            except StoreError as error:
                logger.error("the store answers but refuses the probe: %s", error.message)
                break
            except StoreUnavailable:
                await asyncio.sleep(PROBE_S)
        self.trouble = None
        logger.warning("the store is back")


def parse_info(raw: bytes) -> dict[str, str]:
    """Reads the reply to ``INFO``."""
    lines = (line.partition(":") for line in raw.decode("utf-8", "replace").splitlines())
    return {key: value.strip() for key, colon, value in lines if colon}
