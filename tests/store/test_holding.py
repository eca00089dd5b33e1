"""What waits for its time or for the end of a pause, on a real Valkey."""

from __future__ import annotations

import asyncio
import time
from fnmatch import fnmatchcase

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmstream.config import SchedulerSettings
from llmstream.store.lane_lua import PAUSING, PRELUDE
from llmstream.store.lanes import Lanes, Pushed
from llmstream.store.pipeline import Script
from llmstream.store.store import Store
from llmstream.types import GenerateRequest, Job, Lane, QueueRule, QueueRules, new_id
from tests.waiting import wait_until

SETTINGS = SchedulerSettings()
WEEK_S = 7 * 24 * 3600


def make_job(
    model: str = "echo",
    priority: int = 0,
    principal: str = "a",
    delay_s: float | None = None,
    expires_at: float | None = None,
) -> Job:
    now = time.time()
    return Job(
        id=new_id(),
        request=GenerateRequest.of(kind="chat", model=model, body={}),
        pool="p",
        created_at=now,
        priority=priority,
        principal=principal,
        not_before=None if delay_s is None else now + delay_s,
        expires_at=expires_at,
    )


def lanes_of(store: Store, **changes: object) -> Lanes:
    return store.lanes(f"p{new_id()}", SETTINGS.model_copy(update=changes))


async def push(lanes: Lanes, *jobs: Job) -> list[str]:
    assert all(await asyncio.gather(*map(lanes.push, jobs)))
    return [job.id for job in jobs]


async def claimed(lanes: Lanes, count: int = 100) -> list[str]:
    return (await lanes.claim("r", count)).ids


def paused(version: int, *parts: tuple[Lane | None, str | None]) -> QueueRules:
    return QueueRules(version, tuple(QueueRule(mode="paused", lane=lane, model=model) for lane, model in parts))


async def store_ms(store: Store) -> int:
    seconds, micros = await store.writes.call("TIME")
    return int(seconds) * 1000 + int(micros) // 1000


async def key_ttl_ms(store: Store, lanes: Lanes, part: str) -> int:
    left: int = await store.writes.call("PTTL", lanes._key(part))
    return left


async def test_a_job_sleeps_until_its_time(store: Store) -> None:
    """However often it is looked for, a scheduled job is claimed at its time by the store's clock and not before; the
    alarm is told that time."""
    lanes = lanes_of(store)
    job = make_job(delay_s=0.1)
    assert job.not_before is not None
    await push(lanes, job)
    assert (await lanes.ripen())[1] == (await lanes.heartbeat("r", 1, 1.0, 0)).next_ms
    while True:
        before = await store_ms(store)
        _, next_ms = await lanes.ripen()
        found = await claimed(lanes)
        after = await store_ms(store)
        if found:
            break
        assert before < job.not_before * 1000
        assert next_ms is not None
        assert next_ms / 1000 == pytest.approx(job.not_before, abs=0.0011)
    assert found == [job.id]
    assert after >= job.not_before * 1000
    assert (await lanes.ripen())[1] is None


async def test_woken_jobs_go_by_priority_and_age(store: Store) -> None:
    """From its time on a job stands where one would that came then: behind more urgent ones, before later ones."""
    lanes = lanes_of(store)
    low, high = make_job(priority=-5, delay_s=0.05), make_job(priority=5, delay_s=0.05)
    late = make_job(delay_s=0.06)
    await push(lanes, late, low, high)
    start = time.monotonic()
    await wait_until(lambda: time.monotonic() - start > 0.08)
    await lanes.ripen()
    fresh = make_job()
    await push(lanes, fresh)
    assert await claimed(lanes) == [high.id, late.id, fresh.id, low.id]


async def test_a_heartbeat_wakes_what_nobody_was_there_for(store: Store) -> None:
    """A job whose time came while all replicas were away is woken by the first heartbeat."""
    lanes = lanes_of(store)
    job = make_job(delay_s=0.02)
    await push(lanes, job)
    start = time.monotonic()
    await wait_until(lambda: time.monotonic() - start > 0.06)
    pulse = await lanes.heartbeat("new", 4, 1.0, 0)
    assert pulse.next_ms is None
    fresh = make_job()
    await push(lanes, fresh)
    assert await claimed(lanes) == [job.id, fresh.id]


