"""``doctor``: checks everything the service needs and says what to do."""

from __future__ import annotations

import argparse
import sys

import msgspec
from rich.text import Text

from llmstream.commands.checks import Check, everything, python
from llmstream.commands.options import read_settings
from llmstream.commands.running import run as run_to_end
from llmstream.commands.service import open_finder
from llmstream.commands.terminal import stdout_console
from llmstream.errors import ConfigError

STYLES = {"ok": "green", "warning": "yellow", "problem": "bold red"}


def run(args: argparse.Namespace) -> int:
    return run_to_end(lambda: _doctor(args))


async def _doctor(args: argparse.Namespace) -> int:
    checks = [python(), *await _configured(args)]
    if args.json:
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(checks), indent=2).decode() + "\n")
    else:
        for check in checks:
            _print(check)
    return 1 if any(check.status == "problem" for check in checks) else 0


async def _configured(args: argparse.Namespace) -> list[Check]:
    try:
        settings = read_settings(args)
    except ConfigError as error:
        return [Check("configuration", "problem", error.message, "Correct it; the other checks need it.")]
    async with open_finder(settings, args.url) as finder:
        return [Check("configuration", "ok", "is valid"), *await everything(settings, finder)]


def _print(check: Check) -> None:
    line = Text.assemble((f"{check.status:<8}", STYLES[check.status]), f" {check.name}: {check.found}")
    if check.advice and check.status != "ok":
        line.append(f"\n         → {check.advice}")
    stdout_console().print(line, soft_wrap=True)
