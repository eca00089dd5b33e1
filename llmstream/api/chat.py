"""``/chat`` and ``/stream``: jobs with priorities, read as server-sent events."""

from __future__ import annotations

import msgspec
from aiohttp import web

from llmstream.api.body import read_json, validate
from llmstream.api.keys import GATEWAY
from llmstream.api.render import NativeFormat, job_body
from llmstream.api.schemas import ChatBody, chat_request
from llmstream.api.sse import Waiting, position, serve
from llmstream.errors import BadRequest, NotFound
from llmstream.gateway import Gateway
from llmstream.types import GenerateRequest, JobState, new_id

STREAM = "stream"

routes = web.RouteTableDef()


@routes.post("/chat/async")
async def submit_chat(request: web.Request) -> web.Response:
    """Accepts a job and answers at once; the answer is read at ``stream_url``."""
    gateway = request.app[GATEWAY]
    schema, generate = await _read(request, gateway)
    session_id = schema.session_id or new_id()
    job = await gateway.submit(generate, priority=schema.priority, session_id=session_id, deadline_s=schema.deadline_s)
    url = request.app.router[STREAM].url_for(session_id=session_id)
    if schema.session_id is not None:  # a session of the caller's may hold several jobs: name the one
        url = url.with_query(task_id=job.id)
    return web.json_response(
        {"status": "queued", "task_id": job.id, "session_id": session_id, "stream_url": str(url)},
        status=202,
        headers={"x-job-id": job.id},
    )


@routes.post("/chat")
async def chat(request: web.Request) -> web.StreamResponse:
    """Answers in the same response, streamed."""
    gateway = request.app[GATEWAY]
    schema, generate = await _read(request, gateway)
    session_id = schema.session_id or new_id()
    job, follower = await gateway.start(
        generate, priority=schema.priority, session_id=session_id, deadline_s=schema.deadline_s
    )
    location = request.app.router[STREAM].url_for(session_id=session_id).with_query(task_id=job.id)
    headers = {"x-job-id": job.id, "Location": str(location)}
    waiting = _waiting(gateway, JobState(job))
    return await serve(request, follower, NativeFormat(), headers=headers, waiting=waiting)


@routes.get("/stream/{session_id}", name=STREAM, allow_head=False)
async def stream(request: web.Request) -> web.StreamResponse:
    """The latest answer of a session, or that of ``?task_id=``; goes on behind ``Last-Event-ID``.

    A job that belongs to no session is read under its own id.

    204 when there is nothing more, which tells an EventSource to stop.
    """
    gateway = request.app[GATEWAY]
    session_id = request.match_info["session_id"]
    job_id = request.query.get("task_id") or await gateway.latest_job(session_id)
    state = await gateway.job(job_id)
    if (state.job.session_id or job_id) != session_id:
        raise NotFound(f"Session {session_id!r} has no job {job_id!r}.")
    after = position(request)
    headers = {"x-job-id": job_id}
    if await gateway.exhausted(state, after):
        return web.Response(status=204, headers=headers)
    waiting = _waiting(gateway, state)
    return await serve(request, gateway.follow(job_id, after), NativeFormat(), headers=headers, waiting=waiting)


@routes.get("/chat/{task_id}")
async def status(request: web.Request) -> web.Response:
    """How far a job has come, with the text so far."""
    gateway = request.app[GATEWAY]
    state = await gateway.job(request.match_info["task_id"])
    return await _status(gateway, state)


@routes.post("/chat/{task_id}/cancel")
@routes.delete("/chat/{task_id}")
async def cancel(request: web.Request) -> web.Response:
    """Ends a job wherever it waits or runs; doing it twice is fine."""
    gateway = request.app[GATEWAY]
    return await _status(gateway, await gateway.cancel(request.match_info["task_id"]))


@routes.get("/jobs")
async def jobs(request: web.Request) -> web.Response:
    """The latest jobs, newest first, without their text."""
    try:
        limit = int(request.query.get("limit", "50"))
    except ValueError:
        limit = 0
    if not 1 <= limit <= 500:
        raise BadRequest("limit must be a number from 1 to 500.", param="limit")
    states = await request.app[GATEWAY].recent(limit)
    rows = [
        {
            "task_id": state.job.id,
            "session_id": state.job.session_id,
            "status": state.status,
            "model": state.job.request.model,
            "priority": state.job.priority,
            "lane": state.job.lane,
            "attempt": state.attempt,
            "replica": state.replica,
            "created_at": state.job.created_at,
            "started_at": state.started_at,
            "finished_at": state.finished_at,
        }
        for state in states
    ]
    return web.json_response({"object": "list", "data": rows})


async def _read(request: web.Request, gateway: Gateway) -> tuple[ChatBody, GenerateRequest]:
    body = await read_json(request)
    schema = validate(ChatBody, body)
    models = gateway.models
    if schema.model is None and not models:
        raise BadRequest("No model is configured by name; say which one with 'model'.", param="model")
    return schema, chat_request(schema, body, schema.model or models[0].name)


async def _status(gateway: Gateway, state: JobState) -> web.Response:
    body = job_body(state, await gateway.transcript(state.job.id))
    if state.status == "queued":
        standing = await gateway.standing(state)
        body["position"], body["eta_s"] = standing.ahead, standing.eta_s
    return web.json_response(body, headers={"x-job-id": state.job.id})


def _waiting(gateway: Gateway, state: JobState) -> Waiting:
    """Makes ``queued`` frames. They carry no id: they are no part of the log."""

    async def frame() -> bytes:
        standing = await gateway.standing(state)
        if standing.ahead is None:
            return b""
        body = {"type": "queued", "position": standing.ahead, "eta_s": standing.eta_s}
        return b"data: %s\n\n" % msgspec.json.encode(body)

    return frame