async def test_scheduled_jobs_are_bounded_apart_from_waiting_ones(store: Store) -> None:
    """As many may sleep as the settings say, exactly, and they take no place from those that wait; what stood there
    before is never refused."""
    lanes = lanes_of(store, max_scheduled=2, max_waiting=2)
    await push(lanes, make_job(delay_s=60), make_job(delay_s=60))
    refused = make_job(delay_s=60)
    assert await lanes.push(refused) is Pushed.TOO_MANY_SCHEDULED
    assert await lanes.push(refused, again=True) is Pushed.ACCEPTED
    await push(lanes, make_job(), make_job())
    assert await lanes.push(make_job()) is Pushed.FULL
    census = await lanes.census()
    assert (census.scheduled, sum(census.waiting.values())) == (3, 2)


async def test_a_sleeping_job_can_be_asked_for_cancelled_and_overdue(store: Store) -> None:
    """It says until when it sleeps; its deadline counts; once cancelled it leaves nothing behind."""
    lanes = lanes_of(store)
    job = make_job(delay_s=60, expires_at=time.time() - 1)
    await push(lanes, job, job)
    standing = await lanes.standing(job.id)
    assert standing.ahead is None
    assert standing.not_before == pytest.approx(job.not_before, abs=0.0011)
    pulse = await lanes.heartbeat("r", 1, 1.0, 0)
    assert pulse.overdue == [job.id]
    assert await lanes.remove(job.id)
    assert (await lanes.census()).scheduled == 0
    assert (await lanes.heartbeat("r", 1, 1.0, 0)).overdue == []


async def test_its_keys_outlive_its_sleep(store: Store) -> None:
    """Record, session and queue of a job that sleeps for a week are there a week after that, with nobody around."""
    lanes = lanes_of(store)
    job = make_job(delay_s=WEEK_S)
    await store.jobs.create(job)
    await store.jobs.join_session("demo", job)
    await push(lanes, job)
    store.owned.note(job)
    assert await store.owned.latest("a") == [job.id]
    lives = [await key_ttl_ms(store, lanes, part) for part in ("scheduled", "meta", "index")]
    keys = store.keys.job(job.id), store.keys.session("demo", "a"), store.keys.owned("a")
    lives += [await store.writes.call("PTTL", key) for key in keys]
    assert min(lives) > (2 * WEEK_S - 60) * 1000
    await store.jobs.join_session("demo", make_job())  # shortens nothing
    store.owned.note(make_job())
    assert len(await store.owned.latest("a")) == 2
    assert min([await store.writes.call("PTTL", key) for key in keys]) > (2 * WEEK_S - 60) * 1000


async def test_a_pause_holds_before_anything_was_moved(store: Store) -> None:
    """From the moment the queue has the rule no claim takes what it covers, and it stands in nobody's way."""
    lanes = lanes_of(store)
    first, second = await push(lanes, make_job("gpt-4"), make_job("gpt-5"))
    (other,) = await push(lanes, make_job("claude", priority=-10))
    await lanes.control(paused(1, (None, "gpt-*")))
    found = await lanes.claim("r", 10)
    assert (found.ids, found.left) == ([other], 0)
    await lanes.control(paused(2))
    await lanes.sweep(2)
    assert await claimed(lanes) == [first, second]


async def test_lanes_and_models_are_paused_apart(store: Store) -> None:
    """A rule with a lane and a model holds what is both; one with neither holds everything."""
    lanes = lanes_of(store)
    jobs = [make_job(model, priority) for model in ("m1", "m2") for priority in (10, 4, 3, -3, -4, -10)]
    await push(lanes, *jobs)
    await lanes.control(paused(1, ("low", "m1"), ("high", None)))
    await lanes.sweep(1)
    census = await lanes.census()
    assert (census.waiting, census.paused) == ({"high": 0, "default": 4, "low": 2}, 6)
    assert {jobs[index].id for index in (2, 3, 8, 9, 10, 11)} == set(await claimed(lanes))
    await lanes.control(paused(2, (None, None)))
    await lanes.sweep(2)
    assert await claimed(lanes) == []
    await lanes.control(paused(3))
    await lanes.sweep(3)
    assert len(await claimed(lanes)) == 6


