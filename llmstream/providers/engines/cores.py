"""How many processor cores this process may really use."""

from __future__ import annotations

import math
import os
from pathlib import Path, PurePosixPath

CGROUPS = Path("/sys/fs/cgroup")


def available_cores() -> int:
    """Cores by affinity and control-group quota, at least 1.

    More compute threads than cores make OpenMP's barriers many times slower, so ``os.cpu_count()`` will not do.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cgroup_quota()
    return max(1, min(allowed, math.ceil(quota)) if quota else allowed)


def cgroup_quota(root: Path = CGROUPS, membership: Path = Path("/proc/self/cgroup")) -> float | None:
    """The smallest CPU quota, in cores, of this process's control groups (v2 and v1); None where there is none."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return None
    quotas: list[float] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            folders, read = _upwards(root, path), _quota_v2
        elif "cpu" in controllers.split(","):
            folders, read = _upwards(root / "cpu", path), _quota_v1
        else:
            continue
        for folder in folders:
            try:
                quota = read(folder)
            except (OSError, ValueError):
                continue
            if quota is not None:
                quotas.append(quota)
    return min(quotas, default=None)


def _upwards(root: Path, path: str) -> list[Path]:
    inside = PurePosixPath(path.lstrip("/"))
    return [root / part for part in (inside, *inside.parents)]


def _quota_v2(folder: Path) -> float | None:
    quota, period = (folder / "cpu.max").read_text().split()
    return None if quota == "max" else int(quota) / int(period)


def _quota_v1(folder: Path) -> float | None:
    quota = int((folder / "cpu.cfs_quota_us").read_text())
    return None if quota <= 0 else quota / int((folder / "cpu.cfs_period_us").read_text())
