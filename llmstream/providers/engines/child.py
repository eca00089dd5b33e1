"""The process around one engine: native code crashes here, not in the service.

Started as ``python -m llmstream.providers.engines.child SOCKET_FD PARENT_PID``.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import socket
import sys
import threading
import traceback
from typing import NoReturn, cast

import msgspec

from llmstream.processes import follow_parent
from llmstream.providers.engines.base import Engine
from llmstream.providers.engines.wire import (
    Cancel,
    Count,
    Counted,
    Emitted,
    Frames,
    FromChild,
    Load,
    Ready,
    Start,
    ToChild,
    Unloadable,
    frame,
)
from llmstream.types import Delta, Failure

ENGINES = {
    "llamacpp": "llmstream.providers.engines.llamacpp:LlamaCppEngine",
    "llamacpp-embeddings": "llmstream.providers.engines.llama_embeddings:LlamaCppEmbeddings",
    "ctransformers": "llmstream.providers.engines.ctransformers:CTransformersEngine",
}


def make_engine(name: str) -> Engine:
    """Imports and builds the engine of that name; the native library is loaded only by its ``load``."""
    module, _, attribute = ENGINES[name].partition(":")
    return cast(Engine, getattr(importlib.import_module(module), attribute)())


class Child:
    """Serves one engine over a socket until the other side is gone."""

    def __init__(self, link: socket.socket) -> None:
        self._link = link
        self._sending = threading.Lock()
        self._engine: Engine | None = None

    def run(self) -> None:
        """Reads and obeys messages; returns when the socket ends."""
        frames, decoder = Frames(), msgspec.json.Decoder(ToChild)
        while data := self._link.recv(1 << 16):
            for body in frames.feed(data):
                self._obey(decoder.decode(body))

    def _obey(self, message: ToChild) -> None:
        if isinstance(message, Load):
            self._load(message)
        elif self._engine is None:
            raise RuntimeError("the first message must be Load")
        elif isinstance(message, Start):
            generation = message.generation
            try:
                self._engine.start(generation, self._emit)
            except Exception as error:  # the engine's own fault must not take the other generations with it
                self._emit(generation.id, [], failure_of(error), True)
        elif isinstance(message, Cancel):
            self._engine.cancel(message.id)
        else:
            self._send(self._count(self._engine, message))

    def _load(self, message: Load) -> None:
        try:
            engine = make_engine(message.spec.engine)
            info = engine.load(message.spec)
        except (ValueError, ImportError, OSError) as error:
            self._send(Unloadable(str(error)))
            leave(1)
        self._engine = engine
        self._send(Ready(info))

    def _count(self, engine: Engine, message: Count) -> Counted:
        try:
            return Counted(message.id, engine.prompt_tokens(message.request))
        except Exception as error:
            return Counted(message.id, failure=failure_of(error))

    def _emit(self, id: int, deltas: list[Delta], failure: Failure | None, done: bool) -> None:  # noqa: A002 (the seam's name)
        self._send(Emitted(id, deltas, failure, done))

    def _send(self, message: FromChild) -> None:
        data = frame(message)
        try:
            with self._sending:
                self._link.sendall(data)
        except OSError:
            leave(0)


def failure_of(error: Exception) -> Failure:
    """Says whose fault an exception is: ValueError the request's, anything else the engine's."""
    if isinstance(error, ValueError):
        param, code = getattr(error, "param", None), getattr(error, "code", None)
        return Failure(str(error), type="invalid_request_error", code=code, param=param, status=400)
    traceback.print_exception(error)
    return Failure(f"The engine failed: {type(error).__name__}: {error}", code="engine_failed", status=502)


def leave(status: int) -> NoReturn:
    """Ends the process at once: there is nothing to save, and native threads may never be ready to stop."""
    sys.stderr.flush()
    os._exit(status)


SPINS = "2000"
"""Some microseconds: longer than most waits at a barrier. Eight streams of SmolLM2 on two cores had 217 tokens/s with
it and 131 with 0; beside a busy process both had about 100."""


def main() -> None:
    follow_parent(int(sys.argv[2]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the service, which then ends its children
    os.dup2(2, 1)
    # Threads that spin while they wait starve each other as soon as cores are shared; those that never do spend a third
    # of their time falling asleep and waking up at the barriers between two operations.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    with contextlib.suppress(ConnectionResetError):
        Child(socket.socket(fileno=int(sys.argv[1]))).run()
    leave(0)


if __name__ == "__main__":
    main()
