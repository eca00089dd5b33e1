"""One job's life: every fault ends in one truthful terminal event."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import pytest

from llmstream.config import DeadlineSettings, RetrySettings
from llmstream.errors import EngineCrashed, Fenced, ShuttingDown, UpstreamBroken, UpstreamLimited
from llmstream.filters.filters import Filters
from llmstream.providers.base import Provider
from llmstream.routing.retry import Backoff
from llmstream.routing.router import Router
from llmstream.scheduler import worker as worker_module
from llmstream.scheduler.worker import Result, Worker
from llmstream.store.store import Store
from llmstream.transcript import Transcript
from llmstream.types import Delta, Event, Finished, GenerateRequest, Job, Restart, Started
from tests.logs import begin, finished, stored, text_of
from tests.proxy import distant
from tests.replica import Scripted, echo, gates_of, submit, tokens
from tests.waiting import wait_until

LENGTH = 12


class Clock:
    """The wall clock, in the test's hands."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def make_worker(
    store: Store,
    job: Job,
    provider: Provider | None = None,
    *,
    max_attempts: int = 3,
    pause_s: float = 0.01,
    clock: Any = time.time,
    filters: Filters | None = None,
    **limits: float,
) -> Worker:
    return Worker(
        job.id,
        0,
        replica="r1",
        jobs=store.jobs,
        log=store.log,
        router=Router([provider or echo()]),
        gates=gates_of(store),
        deadlines=DeadlineSettings.model_validate(limits),
        max_attempts=max_attempts,
        backoff=Backoff(RetrySettings(base_s=pause_s, cap_s=pause_s), chance=lambda: 1.0),
        clock=clock,
        filters=filters,
    )


async def ending(store: Store, job: Job) -> tuple[list[Event], Finished]:
    """The log, and its terminal event, which is the only one and agrees with the record."""
    log = await stored(store, job.id)
    ends = [event.data for event in log if isinstance(event.data, Finished)]
    assert len(ends) == 1
    assert log[-1].data is ends[0]
    state = await store.jobs.get(job.id)
    assert (state.status, state.failure) == (ends[0].status, ends[0].failure)
    return log, ends[0]


def attempts_in(log: list[Event]) -> int:
    return sum(isinstance(event.data, Started) for event in log)


@pytest.mark.parametrize("at", [0, 5, LENGTH])
@pytest.mark.parametrize("fault", ["crash", "cut"])
async def test_a_fault_that_passes_costs_an_attempt(store: Store, fault: str, at: int) -> None:
    """After a crash or a cut the next attempt goes on from the last logged token: nothing lost, nothing said twice."""
    job = await submit(store, tokens=LENGTH, fault=fault, at=at, attempts=2)
    assert await make_worker(store, job).run() == "done"
    log, end = await ending(store, job)
    assert (end.status, attempts_in(log), text_of(log)) == ("completed", 3, tokens(LENGTH))
    assert not any(isinstance(event.data, Restart) for event in log)
    assert end.usage is not None
    assert end.usage.completion_tokens == LENGTH


@pytest.mark.parametrize("at", [0, 5, LENGTH])
@pytest.mark.parametrize(
    ("fault", "attempts", "code"),
    [
        ("crash", 3, "engine_crashed"),
        ("cut", 3, "upstream_broken"),
        ("error", 1, "provider_error"),
        ("reject", 1, "upstream_rejected"),
    ],
)
async def test_a_fault_that_stays_fails_the_job(store: Store, fault: str, attempts: int, code: str, at: int) -> None:
    """A fault that never passes ends in ``failed`` with its code, after all attempts where trying again can help; what
    was produced is kept."""
    job = await submit(store, tokens=LENGTH, fault=fault, at=at)
    assert await make_worker(store, job).run() == ("dead" if attempts == 3 else "done")
    log, end = await ending(store, job)
    assert end.failure is not None
    assert (end.status, end.failure.code, attempts_in(log), text_of(log)) == ("failed", code, attempts, tokens(at))


