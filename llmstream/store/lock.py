"""A directory that one process at a time may use."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any

from llmstream.errors import ConfigError

LOCK_NAME = "lock"


class DirectoryLock:
    """Holds a directory for this process; the kernel lets go of it when the process ends, however it ends.

    Creates the directory, readable for its owner only. Raises ConfigError when another process holds it or it cannot
    be written.
    """

    def __init__(self, directory: Path) -> None:
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            directory.chmod(0o700)
            self._fd = os.open(directory / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigError(
                f"The store's directory {directory} cannot be used: {error.strerror}. Set data_dir (DATA_DIR) to a "
                "directory you own, or REDIS_URL to a running Redis."
            ) from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = self._read()
            os.close(self._fd)
            raise ConfigError(_in_use(directory, holder)) from error
        socket = self._read().get("socket")
        self.previous_socket = Path(socket) if isinstance(socket, str) else None
        """Where the server of the last holder listened, unless it ended cleanly."""
        self.record(self.previous_socket)

    def record(self, socket: Path | None) -> None:
        """Leaves word for others: who holds the directory and where its server listens."""
        self._write({"pid": os.getpid(), "socket": str(socket) if socket else None})

    def release(self) -> None:
        # The file stays: were it removed, two processes could each lock a file of that name.
        self._write({})
        os.close(self._fd)

    def _read(self) -> dict[str, Any]:
        try:
            found = json.loads(os.pread(self._fd, 4096, 0))
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    def _write(self, entry: dict[str, Any]) -> None:
        data = json.dumps(entry).encode()
        os.pwrite(self._fd, data, 0)
        os.ftruncate(self._fd, len(data))


def _in_use(directory: Path, holder: dict[str, Any]) -> str:
    pid, socket = holder.get("pid"), holder.get("socket")
    who = f"process {pid}" if pid else "another process"
    share = f", or share its store with REDIS_URL=unix://{socket}" if socket else ""
    return (
        f"The store in {directory} is in use by {who}. Stop that process, or give this one another data_dir "
        f"(DATA_DIR){share}."
    )
