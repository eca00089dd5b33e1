"""What processes of ours do when they start."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress

GC_OBJECTS = 20_000
_PR_SET_PDEATHSIG = 1


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop where there is one; None stands for asyncio's own choice."""
    if os.name == "nt":
        return None
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


def collect_less() -> None:
    """Call when a server is up: what lives as long as the process is left alone by the garbage collector from here on,
    and the rest is looked through every some ten thousand objects instead of every 700."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_OBJECTS, 20, 20)


def open_more_files() -> None:
    """Call when a server starts: it may have as many connections as the system lets it. The lower limit that programs
    begin with is for those that cannot deal with many."""
    if os.name == "nt":
        return
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # macOS calls its limit infinite, and then does not give it
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def follow_parent(parent: int) -> None:
    """Makes this process end with its parent where the system can do that; elsewhere the end of a pipe has to."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(0)


def module_command(module: str) -> list[str]:
    """How this Python runs one of our modules."""
    # Without -P, python -m looks for modules in the working directory first, which may hold anything.
    safe = [] if {"", os.getcwd()} & set(sys.path) else ["-P"]
    return [sys.executable, *safe, "-m", module]
