"""``llmstream queues``: show, pause, drain and resume parts of the queue."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

from rich.table import Table
from rich.text import Text

from llmstream.commands.jobs import span
from llmstream.commands.options import read_settings
from llmstream.commands.running import run as run_to_end
from llmstream.commands.service import open_finder
from llmstream.commands.terminal import say, stdout_console
from llmstream.config import Settings
from llmstream.errors import ConfigError

DONE = {"pause": "paused", "drain": "draining", "resume": "resumed"}


def run(args: argparse.Namespace) -> int:
    if args.action == "list" and (args.lane or args.model or args.all):
        raise ConfigError("--lane, --model and --all say what to pause, drain or resume; leave them out, or say which.")
    if args.action != "list":
        if args.all and (args.lane or args.model):
            raise ConfigError("--all means everything; leave it out, or --lane and --model.")
        if not (args.all or args.lane or args.model):
            raise ConfigError(f"Say what to {args.action}: --lane, --model or both, or --all.")
    settings = read_settings(args)
    return run_to_end(lambda: _list(args, settings) if args.action == "list" else _act(args, settings))


async def _list(args: argparse.Namespace, settings: Settings) -> int:
    async with open_finder(settings, args.url) as finder:
        found = await (await finder.require()).get("/queues")
    if args.json:
        sys.stdout.write(json.dumps(found, indent=2, ensure_ascii=False) + "\n")
        return 0
    console = stdout_console()
    console.print(_pools(found["pools"]))
    if found["rules"]:
        console.print()
        console.print(_rules(found["rules"], time.time()))
    else:
        say("Nothing is paused or draining.")
    return 0


async def _act(args: argparse.Namespace, settings: Settings) -> int:
    body = {name: value for name in ("lane", "model") if (value := getattr(args, name))}
    if args.all and args.action == "resume":
        body["all"] = True
    async with open_finder(settings, args.url) as finder:
        answer = await (await finder.require()).post(f"/queues/{args.action}", body)
    if args.json:
        sys.stdout.write(json.dumps(answer, indent=2, ensure_ascii=False) + "\n")
    else:
        sys.stdout.write(f"{_part(args.lane, args.model)} {DONE[args.action]}\n")
        if args.action == "resume" and answer["rules"]:
            rest = ", ".join(f"{_part(each['lane'], each['model'])} ({each['mode']})" for each in answer["rules"])
            say(f"Still held: {rest}")
    return 0


def _pools(pools: dict[str, Any]) -> Table:
    shown = Table(box=None, pad_edge=False)
    for name in ("pool", "high", "default", "low", "scheduled", "paused", "running"):
        shown.add_column(name, justify="left" if name == "pool" else "right")
    for pool, found in pools.items():
        numbers = (*found["waiting"].values(), found["scheduled"], found["paused"], found["running"])
        shown.add_row(Text(pool), *map(str, numbers))
    return shown


def _rules(rules: list[dict[str, Any]], now: float) -> Table:
    shown = Table(box=None, pad_edge=False)
    for name in ("mode", "what", "since", "by", "waiting", "running"):
        shown.add_column(name)
    for rule in rules:
        part = Text(_part(rule["lane"], rule["model"]))
        numbers = str(rule["waiting"]), str(rule["running"])
        shown.add_row(rule["mode"], part, span(now - rule["since"]), Text(rule["by"]), *numbers)
    return shown


def _part(lane: str | None, model: str | None) -> str:
    said = [f"lane {lane}"] * bool(lane) + [f"model {model}"] * bool(model)
    return ", ".join(said) or "everything"