@pytest.mark.parametrize("at", [0, 5, LENGTH])
async def test_a_stall_is_noticed(store: Store, at: int) -> None:
    """A model that falls silent loses the attempt at the deadline for its next token; the next one goes on."""
    job = await submit(store, tokens=LENGTH, fault="stall", at=at, attempts=1)
    worker = make_worker(store, job, first_token_s=0.05, stall_s=0.05)
    task = asyncio.create_task(worker.run())
    await wait_until(lambda: _has_said(store, job, at))

    def noticed() -> bool:
        worker.check_deadlines()
        return worker._interruption is not None

    await wait_until(noticed)
    assert await task == "done"
    log, end = await ending(store, job)
    assert (end.status, attempts_in(log), text_of(log)) == ("completed", 2, tokens(LENGTH))


async def test_a_stall_for_good(store: Store) -> None:
    """A model that falls silent in every attempt fails the job and says so."""
    job = await submit(store, tokens=LENGTH, fault="stall", at=5)
    worker = make_worker(store, job, first_token_s=0.05, stall_s=0.05)
    task = asyncio.create_task(worker.run())
    await wait_until(lambda: _has_said(store, job, 5))
    await with_heartbeats(worker, task)
    log, end = await ending(store, job)
    assert end.failure is not None
    assert (end.status, end.failure.code, text_of(log)) == ("failed", "upstream_timeout", tokens(5))
    assert "no first token within 0.05 s" in end.failure.message


async def with_heartbeats(worker: Worker, task: asyncio.Task[Result]) -> Result:
    def look() -> bool:
        worker.check_deadlines()
        return task.done()

    await wait_until(look)
    return await task


@pytest.mark.parametrize("at", [0, 5])
async def test_the_total_deadline(store: Store, at: int) -> None:
    """A job that is not done at its total deadline fails with what it has, whatever its model does."""
    clock = Clock()
    job = await submit(store, tokens=LENGTH, fault="stall", at=at)
    worker = make_worker(store, job, clock=clock, total_s=300.0)
    task = asyncio.create_task(worker.run())
    await wait_until(lambda: _has_said(store, job, at))
    clock.now += 299
    worker.check_deadlines()
    await asyncio.sleep(0)
    assert not task.done()
    clock.now += 2
    worker.check_deadlines()
    assert await task == "done"
    log, end = await ending(store, job)
    assert end.failure is not None
    assert (end.status, end.failure.code, text_of(log)) == ("failed", "deadline_exceeded", tokens(at))


async def _has_said(store: Store, job: Job, count: int) -> bool:
    log = await stored(store, job.id)
    return bool(log) and text_of(log) == tokens(count)


async def test_the_total_deadline_counts_from_the_first_attempt(store: Store) -> None:
    """Attempts of other replicas use up the same time."""
    clock = Clock()
    job = await submit(store, tokens=LENGTH, fault="stall")
    await store.jobs.begin(job.id, Started(replica="dead", at=clock.now), 3, 0)
    clock.now += 301
    worker = make_worker(store, job, clock=clock, total_s=300.0)
    assert await with_heartbeats(worker, asyncio.create_task(worker.run())) == "done"
    _, end = await ending(store, job)
    assert end.failure is not None
    assert end.failure.code == "deadline_exceeded"


async def test_the_deadline_of_the_request(store: Store) -> None:
    """A running job is ended at the deadline that its request asked for."""
    clock = Clock()
    job = await submit(store, tokens=LENGTH, fault="stall", at=3, expires_at=clock.now + 10)
    worker = make_worker(store, job, clock=clock)
    task = asyncio.create_task(worker.run())
    await wait_until(lambda: _has_said(store, job, 3))
    clock.now += 11
    worker.check_deadlines()
    assert await task == "done"
    log, end = await ending(store, job)
    assert end.failure is not None
    assert (end.failure.code, text_of(log)) == ("deadline_exceeded", tokens(3))


