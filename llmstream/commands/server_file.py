"""``data_dir/server.json``: where the server that uses this data directory listens."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
from msgspec import Struct

NAME = "server.json"


class Record(Struct, frozen=True):
    url: str
    pid: int


class ServerFile:
    """Written by a server when it listens, removed when it ends, read by whoever looks for one."""

    def __init__(self, data_dir: Path) -> None:
        self.path = data_dir / NAME

    def write(self, url: str) -> None:
        """Says that this process listens at ``url``; readable for its owner only. Raises OSError."""
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        part = self.path.with_name(f".{NAME}.{os.getpid()}")
        part.unlink(missing_ok=True)
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(descriptor, "wb") as file:
            file.write(msgspec.json.encode(Record(url, os.getpid())))
        part.replace(self.path)

    def read(self) -> Record | None:
        """Who listens; None when nobody said so, or whoever did is no longer there."""
        try:
            record = msgspec.json.decode(self.path.read_bytes(), type=Record)
        except (OSError, msgspec.DecodeError):
            return None
        return record if _alive(record.pid) else None

    def remove(self) -> None:
        """Takes back what this process wrote; what another server wrote since stays."""
        record = self.read()
        if record is not None and record.pid == os.getpid():
            self.path.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return pid > 0
