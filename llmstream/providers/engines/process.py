"""The service's end of an engine's process: starts it, talks to it, notices its end."""

from __future__ import annotations

import collections
import contextlib
import os
import selectors
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable

import msgspec

from llmstream.processes import module_command
from llmstream.providers.engines.wire import Frames, FromChild, ToChild, frame

TAIL_BYTES = 4096
CHUNK = 1 << 16


class EngineProcess:
    """One child process. :meth:`pump` blocks and belongs to one thread; ``send`` and ``kill`` may come from any."""

    def __init__(self) -> None:
        self._link, theirs = socket.socketpair()
        self._wake, self._waker = socket.socketpair()
        self._outbox: collections.deque[bytes] = collections.deque()
        self._tail = bytearray()
        self._folder = tempfile.mkdtemp(prefix="llmstream-")
        for end in (self._link, self._wake, self._waker):
            end.setblocking(False)
        command = module_command("llmstream.providers.engines.child")
        try:
            with theirs:
                self._process = subprocess.Popen(  # noqa: S603 (our own module, no shell)
                    [*command, str(theirs.fileno()), str(os.getpid())],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    env={**os.environ, "TMPDIR": self._folder},
                )
        except BaseException:
            self._give_back()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def tail(self) -> str:
        """The last of what the process printed."""
        return self._tail.decode("utf-8", "replace").strip()

    def send(self, message: ToChild) -> None:
        """Queues a message and returns at once. Raises what the encoder raises for a value no JSON can hold."""
        self._outbox.append(frame(message))
        with contextlib.suppress(OSError):  # full: the wake-up is already on its way; closed: the end is known
            self._waker.send(b"\0")

    def kill(self) -> None:
        """Ends the process now; :meth:`pump` then returns."""
        with contextlib.suppress(OSError):
            self._process.kill()

    def pump(self, deliver: Callable[[list[FromChild]], None]) -> str:
        """Moves messages both ways until the process ends, then says how it ended."""
        try:
            self._exchange(deliver)
        finally:
            self._process.kill()
            status = self._process.wait()
            self._read_tail()
            self._give_back()
        return f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"

    def _exchange(self, deliver: Callable[[list[FromChild]], None]) -> None:
        frames, decoder, unsent = Frames(), msgspec.json.Decoder(FromChild), bytearray()
        with selectors.DefaultSelector() as selector:
            selector.register(self._link, selectors.EVENT_READ)
            selector.register(self._wake, selectors.EVENT_READ)
            assert self._process.stderr is not None
            os.set_blocking(self._process.stderr.fileno(), False)
            selector.register(self._process.stderr, selectors.EVENT_READ)
            while True:
                ready = {key.fileobj: events for key, events in selector.select()}
                if self._process.stderr in ready and not self._read_tail():
                    selector.unregister(self._process.stderr)
                if self._wake in ready:
                    self._wake.recv(CHUNK)
                if ready.get(self._link, 0) & selectors.EVENT_READ:
                    data = self._receive()
                    if not data:
                        return
                    messages = [decoder.decode(body) for body in frames.feed(data)]
                    if messages:
                        deliver(messages)
                wants_room = self._transmit(unsent)
                selector.modify(self._link, selectors.EVENT_READ | (selectors.EVENT_WRITE if wants_room else 0))

    def _receive(self) -> bytes:
        try:
            return self._link.recv(CHUNK)
        except ConnectionError:
            return b""

    def _transmit(self, unsent: bytearray) -> bool:
        """Sends what fits; True when something is left."""
        while self._outbox:
            unsent += self._outbox.popleft()
        try:
            while unsent:
                del unsent[: self._link.send(unsent)]
        except BlockingIOError:
            return True
        except OSError:
            unsent.clear()  # the reading side learns of the end
        return False

    def _read_tail(self) -> bool:
        """Keeps the end of what was printed; False once nothing more can come."""
        assert self._process.stderr is not None
        try:
            while data := os.read(self._process.stderr.fileno(), CHUNK):
                self._tail += data
                del self._tail[:-TAIL_BYTES]
        except BlockingIOError:
            return True
        return False

    def _give_back(self) -> None:
        for end in (self._link, self._wake, self._waker):
            end.close()
        if hasattr(self, "_process") and self._process.stderr is not None:
            self._process.stderr.close()
        shutil.rmtree(self._folder, ignore_errors=True)