async def test_the_deadline_passes_in_a_pause(store: Store) -> None:
    """A deadline that passes between two attempts ends the job as ``deadline_exceeded``; a silent pause is no stall."""
    clock = Clock()
    paused = asyncio.Event()

    async def generate(request: GenerateRequest, so_far: Transcript | None) -> AsyncGenerator[Sequence[Delta], None]:
        yield [Delta(text="a", tokens=(0,))]
        paused.set()
        raise UpstreamLimited("Later.", retry_after=1000)

    job = await submit(store)
    worker = make_worker(store, job, Scripted(generate), clock=clock, total_s=300.0, stall_s=0.001, first_token_s=0.001)
    task = asyncio.create_task(worker.run())
    await paused.wait()
    await wait_until(
        lambda: worker._scope is not None and worker._intake is not None and worker._intake.silent_since is None
    )
    start = asyncio.get_running_loop().time()
    await wait_until(lambda: asyncio.get_running_loop().time() > start + 0.01)
    worker.check_deadlines()
    await asyncio.sleep(0)
    assert not task.done()
    clock.now += 301
    worker.check_deadlines()
    assert await task == "done"
    log, end = await ending(store, job)
    assert end.failure is not None
    assert (end.failure.code, text_of(log)) == ("deadline_exceeded", "a")


async def test_what_cannot_be_continued_starts_over_visibly(store: Store) -> None:
    """Where a provider cannot continue, the next attempt says ``restart`` before its first word."""
    runs = 0

    async def generate(request: GenerateRequest, so_far: Transcript | None) -> AsyncGenerator[Sequence[Delta], None]:
        nonlocal runs
        runs += 1
        assert so_far is None
        yield [Delta(text=f"try {runs}")]
        if runs < 3:
            raise UpstreamBroken("Cut.")
        yield [Delta(finish_reason="stop")]

    job = await submit(store)
    assert await make_worker(store, job, Scripted(generate)).run() == "done"
    log, end = await ending(store, job)
    kinds = [type(event.data).__name__ for event in log if not isinstance(event.data, Started)]
    assert kinds == ["Delta", "Restart", "Delta", "Restart", "Delta", "Delta", "Finished"]
    assert (Transcript(log).text, end.status) == ("try 3", "completed")


async def test_a_log_that_was_lost_starts_over_visibly(store: Store) -> None:
    """Where the store has lost what earlier attempts wrote, readers who saw it are told to start over."""
    job = await submit(store, tokens=LENGTH)
    await begin(store, job)
    await store.writes.call("DEL", store.keys.log(job.id))
    assert await make_worker(store, job).run() == "done"
    log, _ = await ending(store, job)
    assert [type(event.data) for event in log[:2]] == [Started, Restart]
    assert Transcript(log).text == tokens(LENGTH)


async def test_an_answer_that_only_lacks_its_end_is_not_generated_again(store: Store) -> None:
    """When an attempt logged the whole answer and died before finishing, the next one only finishes."""
    job = await submit(store)
    begun = await begin(store, job)
    writer = store.log.writer(begun)
    writer.append(Delta(text="whole", finish_reason="length"), 10)
    await writer.flush()
    writer.close()

    async def generate(request: GenerateRequest, so_far: Transcript | None) -> AsyncGenerator[Sequence[Delta], None]:
        yield [Delta(text="asked again")]

    assert await make_worker(store, job, Scripted(generate)).run() == "done"
    log, end = await ending(store, job)
    assert (text_of(log), end.status, end.reason) == ("whole", "incomplete", "length")


@pytest.mark.parametrize("error", [KeyError("x"), RuntimeError("y"), asyncio.CancelledError()])
async def test_a_provider_that_breaks(store: Store, error: BaseException) -> None:
    """An exception nobody expected fails the job with its partial output, and only the job."""

    async def generate(request: GenerateRequest, so_far: Transcript | None) -> AsyncGenerator[Sequence[Delta], None]:
        yield [Delta(text="part")]
        raise error

    job = await submit(store)
    result = await make_worker(store, job, Scripted(generate), max_attempts=1).run()
    log, end = await ending(store, job)
    assert (text_of(log), end.status) == ("part", "failed")
    assert end.failure is not None
    assert result == ("dead" if end.failure.retryable else "done")


async def test_a_stream_without_an_end_is_not_completed(store: Store) -> None:
    """A provider that stops without a finish reason is reported as broken."""

    async def generate(request: GenerateRequest, so_far: Transcript | None) -> AsyncGenerator[Sequence[Delta], None]:
        yield [Delta(text="part")]

    job = await submit(store)
    await make_worker(store, job, Scripted(generate), max_attempts=1).run()
    _, end = await ending(store, job)
    assert end.failure is not None
    assert end.failure.code == "upstream_broken"


