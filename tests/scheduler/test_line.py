"""Memory jobs wait in the same order as logged ones."""

from __future__ import annotations

import math
import time
from itertools import count

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from llmstream.config import SchedulerSettings
from llmstream.scheduler.line import Line
from llmstream.store.store import Store
from llmstream.types import GenerateRequest, Job, new_id

REQUEST = GenerateRequest.of(kind="chat", model="echo", body={})
STEPS = st.lists(
    st.one_of(
        st.tuples(st.integers(-10, 10), st.sampled_from("abc")),
        st.just("serve"),
        st.integers(0, 50),  # one of those that wait gives up
    ),
    max_size=40,
)


def make_job(number: int = 0, priority: int = 0, principal: str = "a", expires_at: float | None = None) -> Job:
    return Job(
        id=f"{number:05d}",
        request=REQUEST,
        pool="p",
        created_at=time.time(),
        priority=priority,
        principal=principal,
        expires_at=expires_at,
    )


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS)
@example(steps=[(0, "a"), 0, (0, "a"), (0, "b")])
async def test_the_order_is_the_stores(store: Store, steps: list[tuple[int, str] | str | int]) -> None:
    """Whatever comes, is served and leaves, the line serves the same jobs in the same order as a lane in the store, and
    counts the same ones ahead of each."""
    lanes = store.lanes(f"p{new_id()}", SchedulerSettings())
    line, numbers = Line(SchedulerSettings().ageing_s), count()
    for step in [*steps, *["serve"] * len(steps)]:
        if isinstance(step, tuple):
            job = make_job(next(numbers), *step)
            await lanes.push(job)
            seconds, micros = await store.writes.call("TIME")
            line.push(job, int(seconds) * 1000 + int(micros) // 1000)
        elif step == "serve":
            for job_id in line.ids[-2:]:
                found = line.standing(job_id)
                assert found is not None
                assert found[0] == (await lanes.standing(job_id)).ahead
            expected = (await lanes.claim("r", 1)).ids
            assert ([line.pop()] if line else []) == expected
        elif line:
            gone = line.ids[int(step) % len(line)]
            await lanes.remove(gone)
            line.remove(gone)
    assert not line
    assert line.urgency == math.inf


def test_waiting_makes_urgent() -> None:
    """A step of priority is worth ``ageing_s`` seconds of waiting, here as in the store."""
    line = Line(ageing_s=10)
    line.push(make_job(1, priority=-1), 0)
    line.push(make_job(2, priority=0), 9_000)
    assert line.pop() == "00002"
    line.push(make_job(3, priority=0), 11_000)
    assert [line.pop(), line.pop()] == ["00001", "00003"]


async def test_the_store_yields_to_what_is_more_urgent(store: Store) -> None:
    """A claim takes only what comes before the caller's own job, says how urgent the next one is, and counts who is
    ahead of a job that waits elsewhere."""
    lanes = store.lanes(f"p{new_id()}", SchedulerSettings())
    for number, priority in enumerate((5, 0, -5)):
        assert await lanes.push(make_job(number, priority))
    seconds, _ = await store.writes.call("TIME")
    now = int(seconds) * 1000
    own = now + 1_000 + (10 - 3) * 10_000  # priority 3
    assert (await lanes.standing("", own)).ahead == 1
    claimed = await lanes.claim("r", 9, own)
    assert (claimed.ids, claimed.left) == (["00000"], 2)
    assert own < claimed.first_left <= now + 1_000 + 10 * 10_000
    rest = await lanes.claim("r", 9)
    assert (rest.ids, rest.left, rest.first_left) == (["00001", "00002"], 0, math.inf)


def test_overdue() -> None:
    """Jobs whose deadline has passed are found; the others wait on."""
    line = Line(ageing_s=10)
    for number, deadline in enumerate((None, 5.0, 7.0)):
        line.push(make_job(number, expires_at=deadline), number)
    assert line.overdue(6.0) == ["00001"]


def test_paused_jobs_keep_their_places() -> None:
    """What is paused is not served, whether it came before or after the pause; it can leave; resumed, the order is as
    if nothing had been."""
    line, paused = Line(ageing_s=10), make_job(1)
    for number in (1, 2, 3, 4):
        line.push(make_job(number), number)
    line.hold(lambda job: job.id in ("00001", "00003", "00005"))
    line.push(make_job(5), 5)
    assert line.aside == {"00001", "00003", "00005"}
    assert line.standing(paused.id) is None
    assert [line.pop(), line.pop()] == ["00002", "00004"]
    assert (line.urgency, len(line)) == (math.inf, 3)
    line.remove("00003")
    line.hold(lambda job: False)
    assert [line.pop(), line.pop()] == ["00001", "00005"]
    assert not line.aside