async def test_what_comes_or_comes_back_during_a_pause_waits_aside(store: Store) -> None:
    """New jobs, released ones, those of dead replicas and those whose time has come: none is in line, all say why."""
    lanes = lanes_of(store)
    released, lapsed, left = await push(lanes, *(make_job() for _ in range(3)))
    for replica in ("releasing", "dying", "leaving"):
        await lanes.heartbeat(replica, 1, 60, 0)
        assert len((await lanes.claim(replica, 1)).ids) == 1
    await lanes.control(paused(1, (None, "echo")))
    new, sleeping = await push(lanes, make_job(), make_job(delay_s=0.01))
    await lanes.release(released, "releasing")
    await lanes.leave("leaving")
    await store.writes.call("ZADD", lanes._key("replicas"), 1, "dying")  # its lease lapsed long ago
    start = time.monotonic()
    await wait_until(lambda: time.monotonic() - start > 0.03)
    pulse = await lanes.heartbeat("r", 1, 60, 0)
    assert pulse.taken_back == 1
    census = await lanes.census()
    assert (sum(census.waiting.values()), census.paused, census.running) == (0, 5, {})
    assert (await lanes.standing(new)).paused
    assert not (await lanes.heartbeat("r", 1, 60, 0)).overdue
    await lanes.control(paused(2))
    await lanes.sweep(2)
    assert set(await claimed(lanes)) == {released, lapsed, left, new, sleeping}


async def test_a_paused_job_can_be_cancelled_and_overdue(store: Store) -> None:
    """A pause holds back neither a cancellation nor a deadline, and counts to the bound of the queue."""
    lanes = lanes_of(store, max_waiting=2)
    await lanes.control(paused(1, (None, None)))
    cancelled, overdue = await push(lanes, make_job(), make_job(expires_at=time.time() - 1))
    assert await lanes.push(make_job()) is Pushed.FULL
    assert (await lanes.heartbeat("r", 1, 1.0, 0)).overdue == [overdue]
    assert await lanes.remove(cancelled)
    assert (await lanes.census()).paused == 1


async def test_a_draining_queue_refuses_what_is_new(store: Store) -> None:
    """New jobs are refused at once, scheduled ones too; those it has are claimed, and pushing one again is fine."""
    lanes = lanes_of(store)
    job = make_job("m1")
    (known,) = await push(lanes, job)
    await lanes.control(QueueRules(1, (QueueRule(mode="draining", lane="default", model="m1"),)))
    assert await lanes.push(make_job("m1")) is Pushed.DRAINING
    assert await lanes.push(make_job("m1", delay_s=60)) is Pushed.DRAINING
    assert await lanes.push(make_job("m2")) is Pushed.ACCEPTED
    assert await lanes.push(make_job("m1", priority=10)) is Pushed.ACCEPTED
    assert await lanes.push(job) is Pushed.ACCEPTED
    assert await lanes.push(make_job("m1"), again=True) is Pushed.ACCEPTED
    assert known in await claimed(lanes)


async def test_an_older_rule_never_replaces_a_later_one(store: Store) -> None:
    """Whoever was slow to spread a change undoes nothing; a heartbeat tells which rules a queue has."""
    lanes = lanes_of(store)
    await push(lanes, make_job())
    await lanes.control(paused(7, (None, None)))
    await lanes.control(paused(6))
    assert await claimed(lanes) == []
    await lanes.sweep(6)  # of the slow one, too
    pulse = await lanes.heartbeat("r", 1, 1.0, 0)
    assert (pulse.version, pulse.swept) == (7, 0)
    await lanes.sweep(7)
    assert (await lanes.heartbeat("r", 1, 1.0, 0)).swept == 7


async def test_many_are_moved_in_pages(store: Store) -> None:
    """More jobs than one step looks at, with equal turns among them, are put aside and come back in their order."""
    lanes = lanes_of(store)
    await push(lanes, *(make_job(principal=f"p{number % 3}") for number in range(1300)))
    expected = [job_id for _ in range(3) for job_id in (await claimed(lanes, 1))]
    for job_id in expected:
        await lanes.release(job_id, "r")
    await lanes.control(paused(1, (None, None)))
    await lanes.sweep(1)
    assert (await lanes.census()).paused == 1300
    await lanes.control(paused(2))
    await lanes.sweep(2)
    found = await claimed(lanes, 1300)
    assert len(set(found)) == 1300
    assert found[:3] == expected


