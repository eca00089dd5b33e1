"""``python -m tests.bench``: measures llmstream beside other gateways; prints a table, writes JSON and pictures.

The server that is measured has a core to itself; a load generator and a mock upstream written in C share another one.
CPU per unit of work and ratios within one run are dependable; wall times on a shared machine are not.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import resource
import shutil
import signal
import sys
import tempfile
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

from tests.bench import machine, plots, targets
from tests.bench.bench import Bench, Running
from tests.bench.cases import jobs
from tests.bench.cases.compare import COMPARISONS, compare
from tests.bench.cases.idle import idle
from tests.bench.cases.local_engine import local_engine
from tests.bench.cases.open_streams import open_streams
from tests.bench.cases.replicas import replicas
from tests.bench.effort import FULL, QUICK, Effort
from tests.bench.growth import curves
from tests.bench.processes import Unavailable
from tests.bench.report import Report, say
from tests.bench.systems.base import System
from tests.bench.systems.direct import Direct
from tests.bench.systems.litellm import LiteLLM
from tests.bench.systems.llmstream import Llmstream
from tests.bench.systems.naive import Naive
from tests.bench.systems.nginx import Nginx
from tests.bench.systems.portkey import Portkey
from tests.bench.systems.smg import Smg
from tests.bench.tools import Load

UNLOGGED = Llmstream({"store.durability": "memory"}, name="llmstream-memory")
"""The same server without its log: what the log costs."""
SYSTEMS: dict[str, System] = {
    system.name: system for system in (Direct(), Llmstream(), UNLOGGED, Nginx(), Smg(), Naive(), Portkey(), LiteLLM())
}

Alone = Callable[[Bench, str], Awaitable[None]]
ALONE: dict[str, Alone] = {
    "accept": jobs.accept,
    "resume": jobs.resume,
    "cancel": jobs.cancel,
    "takeover": jobs.takeover,
    "replicas": replicas,
    "idle-memory": idle,
    "open-streams": open_streams,
    "local-engine": local_engine,
    "waiting": curves.waiting,
    "stored": curves.stored,
    "subscribers": curves.subscribers,
    "events": curves.events,
}
"""Each starts what it needs itself."""

WARM = (Load(tokens=64, clients=32, seconds=0.5), Load(tokens=16, clients=64, seconds=0.5, shape="whole"))


def main() -> int:
    given = _arguments()
    if not (shutil.which("taskset") and shutil.which("setpriv")):
        sys.exit("The benchmark needs Linux with taskset and setpriv (util-linux).")
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    report = Report()
    try:
        asyncio.run(_measure(given, report))
    except Unavailable as error:
        sys.exit(f"Nothing can be measured: {error}")
    except (KeyboardInterrupt, asyncio.CancelledError):
        say("interrupted; what was measured so far:")
    return _conclude(report, given.out)


def _arguments() -> argparse.Namespace:
    every = [*COMPARISONS, *ALONE]
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "llmstream-bench"
    parser.add_argument("--quick", action="store_true", help="one short round and small sizes: does it work at all?")
    parser.add_argument("--only", type=_names(every), default=every, metavar="CASES", help=", ".join(every))
    parser.add_argument(
        "--systems", type=_names([*SYSTEMS]), default=[*SYSTEMS], metavar="NAMES", help=", ".join(SYSTEMS)
    )
    parser.add_argument("--rounds", type=int, help=f"of each comparison; by default {FULL.rounds}")
    parser.add_argument("--stored", type=int, metavar="N", help="largest number of stored logs, for example 1000000")
    parser.add_argument("--out", type=Path, default=Path("bench-results"), help="folder for results.json and pictures")
    parser.add_argument("--cache", type=Path, default=cache, help=f"where the others are installed; by default {cache}")
    parser.add_argument("--port", type=int, default=28220, help="first of eleven ports on 127.0.0.1")
    return parser.parse_args()


def _names(known: list[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        unknown = [name for name in text.split(",") if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: expected {', '.join(known)}")
        return [name for name in known if name in text.split(",")]

    return parse


def _effort(given: argparse.Namespace) -> Effort:
    effort = QUICK if given.quick else FULL
    if given.rounds:
        effort = replace(effort, rounds=given.rounds)
    if given.stored:
        effort = replace(effort, stored=(*(size for size in effort.stored if size < given.stored), given.stored))
    return effort


async def _measure(given: argparse.Namespace, report: Report) -> None:
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    cores = machine.choose_cores()
    os.sched_setaffinity(0, {int(cores.load)})
    report.machine = machine.describe(cores)
    for name, value in report.machine.items():
        say(f"{name:10} {value}")
    with tempfile.TemporaryDirectory(prefix="llmstream-bench-") as folder:
        async with Bench(
            Path(folder),
            given.cache,
            cores=cores,
            effort=_effort(given),
            report=report,
            first_port=given.port,
            systems=given.systems,
        ) as bench:
            await _side_by_side(bench, [case for case in given.only if case in COMPARISONS])
            for case in given.only:
                if case in ALONE:
                    say(case)
                    await _alone(bench, case)


async def _side_by_side(bench: Bench, cases: list[str]) -> None:
    """Runs all systems at once and loads one at a time; what idle ones do costs only wall time."""
    if not cases:
        return
    async with AsyncExitStack() as stack:
        systems: list[Running] = []
        for name in dict.fromkeys(["direct", *bench.systems]):
            system = SYSTEMS[name]
            try:
                bench.report.systems[name] = await system.prepare(bench)
                running = await stack.enter_async_context(system.serve(bench))
                for load in WARM:
                    await bench.load(running, load.shortened(bench.effort.factor))
            except (Unavailable, TimeoutError) as error:
                bench.report.miss("side by side", name, error)
                continue
            systems.append(running)
            say(f"{name:10} {bench.report.systems[name]}")
        for case in cases:
            say(case)
            await compare(bench, systems, case)


async def _alone(bench: Bench, case: str) -> None:
    try:
        await ALONE[case](bench, case)
    except (Unavailable, TimeoutError) as error:
        bench.report.miss(case, "llmstream", error or "it did not end in time")


def _conclude(report: Report, out: Path) -> int:
    out.mkdir(parents=True, exist_ok=True)
    found = targets.verdicts(report)
    report.write(out / "results.json", found)
    say("targets\n" + "\n".join(targets.lines(found)))
    try:
        pictures = plots.draw(report, out)
        say(f"written: {out}/results.json" + "".join(f", {picture.name}" for picture in pictures))
    except Unavailable as error:
        say(f"written: {out}/results.json; no pictures: {error}")
    if report.faults:
        say("WRONG ANSWERS\n  " + "\n  ".join(report.faults))
    return 1 if report.faults else 0


if __name__ == "__main__":
    sys.exit(main())
