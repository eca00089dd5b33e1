"""``jobs``, ``cancel`` and ``requeue``: what the running server has done, does and will do."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Callable
from typing import Any

from rich.table import Table
from rich.text import Text

from llmstream.commands.options import read_settings
from llmstream.commands.running import run as run_to_end
from llmstream.commands.service import Service, open_finder
from llmstream.commands.terminal import say, stdout_console
from llmstream.config import Settings
from llmstream.errors import ConfigError, LLMStreamError

MAX_LIMIT = 500
COLUMNS = ("task id", "status", "model", "priority", "attempt", "age", "duration")
FILTERS = (
    "status",
    "lane",
    "model",
    "min_priority",
    "max_priority",
    "session_id",
    "principal",
    "created_after",
    "created_before",
    "all",
)
"""Flags of ``cancel`` that are members of the body of ``POST /jobs/cancel``."""
STYLES = {"completed": "green", "failed": "red", "cancelled": "yellow", "incomplete": "yellow", "in_progress": "cyan"}


def run(args: argparse.Namespace) -> int:
    if not 1 <= args.limit <= MAX_LIMIT:
        raise ConfigError(f"--limit must be from 1 to {MAX_LIMIT}, not {args.limit}.")
    if args.id and args.dead:
        raise ConfigError("Give a job's ID or --dead, not both.")
    settings = read_settings(args)
    return run_to_end(lambda: _show(args, settings) if args.id else _list(args, settings))


def cancel(args: argparse.Namespace) -> int:
    wanted = {name: value for name in FILTERS if (value := getattr(args, name)) not in (None, False)}
    if bool(args.ids) == bool(wanted):
        raise ConfigError("Give the IDs of jobs, or flags that say which ones (--all: every job), not both.")
    settings = read_settings(args)
    if wanted:
        return run_to_end(lambda: _cancel_all(args, settings, wanted))
    return run_to_end(lambda: _each(args, settings, lambda job_id: f"/chat/{job_id}/cancel", _cancelled))


def requeue(args: argparse.Namespace) -> int:
    settings = read_settings(args)
    return run_to_end(lambda: _each(args, settings, lambda job_id: f"/jobs/{job_id}/requeue", _requeued))


async def _list(args: argparse.Namespace, settings: Settings) -> int:
    async with open_finder(settings, args.url) as finder:
        service = await finder.require()
        jobs = (await service.get("/jobs/dead" if args.dead else "/jobs", limit=args.limit))["data"]
        await asyncio.gather(*(_add_standing(service, job) for job in jobs if job["status"] == "queued"))
    if args.json:
        _print_json(jobs)
    elif jobs:
        stdout_console().print(table(jobs, time.time()))
    else:
        say("No job was given up." if args.dead else "There are no jobs yet.")
    return 0


async def _add_standing(service: Service, job: dict[str, Any]) -> None:
    try:
        found = await service.get(f"/chat/{job['task_id']}")
    except LLMStreamError:  # gone since
        return
    job["position"], job["eta_s"] = found.get("position"), found.get("eta_s")


async def _show(args: argparse.Namespace, settings: Settings) -> int:
    async with open_finder(settings, args.url) as finder:
        job = await (await finder.require()).get(f"/chat/{args.id}")
    if args.json:
        _print_json(job)
        return 0
    console = stdout_console()
    for name, value in _lines(job, time.time()):
        console.print(Text.assemble((f"{name:<12}", "bold"), value), soft_wrap=True)
    return 0


async def _cancel_all(args: argparse.Namespace, settings: Settings, wanted: dict[str, Any]) -> int:
    body = {name: _time(value) if name.startswith("created_") else value for name, value in wanted.items()}
    count, more = 0, True
    async with open_finder(settings, args.url) as finder:
        service = await finder.require()
        while more:
            answer = await service.post("/jobs/cancel", body)
            count, more = count + answer["cancelled"], answer["more"]
    sys.stdout.write(f"{count} cancelled\n")
    return 0


def _time(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _cancelled(job: dict[str, Any]) -> str:
    return str(job["status"])


def _requeued(job: dict[str, Any]) -> str:
    return f"goes on as {job['task_id']}"


async def _each(
    args: argparse.Namespace,
    settings: Settings,
    path: Callable[[str], str],
    told: Callable[[dict[str, Any]], str],
) -> int:
    failed = 0
    async with open_finder(settings, args.url) as finder:
        service = await finder.require()
        for job_id in args.ids:
            try:
                job = await service.post(path(job_id))
            except LLMStreamError as error:
                failed += 1
                say(f"error: {error.message}")
            else:
                sys.stdout.write(f"{job_id} {told(job)}\n")
    return 1 if failed else 0


def table(jobs: list[dict[str, Any]], now: float) -> Table:
    """The rows of ``GET /jobs`` for people."""
    shown = Table(box=None, pad_edge=False)
    for name in COLUMNS:
        right = name in {"age", "duration", "attempt"}
        shown.add_column(name, justify="right" if right else "left", no_wrap=name == "task id")
    if why := any(job.get("error") for job in jobs):
        shown.add_column("error")
    for job in jobs:
        status = job["status"]
        shown.add_row(
            job["task_id"],
            Text(_status(job), style=STYLES.get(status, "")),
            Text(job["model"]),
            f"{job['priority']} ({job['lane']})",
            str(job["attempt"]),
            span(now - job["created_at"]),
            _duration(job, now),
            *([Text(job["error"]["message"] if job.get("error") else "")] if why else []),
        )
    return shown


def span(seconds: float) -> str:
    """A time for people: ``0.4 s``, ``12 s``, ``3 min``, ``5 h``, ``2 d``."""
    if seconds < 10:
        return f"{max(seconds, 0):.1f} s"
    for least, unit, name in ((2 * 86400, 86400, "d"), (2 * 3600, 3600, "h"), (120, 60, "min")):
        if seconds >= least:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds:.0f} s"


def _status(job: dict[str, Any]) -> str:
    ahead = job.get("position")
    return job["status"] if ahead is None else f"{job['status']}, {ahead} ahead"


def _duration(times: dict[str, Any], now: float) -> str:
    started, finished = times.get("started_at"), times.get("finished_at")
    return span((finished or now) - started) if started else "-"


def _lines(job: dict[str, Any], now: float) -> list[tuple[str, str]]:
    timings, usage, error = job["timings"], job.get("usage"), job.get("error")
    found = [
        ("task id", job["task_id"]),
        ("session", job.get("session_id")),
        ("status", _status(job)),
        ("reason", job.get("finish_reason")),
        ("error", error and error["message"]),
        ("model", job["model"]),
        ("priority", f"{job['priority']} ({job['lane']})"),
        ("attempt", job["attempt"]),
        ("continues", job.get("continues")),
        ("age", span(now - timings["created_at"])),
        ("waited", timings["queue_s"] is not None and span(timings["queue_s"])),
        ("duration", _duration(timings, now)),
        ("tokens", usage and f"{usage['prompt_tokens']} + {usage['completion_tokens']}"),
        ("last event", job["last_event_id"]),
        ("text", job["text"]),
    ]
    return [(name, str(value)) for name, value in found if value not in (None, False, "")]


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
