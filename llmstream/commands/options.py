"""Flags that several commands share, and the settings that come of them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from llmstream.config import Settings, load
from llmstream.config_schema import MASK, schema_of
from llmstream.types import EventId

Command = Callable[[argparse.Namespace], int]
"""What runs a command: from parsed flags to the exit status."""

Assignment = tuple[str, str]
"""A setting's dotted key and the text it gets."""


def assignment(text: str) -> Assignment:
    """Reads ``--set KEY=VALUE``."""
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE, for example server.port=8080")
    return key, value


def event_id(text: str) -> EventId:
    """Reads ``--after EVENT_ID``."""
    try:
        return EventId.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def read_settings(args: argparse.Namespace) -> Settings:
    """Loads the settings with the flags on top. Raises ConfigError."""
    flags = {
        "data_dir": args.data_dir,
        "server.host": getattr(args, "host", None),
        "server.port": getattr(args, "port", None),
        "server.workers": getattr(args, "workers", None),
    }
    return load(Path(args.config) if args.config else None, flags={**flags, **dict(args.assignments)})


def program() -> str:
    """How this program was called."""
    name = Path(sys.argv[0]).name
    return "python -m llmstream" if name in {"__main__.py", "-m", "-c", ""} else name


def repeated(args: argparse.Namespace) -> list[str]:
    """The shared flags as they were given, for a command that has to find the same server and store; no secrets."""
    words: list[str] = []
    for flag, value in (("--config", args.config), ("--data-dir", args.data_dir), ("--url", args.url)):
        if value is not None:
            words += [flag, value]
    schema = schema_of(Settings)
    for key, value in args.assignments:
        setting = schema.find(schema.key(key.split("."), "."))
        words += ["--set", f"{key}={MASK if setting and setting.secret else value}"]
    return words
