"""A device: one engine in a child process, driven by one thread and started again whenever it dies."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
from collections.abc import Callable
from typing import Literal

from llmstream.errors import BadRequest, ConfigError, EngineCrashed, ProviderError, UpstreamBroken, UpstreamRejected
from llmstream.providers.base import Sink
from llmstream.providers.engines.base import EngineInfo, EngineSpec, Generation
from llmstream.providers.engines.process import EngineProcess
from llmstream.providers.engines.wire import (
    Cancel,
    Count,
    Counted,
    Emitted,
    FromChild,
    Load,
    Ready,
    Start,
    ToChild,
    Unloadable,
)
from llmstream.providers.stream import Stream
from llmstream.types import Failure, GenerateRequest

CANCEL_DEADLINE_S = 10.0
"""An engine that has not freed a slot by then hangs, and is killed."""
RESTART_DEADLINE_S = 60.0
FIRST_BACKOFF_S, LONGEST_BACKOFF_S = 0.5, 30.0


class Device:
    """Owns the engine's process. Used from one event loop; only :meth:`_drive` runs in the device's thread."""

    def __init__(self, name: str, spec: EngineSpec) -> None:
        self._name, self._spec = name, spec
        self.state: Literal["closed", "loading", "ok", "restarting"] = "closed"
        self.info = EngineInfo(context=spec.context or 0, slots=spec.slots)
        self.restarts = 0
        self.last_error: str | None = None
        self._refused: str | None = None
        self._ids = itertools.count(1)
        self._process: EngineProcess | None = None
        self._live: EngineProcess | None = None
        self._thread: threading.Thread | None = None
        self._closing = threading.Event()
        self._ready = asyncio.Event()
        self._opened: asyncio.Future[None] | None = None
        self._streams: dict[int, Stream] = {}
        self._counts: dict[int, asyncio.Future[Counted]] = {}
        self._stops: set[asyncio.Task[None]] = set()

    @property
    def pid(self) -> int | None:
        """The engine's process, while it runs."""
        return self._process.pid if self._process else None

    async def open(self) -> None:
        """Loads the weights. Raises ConfigError when they cannot be loaded, EngineCrashed when loading crashes."""
        loop = asyncio.get_running_loop()
        self.state, self._opened = "loading", loop.create_future()
        self._thread = threading.Thread(target=self._drive, args=(loop,), name=f"engine-{self._name}", daemon=True)
        self._thread.start()
        try:
            await self._opened
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Kills the process (it has nothing to save) and waits for the thread."""
        self._closing.set()
        if self._process:
            self._process.kill()
        if self._thread:
            await asyncio.to_thread(self._thread.join)
            self._thread = None
        self.state = "closed"
        self._fail_all(EngineCrashed(f"The model {self._name!r} was closed."))

    async def count(self, request: GenerateRequest) -> int:
        """Counts the prompt's tokens. Raises BadRequest for a request that the engine refuses."""
        await self._wait_ready()
        number = next(self._ids)
        answer = self._counts[number] = asyncio.get_running_loop().create_future()
        try:
            self._send(Count(number, request))
            counted: Counted = await answer
        finally:
            del self._counts[number]
        if counted.failure:
            raise _refusal(counted.failure)
        return counted.tokens

    async def start(self, request: GenerateRequest, sink: Sink, text: str = "", tokens: tuple[int, ...] = ()) -> Stream:
        """Begins a generation, behind ``text`` where there is some; give it back with :meth:`stop`."""
        await self._wait_ready()
        stream = Stream(next(self._ids), sink)
        self._send(Start(Generation(stream.id, request, text, tokens)))
        self._streams[stream.id] = stream
        return stream

    async def stop(self, stream: Stream) -> None:
        """Returns once the generation holds no slot any more, whoever is cancelled meanwhile."""
        stream.mute()
        if not stream.done.is_set():
            task = asyncio.create_task(self._stop(stream), name=f"stop-generation-{stream.id}")
            self._stops.add(task)
            task.add_done_callback(self._stops.discard)
            await asyncio.shield(task)
        self._streams.pop(stream.id, None)

    async def _stop(self, stream: Stream) -> None:
        process = self._live
        with contextlib.suppress(EngineCrashed):
            self._send(Cancel(stream.id))
        try:
            async with asyncio.timeout(CANCEL_DEADLINE_S):
                await stream.done.wait()
        except TimeoutError:
            self.last_error = "a cancelled generation did not end"
            if process and process is self._live:
                self._ready.clear()
                process.kill()
        self._streams.pop(stream.id, None)

    def _send(self, message: ToChild) -> None:
        if self._live is None:
            raise EngineCrashed(f"The engine of {self._name!r} ended just now; try again.")
        try:
            self._live.send(message)
        except (UnicodeEncodeError, RecursionError, OverflowError) as error:
            raise BadRequest(f"The request holds what JSON cannot carry: {error}") from error

    async def _wait_ready(self) -> None:
        if self.state == "closed":
            raise EngineCrashed(f"The model {self._name!r} is not open.")
        try:
            async with asyncio.timeout(RESTART_DEADLINE_S):
                await self._ready.wait()
        except TimeoutError:
            raise EngineCrashed(
                f"The engine of {self._name!r} has not come back for {RESTART_DEADLINE_S:g} s: {self.last_error}"
            ) from None

    def _drive(self, loop: asyncio.AbstractEventLoop) -> None:
        """The device's thread: runs one process after the other.

        The processes are started here and not on the event loop's thread because on Linux they get the
        parent-death signal when the *thread* that started them ends, and this thread lives as long as they should.
        """
        backoff = 0.0
        while not self._closing.wait(backoff):
            loaded = False

            def deliver(messages: list[FromChild]) -> None:
                nonlocal loaded
                loaded = loaded or isinstance(messages[0], Ready)
                loop.call_soon_threadsafe(self._deliver, messages)

            how, tail = self._run(deliver)
            with contextlib.suppress(RuntimeError):  # the loop was closed before us: nobody is left to tell
                loop.call_soon_threadsafe(self._ended, how, tail)
            if loop.is_closed():
                return
            backoff = 0.0 if loaded else min(max(FIRST_BACKOFF_S, backoff * 2), LONGEST_BACKOFF_S)

    def _run(self, deliver: Callable[[list[FromChild]], None]) -> tuple[str, str]:
        """Runs one process to its end; says how it ended and what it printed last."""
        try:
            process = EngineProcess()
        except OSError as error:
            return f"could not be started: {error}", ""
        self._process = process  # read by the loop's thread; only ever replaced or removed as a whole
        if self._closing.is_set():  # close() may have looked before there was anything to kill
            process.kill()
        process.send(Load(self._spec))
        try:
            return process.pump(deliver), process.tail
        except RuntimeError as error:
            return f"was left: {error}", process.tail
        finally:
            self._process = None

    def _deliver(self, messages: list[FromChild]) -> None:
        for message in messages:
            if isinstance(message, Emitted):
                self._emitted(message)
            elif isinstance(message, Counted):
                answer = self._counts.get(message.id)
                if answer and not answer.done():
                    answer.set_result(message)
            elif isinstance(message, Unloadable):
                self._refused = message.message
            else:
                self.info, self.state, self._refused = message.info, "ok", None
                self._live = self._process
                self._ready.set()
                if self._opened and not self._opened.done():
                    self._opened.set_result(None)

    def _emitted(self, message: Emitted) -> None:
        stream = self._streams.get(message.id)
        if stream is None:
            return
        stream.add(message.deltas)
        if message.done:
            stream.end(_failed(message.failure) if message.failure else None)

    def _ended(self, how: str, tail: str) -> None:
        self._ready.clear()
        self._live = None
        if self._closing.is_set():
            return
        self.last_error = f"its process {how}" if self._refused is None else self._refused
        if self.state != "ok" and tail:
            self.last_error += f"; it said last:\n{tail}"
        self.state, self.restarts = "restarting", self.restarts + 1
        self._fail_all(EngineCrashed(f"The engine of {self._name!r} crashed: its process {how}."))
        if self._opened and not self._opened.done():
            what = f"The model {self._name!r} cannot be loaded: {self.last_error}"
            self._opened.set_exception(EngineCrashed(what) if self._refused is None else ConfigError(what))

    def _fail_all(self, error: ProviderError) -> None:
        for stream in self._streams.values():
            stream.end(error)
        self._streams.clear()
        for answer in self._counts.values():
            if not answer.done():
                answer.set_exception(error)


def _refusal(failure: Failure) -> BadRequest | ProviderError:
    if failure.status < 500:
        return BadRequest(failure.message, param=failure.param, code=failure.code)
    return _failed(failure)


def _failed(failure: Failure) -> ProviderError:
    if failure.status < 500:
        return UpstreamRejected(failure.message, param=failure.param, code=failure.code, status=failure.status)
    return UpstreamBroken(failure.message, code=failure.code)
