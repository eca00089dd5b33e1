"""All cases in order. The short form plays most of them once; the long form plays the kills until there were enough."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from llmstream.routing.targets import REMOTE
from tests.chaos import models
from tests.chaos.cases import (
    CRASHED,
    KILL_BOTH,
    KILL_GENERATING,
    KILL_SERVING,
    MOVED,
    PARTED,
    RESTARTED,
    RETRIED,
    SILENT,
    Trouble,
    all_at_once,
    one_after_the_other,
    plan,
    roll,
    run_case,
    under_load,
    without_store,
)
from tests.chaos.fleet import Fleet, open_fleet
from tests.chaos.row import Row
from tests.conftest import assert_every_key_expires
from tests.replica import MODEL
from tests.upstream import Upstream


class Table:
    """Rows as they come; ``say`` hears of each, and of each kill that comes on its own."""

    def __init__(
        self, *, seed: int, kills: int = 0, longest: int = 60, outage_s: float = 1.0, say: Callable[[str], None]
    ) -> None:
        self.rows: list[Row] = []
        self._seed = seed
        self._quarter = kills // 4
        """Kills of one kind: the generating replica, the serving one, both, anyone in turn. 0: the short form."""
        self._longest = longest
        self._outage_s = outage_s
        self._say = say

    async def echo(self, folder: Path, jobs: int = 16) -> None:
        """Three replicas with the echo model."""
        async with open_fleet(folder, models.ECHO) as fleet:
            ask = await models.echo(fleet, self._longest // 2, self._longest)
            for case in (KILL_GENERATING, KILL_SERVING, KILL_BOTH):
                rounds = max(1, self._quarter // case.victims)
                self._add(await run_case(case, fleet, MODEL, ask, seed=self._seed, rounds=rounds, jobs=jobs))
            for case in (*PARTED, SILENT) if self._quarter else PARTED:
                self._add(await run_case(case, fleet, MODEL, ask, seed=self._seed, rounds=1, jobs=jobs))
            for name, trouble, never in (
                ("kill -9 the store, start it", without_store(0), RESTARTED),
                (f"no store for {self._outage_s:g} s", without_store(self._outage_s), RESTARTED),
                ("rolling restart of all", roll, RESTARTED | CRASHED),
                ("kill -9 one after the other", self._churn(fleet), RESTARTED),
            )[: None if self._quarter else -1]:
                self._add(await under_load(name, fleet, trouble, ask, seed=self._seed, clients=jobs, never=never))
            await _nothing_stays(fleet)

    async def providers(self, folder: Path, jobs: int = 16) -> None:
        """Two replicas and a remote API that fails: for a provider that can go on from a prefill, and for one that
        cannot, so that its answers have to start over."""
        async with Upstream() as upstream, open_fleet(folder, models.remote(upstream), count=2) as fleet:
            for model, never, due in (("prefill", RESTARTED, RETRIED), ("plain", frozenset(), RETRIED | RESTARTED)):
                for what, faults, status in models.FAULTS:
                    ask, name = models.to_provider(upstream, model, faults, status), f"provider {what}, {model}"
                    self._add(await all_at_once(name, fleet, ask, seed=self._seed, jobs=jobs, never=never, due=due))
                ask = models.to_provider(upstream, model, models.slowly)
                case = replace(KILL_GENERATING, name=f"kill -9 generating, {model}", never=never | MOVED, due=due)
                self._add(await run_case(case, fleet, REMOTE, ask, seed=self._seed, rounds=1, jobs=jobs))
            await _nothing_stays(fleet)

    async def smollm2(self, folder: Path, jobs: int = 2, rounds: int = 1) -> None:
        """Two replicas with SmolLM2, whose answers go on token by token where they were cut."""
        async with open_fleet(folder, models.smollm2(), count=2) as fleet:
            ask = await models.stories(fleet, jobs)
            case = replace(KILL_GENERATING, name="kill -9 generating, SmolLM2")
            row = await run_case(case, fleet, "smollm2", ask, seed=self._seed, rounds=rounds, jobs=jobs)
            row.notes.append(f"{row.alike} of {row.jobs} answers are the undisturbed greedy ones to the last token")
            self._add(row)
            await _nothing_stays(fleet)

    def _churn(self, fleet: Fleet) -> Trouble:
        return one_after_the_other(plan(self._seed, self._quarter, len(fleet.replicas)), self._say)

    def _add(self, row: Row) -> None:
        self.rows.append(row)
        self._say(str(row))


async def _nothing_stays(fleet: Fleet) -> None:
    async with fleet.inside() as store:
        await assert_every_key_expires(store)
