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

logger = logging.getLogger(__name__)

Probe = Callable[[], Awaitable[object]]


class Presence:
    """What one process knows about its store, which is one server or several.

    A server that was restarted, restored or replaced by its replica may have forgotten the last moments. Whoever
    recognises one says so before any command goes to it: :attr:`life` grows by one.
    """

    def __init__(self) -> None:
        self.trouble: StoreUnavailable | None = None
        """Why the store takes no writes at the moment; None while it does."""
        self.life = 0
        """Counts the servers that this process has written to."""
        self.on_rebirth: list[Callable[[], None]] = []
        self._recovered = asyncio.Event()
        self._recovered.set()
        self._probe: Probe | None = None
        self._probing: asyncio.Task[None] | None = None

    def open(self, probe: Probe) -> None:
        """``probe`` writes something to every server, for looking whether the store is well."""
        self._probe = probe

    async def close(self) -> None:
        self._probe = None
        if self._probing is not None:
            self._probing.cancel()
            await asyncio.gather(self._probing, return_exceptions=True)

    def reborn(self) -> None:
        """Takes note of a server that may lack what was written last."""
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
        if self._probe is None:
            return
        if self.trouble is None:
            logger.warning("the store is away: %s", error.message)
        self.trouble = error
        if self._probing is None or self._probing.done():
            self._probing = asyncio.create_task(self._until_well(self._probe), name="store-probe")

    async def _until_well(self, probe: Probe) -> None:
        while True:
            try:
                await probe()
                break
            except StoreError as error:
                logger.error("the store answers but refuses the probe: %s", error.message)
                break
            except StoreUnavailable:
                await asyncio.sleep(PROBE_S)
        self.trouble = None
        logger.warning("the store is back")


class Guard:
    """Stands at the connections to one address and recognises the server behind it.

    ``stranger`` says that another server served here before, at another address.
    """

    def __init__(self, presence: Presence, *, stranger: bool = False) -> None:
        self.expected = 0 if stranger else None
        """What a first greeting is to return; None: whatever it does."""
        self._presence = presence
        self._identity: tuple[str, str] | None = ("", "") if stranger else None
        self._life = 0

    async def greet(self, connection: Connection) -> int:
        """Looks who answers on a new connection and returns how many servers did so before.

        Raises ConnectionError while the server cannot serve yet.
        """
        info = parse_info(await connection.ask("INFO", "server", "replication", "persistence", "cluster"))
        if info.get("loading") == "1":
            raise ConnectionError("the store is loading its data")
        if info.get("cluster_enabled") == "1":
            state = parse_info(await connection.ask("CLUSTER", "INFO")).get("cluster_state")
            if state != "ok":
                raise ConnectionError(f"the state of the Redis Cluster is {state!r}")
        identity = info.get("run_id", ""), info.get("master_replid", "")
        known, self._identity = self._identity, identity
        if known not in (None, identity):
            self._life += 1
            self._presence.reborn()
        return self._life

    def troubled(self, error: StoreUnavailable) -> None:
        """Takes note that the server does not answer or refuses writes."""
        self._presence.troubled(error)


def parse_info(raw: bytes) -> dict[str, str]:
    """Reads the reply to ``INFO``."""
    lines = (line.partition(":") for line in raw.decode("utf-8", "replace").splitlines())
    return {key: value.strip() for key, colon, value in lines if colon}
