"""Whom the clients ask: the echo model, remote providers that fail, SmolLM2; and what each says undisturbed."""

from __future__ import annotations

import itertools
import random
from collections import deque
from collections.abc import Callable, Sequence

from tests.chaos.cases import Ask
from tests.chaos.fleet import Answer, Fleet, Question
from tests.chaos.truths import answer_in
from tests.logs import stored
from tests.replica import tokens
from tests.upstream import Reply, Upstream
from tests.weights_fixture import smollm2_weights

SLOTS = 24
"""Any one replica could run everything: a take-over never waits for a slot."""
STALL_S = 0.8

ECHO = {
    "models.echo.engine": "echo",
    "models.echo.slots": SLOTS,
    "models.echo.delay_ms": 20,
    "scheduler.max_attempts": 50,  # one answer may be hit by many kills in a row
    "server.shutdown_grace_s": 10,
}
SMOLLM2_TOKENS = 64
THEMES = ("a lighthouse", "a fox", "the sea", "a clock", "an old map", "two brothers")


def smollm2() -> dict[str, object]:
    return {"models.smollm2.source": smollm2_weights(), "models.smollm2.slots": len(THEMES)}


def remote(upstream: Upstream) -> dict[str, object]:
    """Two providers behind one API: one can go on from a prefill, the other only start over."""
    return {
        "providers.prefill.base_url": upstream.url,
        "providers.prefill.models": "prefill",
        "providers.prefill.continue_by": "assistant_prefill",
        "providers.plain.base_url": upstream.url,
        "providers.plain.models": "plain",
        "breaker.failures": 1_000_000,  # every job is to meet its faults
        "deadlines.first_token_s": STALL_S,
        "deadlines.stall_s": STALL_S,
    }


async def undisturbed(fleet: Fleet, question: Question) -> list[str]:
    """What a model says when nothing happens, token by token from its log."""
    answer = Answer(fleet, question, random.Random(0))
    await answer.ask()
    await answer.read()
    async with fleet.inside() as store:
        return [text for _, text in answer_in(await stored(store, answer.job_id))]


async def echo(fleet: Fleet, shortest: int, longest: int) -> Ask:
    """Questions whose answers are beginnings of one undisturbed run."""

    def question(length: int, **options: object) -> Question:
        body = {"message": "count", "model": "echo", "echo": {"tokens": length, **options}}
        return Question(body, whole[:length])

    whole: list[str] = []
    whole = await undisturbed(fleet, question(longest, delay_ms=0))
    assert "".join(whole) == tokens(longest)
    return lambda rng: question(rng.randint(shortest, longest))


async def stories(fleet: Fleet, count: int) -> Ask:
    """So many questions to SmolLM2, each with its own undisturbed greedy answer."""
    told: list[Question] = []
    for theme in THEMES[:count]:
        body = {"message": f"Tell me a long story about {theme}.", "model": "smollm2", "temperature": 0}
        asked = Question({**body, "max_tokens": SMOLLM2_TOKENS}, (), "incomplete", SMOLLM2_TOKENS)
        told.append(Question(asked.body, await undisturbed(fleet, asked), asked.status, asked.length))
    turns = itertools.cycle(told)
    return lambda rng: next(turns)


Faults = Callable[[random.Random], Sequence[Reply]]
"""Makes what a provider does to the requests of one job in turn."""
WORDS = tuple(f" word{number}" for number in range(40))
WHOLE = Reply(WORDS, prefill=True)
SLOWLY = Reply(WORDS, prefill=True, delay_s=0.02)
STORM = Reply(status=429, headers={"Retry-After": "0.2"}, body={"error": {"message": "slow down"}})


def hangs(rng: random.Random) -> Sequence[Reply]:
    return [Reply(WORDS, fault="stall", at=rng.choice((0, rng.randint(1, 39)))), WHOLE]


def cuts(rng: random.Random) -> Sequence[Reply]:
    first = Reply(WORDS, fault="cut", at=rng.randint(1, 30))
    return [first, Reply(WORDS, prefill=True, fault="reset", at=rng.randint(1, 9)), WHOLE]


def storms(rng: random.Random) -> Sequence[Reply]:
    return rng.choice(([STORM, STORM, WHOLE], [Reply(WORDS, fault="cut", at=rng.randint(1, 39)), STORM, WHOLE]))


def cuts_for_good(rng: random.Random) -> Sequence[Reply]:
    return [Reply(WORDS, prefill=True, fault="cut", at=rng.randint(1, 9)) for _ in range(3)]


FAULTS: Sequence[tuple[str, Faults, str]] = (
    ("hangs", hangs, "completed"),
    ("cuts", cuts, "completed"),
    ("storms 429", storms, "completed"),
    ("cuts for good", cuts_for_good, "failed"),
)


def slowly(rng: random.Random) -> Sequence[Reply]:
    return [SLOWLY, SLOWLY, SLOWLY]


def to_provider(upstream: Upstream, model: str, faults: Faults, status: str = "completed") -> Ask:
    """Questions that each meet their own faults."""

    def ask(rng: random.Random) -> Question:
        message = f"question {len(upstream.scripts)}"
        upstream.scripts[message] = deque(faults(rng))
        return Question({"message": message, "model": model}, WORDS, status)

    return ask
