"""Group commit: all commands of the process share one connection and travel in batches.

While one batch is on its way the next gathers, so a lone command costs one round trip and a thousand cost little more.
Only what nobody waits for is held back, for a moment. There are no per-client connections.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from llmstream.errors import LLMStreamError, StoreError, StoreUnavailable
from llmstream.store.connection import LOST, Arg, Connect, Connection, Refusal, pack
from llmstream.store.presence import Guard

Command = tuple[Arg, ...]
Settle = Callable[[Any, Exception | None], None]
"""Called with the reply, or with the error that came instead of it."""
NOTHING: Command = ()
"""What :attr:`Lazy.make` returns when its command is no longer needed; nobody is told of an outcome."""

GATHER_S = 0.001
"""The least time between two batches that nobody waits for: under load it makes one system call of several."""
MAX_WAITING = 100_000
MAX_BATCH = 1_000

# Replies that say "not now", as opposed to "never".
_TRANSIENT = ("OOM", "LOADING", "MISCONF", "READONLY", "MASTERDOWN", "CLUSTERDOWN", "NOREPLICAS")

logger = logging.getLogger(__name__)


class Lazy(NamedTuple):
    """A command that is made at the moment of sending."""

    key: str
    """The key that it is about."""
    make: Callable[[], Command]
    patient: bool = False
    """Whether it may wait a moment for others to travel with."""


_Waiting = tuple[Command | Lazy, Settle]
_UNTAKEN = "a reply of the store could not be taken in"


class Script:
    """A Lua script, sent by digest and in full only where the server does not know it."""

    def __init__(self, name: str, source: str) -> None:
        self.name = name
        self.source = source
        self.sha = hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest()


def _resolver(future: asyncio.Future[Any]) -> Settle:
    def settle(reply: Any, error: Exception | None) -> None:
        if future.done():
            return
        if error is None:
            future.set_result(reply)
        else:
            future.set_exception(error)

    return settle


class Sender(ABC):
    """Takes commands for the store."""

    @abstractmethod
    def defer(self, command: Command | Lazy, settle: Settle) -> None:
        """Queues a command; ``settle`` gets the outcome."""

    def call(self, *command: Arg) -> asyncio.Future[Any]:
        """Sends one command; the future resolves to its raw reply."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.defer(command, _resolver(future))
        return future

    def run(self, script: Script, keys: Sequence[str], *args: Arg) -> asyncio.Future[Any]:
        """Runs a script atomically on keys of one hash slot; the future resolves to its raw reply."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.defer_script(script, keys, args, _resolver(future))
        return future

    def defer_script(self, script: Script, keys: Sequence[str], args: Sequence[Arg], settle: Settle) -> None:
        """Like :meth:`run`, for who needs not wait; ``settle`` gets the outcome."""

        def settled(reply: Any, error: Exception | None) -> None:
            if isinstance(error, StoreError) and error.message.startswith("NOSCRIPT"):
                self.defer(("EVAL", script.source, len(keys), *keys, *args), settle)
            else:
                settle(reply, error)

        self.defer(("EVALSHA", script.sha, len(keys), *keys, *args), settled)


class _Reborn(ConnectionError):
    """Another server answers than before; what was decided before is not for it."""


class Pipeline(Sender):
    """One connection to the store that carries everybody's commands in order.

    Errors: StoreUnavailable when the server cannot be reached, does not answer in time, or refuses writes for now (the
    command may or may not have happened); StoreError when it says that the command itself is wrong.
    """

    def __init__(self, connect: Connect, timeout_s: float, name: str, guard: Guard | None = None) -> None:
        self._guard = guard
        self._connect = connect
        self._timeout_s = timeout_s
        self._name = name
        self._waiting: list[_Waiting] = []
        self._urgent = False
        """Whether somebody waits for something in ``_waiting``."""
        self._unanswered: deque[Settle] = deque()
        self._busy = False
        """True while connecting and until the last batch is answered."""
        self._sent_at = -GATHER_S
        self._soon: asyncio.Handle | None = None
        self._later: asyncio.TimerHandle | None = None
        self._watch: asyncio.TimerHandle | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._connection: Connection | None = None
        self._closing = False
        self._empty: asyncio.Future[None] | None = None
        self._stale = False
        """Whether another server may be the right one by now."""
        self._life = guard.expected if guard is not None else None
        self.connections = 0
        """Connections made so far."""

    async def close(self) -> None:
        """Sends what is waiting, within the command deadline, then closes."""
        self._closing = self._urgent = True
        if self._busy or self._waiting:
            self._empty = asyncio.get_running_loop().create_future()
            self._arrange()
            await asyncio.wait({self._empty}, timeout=self._timeout_s)
        for handle in (self._soon, self._later, self._watch):
            if handle is not None:
                handle.cancel()
        if self._connecting is not None:
            self._connecting.cancel()
            await asyncio.gather(self._connecting, return_exceptions=True)
        self._fail(StoreUnavailable("The store connection was closed before the answer came."), everything=True)
        await self._drop()

    def renew(self) -> None:
        """Begins a new connection with the next batch."""
        self._stale = True

    def defer(self, command: Command | Lazy, settle: Settle) -> None:
        if self._closing:
            settle(None, StoreUnavailable("The store connection is closed; this replica is shutting down."))
        elif len(self._waiting) >= MAX_WAITING:
            settle(None, StoreUnavailable("Too many commands wait for the store; try again later.", retry_after=1))
        else:
            self._waiting.append((command, settle))
            self._urgent = self._urgent or not (isinstance(command, Lazy) and command.patient)
            if not self._busy:
                self._arrange()

    def _arrange(self) -> None:
        """Sends what waits: soon, or, when nobody waits for it, not before others may have come along."""
        if self._busy or not self._waiting or self._soon is not None:
            return
        loop = asyncio.get_running_loop()
        pause = 0.0 if self._urgent else self._sent_at + GATHER_S - loop.time()
        if pause <= 0:
            self._soon = loop.call_soon(self._go)
        elif self._later is None:
            self._later = loop.call_later(GATHER_S, self._go)  # uvloop rounds to milliseconds

    def _go(self) -> None:
        if self._later is not None:
            self._later.cancel()
        self._soon = self._later = None
        if self._busy:
            return
        self._busy = True
        connection = self._connection
        if connection is None or not connection.is_connected or connection.closed_by_server or self._stale:
            if connection is not None:
                connection.listen(_ignore, _ignore)  # what becomes of it now is nobody's business
            self._connecting = asyncio.create_task(self._reach(), name=f"store-{self._name}")
        else:
            self._send(connection)

    async def _reach(self) -> None:
        try:
            async with asyncio.timeout(self._timeout_s):
                connection = await self._connected()
        except Exception as error:
            await self._drop()
            self._broken(error, everything=True)
        else:
            self._send(connection)

    def _send(self, connection: Connection) -> None:
        batch, self._waiting = self._waiting[:MAX_BATCH], self._waiting[MAX_BATCH:]
        self._urgent = bool(self._waiting) or self._closing
        packed, self._unanswered = _pack(batch)
        if not packed:
            self._landed()
            return
        loop = asyncio.get_running_loop()
        self._sent_at = loop.time()
        if self._watch is None:
            self._watch = loop.call_later(self._timeout_s, self._look)
        try:
            connection.write(packed)
        except Exception as error:
            self._broken(error)

    def _look(self) -> None:
        """One timer watches all batches."""
        self._watch = None
        if not self._unanswered:
            return
        loop = asyncio.get_running_loop()
        left = self._sent_at + self._timeout_s - loop.time()
        if left > 0:
            self._watch = loop.call_later(left, self._look)
        else:
            # A server that hangs would cost each batch the whole deadline once more.
            self._broken(TimeoutError(f"no answer within {self._timeout_s:g} s"), everything=True)

    def _heard(self, replies: list[Any]) -> None:
        unanswered = self._unanswered
        for reply in replies:
            if not unanswered:
                self._broken(ConnectionError("an answer came that nobody asked for"))
                return
            settle = unanswered.popleft()
            if isinstance(reply, Refusal):
                tell(settle, None, self._refused(str(reply)))
                continue
            try:  # as in tell(), without the call
                settle(reply, None)
            except Exception:
                logger.exception(_UNTAKEN)
        if not unanswered:
            self._landed()

    def _landed(self) -> None:
        self._busy = False
        self._arrange()
        if self._empty is not None and not self._busy and not self._waiting and not self._empty.done():
            self._empty.set_result(None)

    def _lost(self, error: Exception) -> None:
        if self._busy or self._waiting:
            self._broken(error)
        else:
            self._stale = True  # a server may end what is idle; the next batch finds out more

    def _broken(self, error: Exception, *, everything: bool = False) -> None:
        """The connection is of no use any more; ``everything`` says that another one would not be either."""
        if not isinstance(error, LOST):
            logger.error("the store connection %r failed", self._name, exc_info=error)
        self._stale = True
        if self._connection is not None:
            self._connection.listen(_ignore, _ignore)
            self._connection.abort()
        lost = StoreUnavailable(f"The store does not answer ({type(error).__name__}: {error}).", retry_after=1)
        self._note(lost)
        self._fail(lost, everything=everything)
        self._landed()

    def _fail(self, error: StoreUnavailable, *, everything: bool) -> None:
        settles, self._unanswered = list(self._unanswered), deque()
        if everything:
            settles += [settle for _, settle in self._waiting]
            self._waiting = []
        for settle in settles:
            tell(settle, None, error)

    async def _connected(self) -> Connection:
        await self._drop()
        connection = self._connection = self._connect()
        await connection.connect()
        self._stale = False
        self.connections += 1
        if self._guard is not None:
            life = await self._guard.greet(connection)
            known, self._life = self._life, life
            if known not in (None, life):
                raise _Reborn("another server answers than before")
        connection.listen(self._heard, self._lost)
        return connection

    def _refused(self, words: str) -> LLMStreamError:
        error = _meaning(words)
        if not isinstance(error, StoreError):
            self._note(error)
            # Behind the same address another server may be the primary by now.
            self._stale = self._stale or "READONLY" in words
        return error

    def _note(self, error: StoreUnavailable) -> None:
        if self._guard is not None:
            self._guard.troubled(error)

    async def _drop(self) -> None:
        if self._connection is not None:
            await self._connection.close()


def _pack(batch: list[_Waiting]) -> tuple[list[bytes], deque[Settle]]:
    """The batch as bytes, and who waits for each answer. What cannot be sent is refused alone."""
    packed: list[bytes] = []
    settles: deque[Settle] = deque()
    for command, settle in batch:
        try:
            made = command.make() if isinstance(command, Lazy) else command
            if not made:
                continue
            packed.append(pack(made))
        except Exception as error:
            if not isinstance(error, (TypeError, ValueError)):
                logger.exception("a command could not be made")
            tell(settle, None, StoreError(f"The command cannot be sent: {error}"))
        else:
            settles.append(settle)
    return packed, settles


def _ignore(_: object) -> None: ...


def tell(settle: Settle, reply: Any, error: Exception | None) -> None:
    """Hands over an outcome."""
    try:
        settle(reply, error)
    except Exception:  # one caller's defect must not silence the store for all others
        logger.exception(_UNTAKEN)


def _meaning(refusal: str) -> StoreUnavailable:
    """An error reply as an error of ours."""
    if refusal.startswith("LOADING"):
        return StoreUnavailable(f"The store is loading its data ({refusal}).", retry_after=1)
    # A script passes on what stopped it, with its own words around the code.
    if refusal.startswith(_TRANSIENT) or "OOM" in refusal or "MISCONF" in refusal:
        return StoreUnavailable(f"The store refuses writes ({refusal}).", retry_after=1)
    return StoreError(refusal)