async def test_exhausted_attempts_keep_the_partial_output(store: Store) -> None:
    """A job whose replicas died too often fails with ``attempts_exhausted`` and keeps what was logged."""
    job = await submit(store, tokens=LENGTH)
    for word in ("one ", "two "):
        writer = store.log.writer(await begin(store, job))
        writer.append(Delta(text=word), 4)
        await writer.flush()
        writer.close()
    assert await make_worker(store, job, max_attempts=2).run() == "dead"
    log, end = await ending(store, job)
    assert end.failure is not None
    assert (end.failure.code, text_of(log)) == ("attempts_exhausted", "one two ")


async def test_hand_overs_leave_all_attempts(store: Store) -> None:
    """After any number of hand-overs a job still has every attempt it was promised."""
    job = await submit(store, tokens=LENGTH, fault="crash", at=7, attempts=2)
    for _ in range(5):
        begun = await begin(store, job, max_attempts=3)
        await store.jobs.hand_over(job.id, begun.attempt)
    assert await make_worker(store, job).run() == "done"
    log, end = await ending(store, job)
    assert (end.status, text_of(log)) == ("completed", tokens(LENGTH))


async def test_cancelling_a_running_job(store: Store) -> None:
    """A cancelled job's model stops, and the log keeps what was said and one ``cancelled``."""
    job = await submit(store, tokens=LENGTH, fault="stall", at=4)
    provider = echo()
    worker = make_worker(store, job, provider)
    task = asyncio.create_task(worker.run())
    await wait_until(lambda: _has_said(store, job, 4))
    await store.jobs.end(job.id, finished("cancelled"))
    worker.interrupt(Fenced("cancelled"))
    assert await task == "done"
    assert provider.running == 0
    log, end = await ending(store, job)
    assert (end.status, text_of(log)) == ("cancelled", tokens(4))


async def test_cancelling_between_claim_and_beginning(store: Store) -> None:
    """A job cancelled before its worker began is never generated."""
    job = await submit(store, tokens=LENGTH)
    await store.jobs.end(job.id, finished("cancelled"))
    assert await make_worker(store, job).run() == "done"
    log, end = await ending(store, job)
    assert (end.status, attempts_in(log)) == ("cancelled", 0)


async def test_cancelling_in_the_pause_between_attempts(store: Store) -> None:
    """A job cancelled while it waits for its next attempt has none."""
    job = await submit(store, tokens=LENGTH, fault="crash", at=4)
    worker = make_worker(store, job, pause_s=100)
    task = asyncio.create_task(worker.run())
    await wait_until(lambda: _has_said(store, job, 4))
    await store.jobs.end(job.id, finished("cancelled"))
    worker.interrupt(Fenced("cancelled"))
    assert await task == "done"
    log, end = await ending(store, job)
    assert (end.status, attempts_in(log)) == ("cancelled", 1)


async def test_a_cancellation_nobody_told_of(store: Store) -> None:
    """Without any wake-up a cancelled job stops at its next token, because the log refuses it."""
    provider = echo(delay_ms=5)
    job = await submit(store, tokens=1000)
    worker = make_worker(store, job, provider)
    task = asyncio.create_task(worker.run())
    await wait_until(lambda: provider.running == 1)
    await store.jobs.end(job.id, finished("cancelled"))
    assert await task == "done"
    assert provider.running == 0
    assert (await ending(store, job))[1].status == "cancelled"


@pytest.mark.parametrize("pausing", [False, True])
async def test_handing_over(store: Store, pausing: bool) -> None:
    """A replica that shuts down gives the job up at a token boundary; the next worker goes on as if nothing was."""
    fault = "crash" if pausing else "stall"
    job = await submit(store, tokens=LENGTH, fault=fault, at=4, attempts=1)
    provider = echo()
    worker = make_worker(store, job, provider, max_attempts=2, pause_s=100)
    task = asyncio.create_task(worker.run())
    await wait_until(lambda: _has_said(store, job, 4))
    worker.interrupt(ShuttingDown("bye"))
    assert await task == "release"
    assert (await store.jobs.get(job.id)).status == "queued"
    assert await make_worker(store, job, provider, max_attempts=1).run() == "done"
    log, end = await ending(store, job)
    assert (end.status, text_of(log)) == ("completed", tokens(LENGTH))


