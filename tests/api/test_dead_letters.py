"""Jobs that failed after all their attempts: listed, and given another chance as new jobs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence

import aiohttp
import pytest

from llmstream.config import DeadlineSettings
from llmstream.errors import UpstreamBroken
from llmstream.providers.base import Provider
from llmstream.routing.router import Router
from llmstream.scheduler.worker import Worker
from llmstream.server import Server
from llmstream.store import lanes as lanes_module
from llmstream.store.store import Store
from llmstream.transcript import Transcript
from llmstream.types import Delta, Failure, Finished, GenerateRequest, Job, Restart, Started
from tests.api.reading import Json, finished, log_of, read_all, status, submit, tokens
from tests.logs import begin, new_job, stored, text_of
from tests.replica import SHORTLY, Scripted, gates_of, lanes_of
from tests.replica import submit as submit_bare
from tests.waiting import wait_until

DOOMED = {"tokens": 12, "fault": "crash", "at": 5, "attempts": 3}
"""Fails as often as a job is tried; the next run of the same request goes well."""


async def dead(http: aiohttp.ClientSession) -> list[Json]:
    async with http.get("/jobs/dead") as response:
        data: list[Json] = (await response.json())["data"]
        return data


async def requeue(http: aiohttp.ClientSession, job_id: str) -> tuple[int, Json]:
    async with http.post(f"/jobs/{job_id}/requeue") as response:
        return response.status, await response.json()


async def test_a_dead_letter_goes_on_as_a_new_job(http: aiohttp.ClientSession, server: Server) -> None:
    """A job out of attempts is listed with its reason and keeps its text; requeued, even by many at once, it is one new
    job whose log holds the whole answer, while the old log keeps its one end."""
    old = (await submit(http, session_id="s", echo=DOOMED))["task_id"]
    assert (await finished(server, old)).status == "failed"
    before = await log_of(server, old)
    (letter,) = await dead(http)
    assert letter["task_id"] == old
    assert letter["error"]["code"] == "engine_crashed"
    assert (await status(http, old))["text"] == tokens(5)
    answers = await asyncio.gather(*(requeue(http, old) for _ in range(5)))
    assert {code for code, _ in answers} == {202}
    (new,) = {answer["task_id"] for _, answer in answers}
    assert new != old
    assert (await finished(server, new)).status == "completed"
    log = await log_of(server, new)
    assert text_of(log) == tokens(12)
    assert [type(event.data) for event in log if not isinstance(event.data, Delta)] == [Started, Finished]
    assert (await status(http, new))["continues"] == old
    assert await log_of(server, old) == before
    assert await dead(http) == []
    assert (await requeue(http, old))[1]["task_id"] == new
    _, frames = await read_all(http, "/stream/s")
    assert "".join(frame.json.get("content", "") for frame in frames) == tokens(12)


async def test_only_failed_and_cancelled_jobs_are_requeued(http: aiohttp.ClientSession, server: Server) -> None:
    """A job that runs or was completed cannot be requeued, nor an unknown one; a cancelled one goes on."""
    completed = (await submit(http))["task_id"]
    await finished(server, completed)
    assert (await requeue(http, completed))[0] == 409
    assert (await requeue(http, "nobody"))[0] == 404
    stalled = (await submit(http, echo={"tokens": 6, "fault": "stall", "at": 3, "attempts": 1}))["task_id"]

    async def silent() -> bool:
        return bool((await status(http, stalled))["text"] == tokens(3))

    await wait_until(silent)
    assert (await requeue(http, stalled))[0] == 409
    await http.delete(f"/chat/{stalled}")
    code, answer = await requeue(http, stalled)
    assert code == 202
    await finished(server, answer["task_id"])
    assert (await status(http, answer["task_id"]))["text"] == tokens(6)


async def test_what_no_attempt_can_mend_is_no_dead_letter(http: aiohttp.ClientSession, server: Server) -> None:
    """A job that was refused for good fails without becoming a dead letter."""
    job = (await submit(http, echo={"tokens": 3, "fault": "reject"}))["task_id"]
    assert (await finished(server, job)).status == "failed"
    assert await dead(http) == []


@pytest.mark.parametrize("limit", ["0", "501", "x"])
async def test_the_limit_is_checked(http: aiohttp.ClientSession, limit: str) -> None:
    """A limit that is none is refused."""
    async with http.get(f"/jobs/dead?limit={limit}") as response:
        assert response.status == 400


def make_worker(store: Store, job: Job, provider: Provider) -> Worker:
    return Worker(
        job.id,
        0,
        replica="r",
        jobs=store.jobs,
        log=store.log,
        router=Router([provider]),
        gates=gates_of(store),
        deadlines=DeadlineSettings(),
        max_attempts=1,
        backoff=SHORTLY,
        clock=lambda: 1.0,
    )


async def _cut(request: GenerateRequest, so_far: Transcript | None) -> AsyncGenerator[Sequence[Delta], None]:
    yield [Delta(text="half")]
    raise UpstreamBroken("cut")


async def _whole(request: GenerateRequest, so_far: Transcript | None) -> AsyncGenerator[Sequence[Delta], None]:
    assert so_far is None
    yield [Delta(text="all", finish_reason="stop")]


async def test_an_answer_that_cannot_be_continued_starts_over(store: Store) -> None:
    """Where the provider cannot go on, a requeued job begins anew and shows nothing of the old answer."""
    old = await submit_bare(store)
    assert await make_worker(store, old, Scripted(_cut)).run() == "dead"
    new = await new_job(store, continues=old.id)
    new = Job(**{**{name: getattr(new, name) for name in new.__struct_fields__}, "id": f"{new.id}x", "pool": "echo"})
    assert await store.jobs.create(new)
    assert await make_worker(store, new, Scripted(_whole)).run() == "done"
    log = await stored(store, new.id)
    assert text_of(log) == "all"
    assert not [event for event in log if isinstance(event.data, Restart)]


async def test_a_letter_is_noted_by_whoever_settles(store: Store) -> None:
    """When a replica dies after the job's end and before its claim was settled, the next one notes the dead letter."""
    job = await submit_bare(store)
    lanes = lanes_of(store)
    claimed = await lanes.claim("r", 1)
    assert claimed.ids == [job.id]
    await begin(store, job)
    failure = Failure(message="m", retryable=True)
    await store.jobs.end(job.id, Finished(status="failed", at=1.0, failure=failure))
    result = await make_worker(store, job, Scripted(_whole)).run()
    assert result == "dead"
    await lanes.settle(job.id, "r", claimed.number, dead=True)
    assert await lanes.dead(10) == [job.id]
    await lanes.revive(job.id)
    assert await lanes.dead(10) == []


async def test_the_list_is_trimmed(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the latest dead letters are kept."""
    monkeypatch.setattr(lanes_module, "DEAD_LETTERS", 3)
    lanes = lanes_of(store)
    jobs = [(await submit_bare(store)).id for _ in range(5)]
    claimed = await lanes.claim("r", 5)
    for job_id in claimed.ids:
        await lanes.settle(job_id, "r", claimed.number, dead=True)
    assert len(await lanes.dead(10)) == 3
    assert set(await lanes.dead(10)) <= set(jobs)
