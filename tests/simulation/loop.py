"""An event loop without a clock: time jumps to the next timer, and whole processes can be stopped and killed."""

from __future__ import annotations

import asyncio
import contextvars
import heapq
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, TypeVarTuple, Unpack

T = TypeVar("T")
Args = TypeVarTuple("Args")


class Process:
    """What runs in one simulated process: everything whose context says so."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.frozen = False
        self.held: list[Call] = []
        """What would have run while the process was stopped."""

    def __repr__(self) -> str:
        return self.name


_PROCESS: contextvars.ContextVar[Process | None] = contextvars.ContextVar("process", default=None)
OUTSIDE = contextvars.Context()
"""Where the network and the store run: no process can take them along."""


class Call:
    """What asyncio calls a handle, without what only a debugger asks for: these are most of what is made here."""

    __slots__ = ("args", "at", "callback", "context", "dropped", "process")

    def __init__(
        self, at: float, callback: Callable[..., object], args: tuple[Any, ...], context: contextvars.Context | None
    ) -> None:
        self.at = at
        self.callback = callback
        self.args = args
        self.context = contextvars.copy_context() if context is None else context
        self.process: Process | None = self.context.get(_PROCESS)
        self.dropped = False

    def cancel(self) -> None:
        self.dropped = True

    def cancelled(self) -> bool:
        return self.dropped

    def when(self) -> float:
        return self.at


class VirtualLoop(asyncio.AbstractEventLoop):
    """Runs callbacks in the order of their time, on one thread, the same way every time."""

    def __init__(self) -> None:
        self._now = 0.0
        self._ready: deque[Call] = deque()
        self._timers: list[tuple[float, int, Call]] = []
        self._sequence = 0
        self.tasks: list[asyncio.Task[Any]] = []
        """All there ever were."""
        self.errors: list[dict[str, Any]] = []
        """What nobody caught."""

    def run(self, until: Callable[[], bool], limit: float) -> bool:
        """Runs until ``until`` holds between two moments; False when the time ``limit`` came first."""
        while True:
            self._run_ready()
            if until():
                return True
            if not self._timers or self._timers[0][0] > limit:
                self._now = max(self._now, limit)
                return False
            when, _, call = heapq.heappop(self._timers)
            if not call.dropped:
                self._now = max(self._now, when)
                self._ready.append(call)

    def _run_ready(self) -> None:
        ready = self._ready
        while ready:
            call = ready.popleft()
            if call.dropped:
                continue
            process = call.process
            if process is not None and process.frozen:
                process.held.append(call)
                continue
            try:
                call.context.run(call.callback, *call.args)
            except Exception as error:
                self.errors.append({"message": f"{call.callback} failed", "exception": error})

    def thaw(self, process: Process) -> None:
        """Lets a stopped process go on with everything that has become due."""
        process.frozen = False
        self._ready.extend(process.held)
        process.held = []

    def spawn(self, process: Process, work: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
        """Starts a task as part of a process."""
        context = contextvars.Context()
        context.run(_PROCESS.set, process)
        return self.create_task(work, name=name, context=context)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Makes this the thread's running loop."""
        asyncio._set_running_loop(self)
        try:
            yield
        finally:
            asyncio._set_running_loop(None)

    def time(self) -> float:
        return self._now

    def call_soon(
        self,
        callback: Callable[[Unpack[Args]], object],
        *args: *Args,
        context: contextvars.Context | None = None,
    ) -> asyncio.Handle:
        call = Call(self._now, callback, args, context)
        self._ready.append(call)
        return call  # type: ignore[return-value]  # what is used of a handle, it has

    def call_later(
        self,
        delay: float,
        callback: Callable[[Unpack[Args]], object],
        *args: *Args,
        context: contextvars.Context | None = None,
    ) -> asyncio.TimerHandle:
        return self.call_at(self._now + delay, callback, *args, context=context)

    def call_at(
        self,
        when: float,
        callback: Callable[[Unpack[Args]], object],
        *args: *Args,
        context: contextvars.Context | None = None,
    ) -> asyncio.TimerHandle:
        call = Call(when, callback, args, context)
        self._sequence += 1
        heapq.heappush(self._timers, (when, self._sequence, call))
        return call  # type: ignore[return-value]

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(
        self, coro: Any, *, name: str | None = None, context: contextvars.Context | None = None
    ) -> asyncio.Task[Any]:
        task = asyncio.Task(coro, loop=self, name=name, context=context)
        self.tasks.append(task)
        return task

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        self.errors.append(context)

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return False
