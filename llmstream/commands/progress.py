"""How far a download of weights is, on standard error: a bar for people, a line now and then for log files."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Self

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from llmstream.commands.terminal import say, stderr_console
from llmstream.providers.downloads import Progress as Report

STEPS = 10
"""Lines for one download where there is no terminal."""


class Bars:
    """Shows downloads while the context is open; nothing appears until the first one reports."""

    def __init__(self) -> None:
        self._bars: Progress | None = None

    def __call__(self, source: str) -> Report:
        """Makes what hears how far the pull of ``source`` is."""
        return self._bar(source) if sys.stderr.isatty() else _lines(source)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def _bar(self, source: str) -> Report:
        bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=stderr_console(),
        )
        task = bars.add_task(f"Downloading {source}", total=None)

        def report(done: int, total: int | None) -> None:
            if self._bars is not bars:
                self._stop()
                self._bars = bars
                bars.start()
            bars.update(task, completed=done, total=total)

        return report

    def _stop(self) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None


def _lines(source: str) -> Report:
    said = -1

    def report(done: int, total: int | None) -> None:
        nonlocal said
        step = done * STEPS // total if total else done // 100_000_000
        if step != said:
            said = step
            of = f" of {total / 1e6:,.0f}" if total else ""
            say(f"Downloading {source}: {done / 1e6:,.0f}{of} MB")

    return report
