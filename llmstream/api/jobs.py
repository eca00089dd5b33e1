"""``/jobs``: what was done lately, what was given up, and giving it another chance."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiohttp import web

from llmstream.api.access import caller, needs
from llmstream.api.body import read_json, validate
from llmstream.api.chat import stream_url
from llmstream.api.control_schemas import CancelBody
from llmstream.api.keys import GATEWAY
from llmstream.errors import BadRequest, error_body
from llmstream.selection import JobFilter
from llmstream.types import JobState

if TYPE_CHECKING:
    from llmstream.api.answers import DeadJob, JobRow, Requeued

DEFAULT_LIMIT, MAX_LIMIT = 50, 500

routes = web.RouteTableDef()


@routes.get("/jobs")
@needs("read")
async def jobs(request: web.Request) -> web.Response:
    """The latest jobs, newest first, without their text."""
    states = await caller(request).recent(limit_of(request))
    return web.json_response({"object": "list", "data": [_row(state) for state in states]})


@routes.get("/jobs/dead")
@needs("read")
async def dead(request: web.Request) -> web.Response:
    """Jobs that failed after all their attempts, latest first, each with the reason."""
    states = await caller(request).dead(limit_of(request))
    rows: list[DeadJob] = [
        {**_row(state), "error": error_body(state.failure)["error"] if state.failure else None} for state in states
    ]
    return web.json_response({"object": "list", "data": rows})


@routes.post("/jobs/cancel")
@needs("generate")
async def cancel(request: web.Request) -> web.Response:
    """Ends those jobs that wait or run and fit the filter, some of them where they are many; doing it twice is fine.
    Memory jobs are left alone, for only their replica knows them."""
    schema = validate(CancelBody, (await read_json(request))[0])
    wanted = JobFilter(**schema.model_dump(exclude={"all", "limit"}))
    if wanted == JobFilter() and not schema.all:
        raise BadRequest("The filter is empty; say which jobs, or 'all': true for every one.", param="all")
    ids, more = await caller(request).cancel_all(wanted, schema.limit)
    return web.json_response({"object": "jobs.cancelled", "cancelled": len(ids), "task_ids": ids, "more": more})


@routes.post("/jobs/{task_id}/requeue")
@needs("generate")
async def requeue(request: web.Request) -> web.Response:
    """Runs a failed or cancelled job once more, as a new job; doing it twice is fine."""
    job = await caller(request).requeue(request.match_info["task_id"])
    state = await request.app[GATEWAY].job(job.id)
    answer: Requeued = {
        "status": state.status,
        "task_id": job.id,
        "session_id": job.session_id,
        "stream_url": stream_url(request, job, named=True),
        "continues": job.continues,
    }
    return web.json_response(answer, status=202, headers={"x-job-id": job.id})


def limit_of(request: web.Request) -> int:
    try:
        limit = int(request.query.get("limit", DEFAULT_LIMIT))
    except ValueError:
        limit = 0
    if not 1 <= limit <= MAX_LIMIT:
        raise BadRequest(f"limit must be a number from 1 to {MAX_LIMIT}.", param="limit")
    return limit


def _row(state: JobState) -> JobRow:
    return {
        "task_id": state.job.id,
        "session_id": state.job.session_id,
        "status": state.status,
        "model": state.job.request.model,
        "priority": state.job.priority,
        "lane": state.job.lane,
        "attempt": state.attempt,
        "replica": state.replica,
        "continues": state.job.continues,
        "created_at": state.job.created_at,
        "started_at": state.started_at,
        "finished_at": state.finished_at,
        "not_before": state.job.not_before,
    }
