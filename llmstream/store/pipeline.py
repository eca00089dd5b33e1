"""Group commit: all commands of the process share one connection and travel in batches.

While one batch is on its way the next gathers, so a lone command costs one round trip and a thousand cost little more.
No timers, no per-client connections.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from llmstream.errors import LLMStreamError, StoreError, StoreUnavailable
from llmstream.store.connection import LOST, Arg, Connect, Connection, Refusal, pack
from llmstream.store.presence import Presence

Command = tuple[Arg, ...]
MakeCommand = Command | Callable[[], Command]
Settle = Callable[[Any, Exception | None], None]
"""Called with the reply, or with the error that came instead of it."""
_Waiting = tuple[MakeCommand, Settle]

MAX_WAITING = 100_000
MAX_BATCH = 1_000

# Replies that say "not now", as opposed to "never".
_TRANSIENT = ("OOM", "LOADING", "MISCONF", "READONLY", "MASTERDOWN", "CLUSTERDOWN", "TRYAGAIN", "NOREPLICAS")

logger = logging.getLogger(__name__)


class Script:
    """A Lua script, sent by digest and in full only where the server does not know it."""

    def __init__(self, name: str, source: str) -> None:
        self.name = name
        self.source = source
        self.sha = hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest()


class Sender(ABC):
    """Takes commands for the store."""

    @abstractmethod
    def defer(self, command: MakeCommand, settle: Settle) -> None:
        """Queues a command, or a function that makes it at the moment of sending; ``settle`` gets the outcome."""

    def call(self, *command: Arg) -> asyncio.Future[Any]:
        """Sends one command; the future resolves to its raw reply."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

        def settle(reply: Any, error: Exception | None) -> None:
            if future.done():
                return
            if error is None:
                future.set_result(reply)
            else:
                future.set_exception(error)

        self.defer(command, settle)
        return future

    async def run(self, script: Script, keys: Sequence[str], *args: Arg) -> Any:
        """Runs a script atomically on keys of one hash slot."""
        try:
            return await self.call("EVALSHA", script.sha, len(keys), *keys, *args)
        except StoreError as error:
            if not error.message.startswith("NOSCRIPT"):
                raise
        return await self.call("EVAL", script.source, len(keys), *keys, *args)


class Pipeline(Sender):
    """One connection to the store that carries everybody's commands in order.

    Errors: StoreUnavailable when the server cannot be reached, does not answer in time, or refuses writes for now (the
    command may or may not have happened); StoreError when it says that the command itself is wrong.
    """

    def __init__(self, connect: Connect, timeout_s: float, name: str, presence: Presence | None = None) -> None:
        self._presence = presence
        self._connect = connect
        self._timeout_s = timeout_s
        self._name = name
        self._waiting: list[_Waiting] = []
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._connection: Connection | None = None
        self._closing = False
        self._demoted = False
        self.connections = 0
        """Connections made so far."""

    async def open(self) -> None:
        self._task = asyncio.create_task(self._run(), name=f"store-{self._name}")

    async def close(self) -> None:
        """Sends what is waiting, within the command deadline, then closes."""
        self._closing = True
        self._wake.set()
        if self._task is not None:
            await asyncio.wait({self._task}, timeout=self._timeout_s)
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        for _, settle in self._waiting:
            _tell(settle, None, StoreUnavailable("The store connection was closed before the command was sent."))
        self._waiting = []
        await self._drop()

    def defer(self, command: MakeCommand, settle: Settle) -> None:
        if self._closing:
            settle(None, StoreUnavailable("The store connection is closed; this replica is shutting down."))
        elif len(self._waiting) >= MAX_WAITING:
            settle(None, StoreUnavailable("Too many commands wait for the store; try again later.", retry_after=1))
        else:
            self._waiting.append((command, settle))
            self._wake.set()

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._waiting:
                batch, self._waiting = self._waiting[:MAX_BATCH], self._waiting[MAX_BATCH:]
                await self._send(batch)
            if self._closing:
                return

    async def _send(self, batch: list[_Waiting]) -> None:
        unanswered = deque(settle for _, settle in batch)
        try:
            async with asyncio.timeout(self._timeout_s):
                connection = await self._connected()
                packed, unanswered = _pack(batch)
                await connection.send(packed)
                while unanswered:
                    for reply in await connection.receive(len(unanswered)):
                        settle = unanswered.popleft()
                        if isinstance(reply, Refusal):
                            _tell(settle, None, self._refused(str(reply)))
                        else:
                            _tell(settle, reply, None)
        except Exception as error:
            await self._drop()
            if isinstance(error, TimeoutError):
                # A server that hangs would cost each batch the whole deadline once more.
                gathered, self._waiting = self._waiting, []
                unanswered.extend(settle for _, settle in gathered)
            elif not isinstance(error, LOST):
                logger.exception("the store connection %r failed", self._name)
            lost = StoreUnavailable(f"The store does not answer ({type(error).__name__}: {error}).", retry_after=1)
            self._note(lost)
            for settle in unanswered:
                _tell(settle, None, lost)
        except asyncio.CancelledError:
            closed = StoreUnavailable("The store connection was closed before the answer came.")
            for settle in unanswered:
                _tell(settle, None, closed)
            raise

    async def _connected(self) -> Connection:
        connection = self._connection
        if connection is None:
            connection = self._connection = self._connect()
        elif connection.is_connected and (connection.closed_by_server or self._demoted):
            await self._drop()
        if not connection.is_connected:
            await connection.connect()
            self._demoted = False
            self.connections += 1
            if self._presence is not None:
                await self._presence.greet(connection)
        return connection

    def _refused(self, words: str) -> LLMStreamError:
        error = _meaning(words)
        if not isinstance(error, StoreError):
            self._note(error)
            # Behind the same address another server may be the primary by now.
            self._demoted = self._demoted or "READONLY" in words
        return error

    def _note(self, error: StoreUnavailable) -> None:
        if self._presence is not None:
            self._presence.troubled(error)

    async def _drop(self) -> None:
        if self._connection is not None:
            await self._connection.close()


def _pack(batch: list[_Waiting]) -> tuple[list[bytes], deque[Settle]]:
    """The batch as bytes, and who waits for each answer. What cannot be sent is refused alone."""
    packed: list[bytes] = []
    settles: deque[Settle] = deque()
    for command, settle in batch:
        try:
            packed.append(pack(command() if callable(command) else command))
        except (TypeError, ValueError) as error:
            _tell(settle, None, StoreError(f"The command cannot be sent: {error}"))
        else:
            settles.append(settle)
    return packed, settles


def _tell(settle: Settle, reply: Any, error: Exception | None) -> None:
    try:
        settle(reply, error)
    except Exception:  # one caller's defect must not silence the store for all others
        logger.exception("a reply of the store could not be taken in")


def _meaning(refusal: str) -> StoreUnavailable:
    """An error reply as an error of ours."""
    if refusal.startswith("LOADING"):
        return StoreUnavailable(f"The store is loading its data ({refusal}).", retry_after=1)
    # A script passes on what stopped it, with its own words around the code.
    if refusal.startswith(_TRANSIENT) or "OOM" in refusal or "MISCONF" in refusal:
        return StoreUnavailable(f"The store refuses writes ({refusal}).", retry_after=1)
    return StoreError(refusal)
