"""What a process and its children have used."""

from __future__ import annotations

import resource
import time
from contextlib import suppress
from pathlib import Path

PROC = Path("/proc")


def tree(pid: int) -> list[int]:
    """A process and all its descendants."""
    children: dict[int, list[int]] = {}
    for entry in PROC.iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
    found, todo = [], [pid]
    while todo:
        found.append(todo.pop())
        todo += children.get(found[-1], [])
    return found


def cpu_seconds(pid: int) -> float:
    """Time on a CPU of every process of the tree, threads that have ended included.

    Read from their CPU clocks, in nanoseconds: the 10 ms ticks of ``/proc/PID/stat`` would blur paced loads.
    """
    total = 0.0
    for process in tree(pid):
        with suppress(OSError):
            total += time.clock_gettime(_cpu_clock(process))
    return total


def _cpu_clock(pid: int) -> int:
    """What ``clock_getcpuclockid(3)`` returns, which Python does not offer: CPUCLOCK_SCHED of a process."""
    return (~pid << 3) | 2


def memory_mb(pid: int) -> float:
    """Memory of the tree; pages that several processes share count once (PSS)."""
    total = 0
    for process in tree(pid):
        with suppress(OSError):
            for line in (PROC / str(process) / "smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1])
    return total / 1024


def open_files_limit() -> int:
    """Files and sockets that a process started from here may open."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[1]