async def test_a_superseded_worker_ends_nobody_elses_work(store: Store) -> None:
    """A worker that finds its log taken over while it hands over, pauses or fails leaves the new owner alone."""
    for reason in (ShuttingDown("bye"), UpstreamBroken("stalled"), EngineCrashed("gone"), RuntimeError("odd")):
        job = await submit(store)
        standing, go_on = asyncio.Event(), asyncio.Event()

        async def generate(
            request: GenerateRequest,
            so_far: Transcript | None,
            standing: asyncio.Event = standing,
            go_on: asyncio.Event = go_on,
            reason: Exception = reason,
        ) -> AsyncGenerator[Sequence[Delta], None]:
            yield [Delta(text="old")]
            standing.set()
            await go_on.wait()
            yield [Delta(text="more")]
            raise reason

        worker = make_worker(store, job, Scripted(generate))
        task = asyncio.create_task(worker.run())
        await standing.wait()
        await begin(store, job)
        if isinstance(reason, ShuttingDown):
            worker.interrupt(reason)
        go_on.set()
        assert await task == "release"
        state = await store.jobs.get(job.id)
        assert (state.status, state.attempt) == ("in_progress", 2)


async def test_a_shutdown_without_the_store_still_hands_over(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the store does not answer during the hand-over the job is given up all the same, not failed."""
    monkeypatch.setattr(worker_module, "FLUSH_S", 0.1)
    async with distant(store) as (far, proxy):
        job = await submit(store, tokens=LENGTH, fault="stall", at=4)
        worker = make_worker(far, job)
        task = asyncio.create_task(worker.run())
        await wait_until(lambda: _has_said(store, job, 4))
        proxy.pause()
        worker.interrupt(ShuttingDown("bye"))
        assert await task == "release"
        proxy.cut()
        proxy.resume()
    assert (await store.jobs.get(job.id)).status in ("in_progress", "queued")


async def test_a_store_that_fails_as_an_answer_is_read_costs_no_attempt(store: Store) -> None:
    """Whoever goes on with an answer reads it again when the store was away just then."""
    job = await submit(store, tokens=LENGTH)
    await begin(store, job)
    async with distant(store) as (far, proxy):
        trap = proxy.trap(b"XRANGE")
        assert await make_worker(far, job).run() == "done"
        assert trap.sprung.is_set()
    log, _ = await ending(store, job)
    assert (attempts_in(log), text_of(log)) == (2, tokens(LENGTH))


async def test_a_fresh_worker_is_not_stalled(store: Store) -> None:
    """A worker that takes over is not blamed for silence before it began, however long reading the history takes."""
    job = await submit(store, tokens=LENGTH)
    await begin(store, job)
    async with distant(store) as (far, proxy):
        worker = make_worker(far, job)
        trap = proxy.trap(b"XRANGE", hold=True)
        task = asyncio.create_task(worker.run())
        await trap.sprung.wait()
        await wait_until(lambda: worker._scope is not None)
        worker.check_deadlines()
        trap.release()
        assert await task == "done"
    log, end = await ending(store, job)
    assert (end.status, attempts_in(log), text_of(log)) == ("completed", 2, tokens(LENGTH))


async def test_a_model_faster_than_the_store(store: Store) -> None:
    """While the store is slow the model waits; what is held is bounded, and waiting for the store is no stall."""
    held = 0

    async def generate(request: GenerateRequest, so_far: Transcript | None) -> AsyncGenerator[Sequence[Delta], None]:
        nonlocal held
        for _ in range(200):
            held += 10_000
            yield [Delta(text="x" * 10_000)]
        yield [Delta(finish_reason="stop")]

    async with distant(store) as (far, proxy):
        job = await submit(store)
        worker = make_worker(far, job, Scripted(generate), stall_s=0.01, first_token_s=0.01)
        trap = proxy.trap(b"NOMKSTREAM", hold=True)
        task = asyncio.create_task(worker.run())
        await trap.sprung.wait()
        start = asyncio.get_running_loop().time()
        await wait_until(lambda: asyncio.get_running_loop().time() > start + 0.05)
        worker.check_deadlines()
        assert held < 400_000
        trap.release()
        assert await task == "done"
    log, end = await ending(store, job)
    assert (end.status, len(text_of(log))) == ("completed", 2_000_000)
