"""The table: what became of the answers of each case."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from llmstream.store.store import Store
from llmstream.types import Delta, Event
from tests.chaos.fleet import Answer, Fleet
from tests.chaos.reader import Piece
from tests.chaos.truths import Difference, against_log, answer_in, attempts_in, difference, ends_in
from tests.logs import stored
from tests.waiting import wait_until

ENDS = {"completed": "complete", "incomplete": "complete", "failed": "error"}
"""How a client is told of each end of a job."""


@dataclass
class Row:
    """One line of the table, over all rounds of a case."""

    case: str
    rounds: int = 0
    kills: int = 0
    jobs: int = 0
    retries: int = 0
    """Attempts after a job's first one."""
    handed_over: int = 0
    """Of these, the ones that a replica asked for when it was told to end."""
    reconnects: int = 0
    """Connections after a client's first one."""
    restarts: int = 0
    lost: int = 0
    doubled: int = 0
    unfinished: int = 0
    """Jobs without the one end they should have, for their client and on record, and models that still run."""
    takeovers: list[float] = field(default_factory=list)
    """Seconds without a token, each time that a client's answer went on from elsewhere."""
    alike: int = 0
    """Answers of a real model that equal its undisturbed one to the last token."""
    notes: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    """What else was not as it has to be."""

    @property
    def clean(self) -> bool:
        return not (self.lost or self.doubled or self.unfinished or self.wrong)

    @property
    def crashes(self) -> int:
        """Attempts that ended without an end and without a hand-over."""
        return self.retries - self.handed_over

    def percentile(self, share: float) -> float | None:
        times = sorted(self.takeovers)
        return times[int(len(times) * share)] if times else None

    def __str__(self) -> str:
        counts = (self.rounds, self.kills, self.jobs, self.retries, self.reconnects, self.restarts)
        outcome = (self.lost, self.doubled, self.unfinished)
        p50, p99 = ("-" if (seconds := self.percentile(share)) is None else f"{seconds:.2f}" for share in (0.5, 0.99))
        line = _LINE.format(self.case, *counts, *outcome, p50, p99)
        return "\n".join([line, *(f"    {words}" for words in (*self.notes, *self.wrong))])

    async def add(self, fleet: Fleet, answers: Sequence[Answer]) -> None:
        """Compares every answer with its log and with what an undisturbed model says."""
        async with fleet.inside() as store:
            for answer in answers:
                await self._add(store, answer)
        self.unfinished += await _left_running(fleet)

    async def _add(self, store: Store, answer: Answer) -> None:
        question, reader = answer.question, answer.reader
        log, state = await stored(store, answer.job_id), await store.jobs.find(answer.job_id)
        for lost, doubled in (against_log(reader.pieces, log), _against_model(answer, log)):
            self.lost += lost
            self.doubled += doubled
        recorded = state is not None and state.status == question.status
        ended = recorded and ends_in(log) == [question.status] and reader.end == ENDS[question.status]
        self.unfinished += not ended
        self.alike += question.length is not None and _said(log) == question.tokens
        self.jobs += 1
        self.retries += attempts_in(log) - 1
        self.handed_over += int(await store.writes.call("HGET", store.keys.job(answer.job_id), "handed_over") or 0)
        self.reconnects += reader.connections - 1
        self.restarts += reader.restarts
        self.takeovers += [b.at - a.at for a, b in pairwise(reader.heard) if _elsewhere(a, b)]


_LINE = "{:40}{:>7}{:>6}{:>6}{:>8}{:>8}{:>9}{:>6}{:>8}{:>11}{:>7}{:>7}"
HEAD = _LINE.format(
    *("case", "rounds", "kills", "jobs", "retries", "reconn.", "restarts"),
    *("lost", "doubled", "unfinished", "p50 s", "p99 s"),
)


def total(rows: Sequence[Row]) -> Row:
    """The rows in which processes were killed, as one."""
    whole = Row("all kills")
    for row in rows:
        if row.kills:
            for name in (
                "rounds",
                "kills",
                "jobs",
                "retries",
                "reconnects",
                "restarts",
                "lost",
                "doubled",
                "unfinished",
            ):
                setattr(whole, name, getattr(whole, name) + getattr(row, name))
            whole.takeovers += row.takeovers
    return whole


def _elsewhere(before: Piece, after: Piece) -> bool:
    return (before.id.attempt, before.connection) != (after.id.attempt, after.connection)


def _against_model(answer: Answer, log: Sequence[Event]) -> Difference:
    """Compares an answer that ended well with the undisturbed one; what failed has to be the beginning of it."""
    question = answer.question
    if question.length is not None:
        produced = sum(len(event.data.tokens) for event in log if isinstance(event.data, Delta))
        return Difference(max(0, question.length - produced), max(0, produced - question.length))
    said = _said(log)
    return difference(said, question.tokens if question.status == "completed" else question.tokens[: len(said)])


def _said(log: Sequence[Event]) -> list[str]:
    return [text for _, text in answer_in(log)]


async def _left_running(fleet: Fleet) -> int:
    """Models that still generate a moment after the last job ended."""
    left = 0

    async def none() -> bool:
        nonlocal left
        left = sum([await replica.generating() for replica in fleet.replicas])
        return left == 0

    try:
        await wait_until(none, timeout=5)
    except TimeoutError:
        return left
    return 0