STEPS = st.lists(
    st.one_of(
        st.builds(make_job, st.sampled_from(["m1", "m2"]), st.sampled_from([-10, 0, 10]), st.sampled_from("ab")),
        st.builds(
            QueueRule,
            mode=st.just("paused"),
            lane=st.sampled_from([None, "high", "low"]),
            model=st.sampled_from([None, "m1", "m*"]),
        ),
        st.sampled_from(["resume", "claim"]),
    ),
    max_size=25,
)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS, swept=st.booleans())
async def test_pauses_lose_and_reorder_nothing(store: Store, steps: list[Job | QueueRule | str], swept: bool) -> None:
    """Whatever is pushed, paused, resumed and claimed: no claim goes against a rule, whether what waits was looked
    through since or not, and in the end every job is claimed once, those of one kind and principal in order."""
    lanes = lanes_of(store, ageing_s=1e9)
    version, rules, order, jobs = 0, list[QueueRule](), list[str](), dict[str, Job]()
    for step in [*steps, "resume"]:
        if isinstance(step, Job):
            jobs[step.id] = step
            await push(lanes, step)
        elif step == "claim":
            found = await claimed(lanes, 2)
            assert not any(rule.covers(jobs[job_id]) for rule in rules for job_id in found)
            order += found
        else:
            rules = [*rules, step] if isinstance(step, QueueRule) else []
            version += 1
            await lanes.control(QueueRules(version, tuple(rules)))
            if swept or not rules:
                await lanes.sweep(version)
    rest = await claimed(lanes)
    order += rest
    assert sorted(order) == sorted(jobs)
    priorities = [jobs[job_id].priority for job_id in rest]
    assert priorities == sorted(priorities, reverse=True)
    kinds = {job_id: (job.priority, job.principal, job.request.model) for job_id, job in jobs.items()}
    for kind in set(kinds.values()):
        assert [each for each in order if kinds[each] == kind] == [each for each in jobs if kinds[each] == kind]


FITS = Script("fits", PRELUDE + PAUSING + "return fits(ARGV[1], ARGV[2]) and 1 or 0")


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pattern=st.text("ab*?-.", min_size=1, max_size=12), name=st.text("ab-.%", max_size=12))
async def test_the_store_reads_patterns_as_we_do(store: Store, pattern: str, name: str) -> None:
    """A pattern covers the same models in the store's scripts and here."""
    found = await store.writes.run(FITS, store.keys.queue("p"), pattern, name)
    assert bool(found) == fnmatchcase(name, pattern)


async def test_alive_tells_what_waits_and_runs(store: Store) -> None:
    """All jobs of a queue are found in pages, with the words they came with, also odd ones."""
    lanes = lanes_of(store)
    jobs = [make_job(f"a|b%7C{number}", number % 21 - 10, principal="x|%y") for number in range(700)]
    jobs.append(make_job(delay_s=60))
    ids = await push(lanes, *jobs)
    running = await claimed(lanes, 5)
    found = {job.id: job async for page in lanes.alive() for job in page}
    assert found.keys() == set(ids)
    assert {job.id for job in found.values() if job.running} == set(running)
    for job in jobs:
        lives = found[job.id]
        assert (lives.model, lives.principal, lives.priority) == (job.request.model, job.principal, job.priority)


async def test_turns_outlive_an_empty_line(store: Store) -> None:
    """While jobs wait aside the line may run empty: who comes later still stands behind them."""
    lanes = lanes_of(store)
    await lanes.control(paused(1, (None, "m1")))
    early = await push(lanes, make_job("m1"), make_job("m1"))
    (free,) = await push(lanes, make_job("m2"))
    assert await claimed(lanes) == [free]
    late = await push(lanes, make_job("m1"))
    await lanes.control(paused(2))
    await lanes.sweep(2)
    assert await claimed(lanes) == early + late
