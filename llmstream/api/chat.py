"""``/chat`` and ``/stream``: jobs with priorities, read as server-sent events."""

from __future__ import annotations

from typing import Any

import msgspec
from aiohttp import web

from llmstream.acceptance import Submission
from llmstream.api.access import PRINCIPAL, TOKEN, caller, needs
from llmstream.api.asking import default_model, next_turn, session_of
from llmstream.api.body import read_json, validate
from llmstream.api.duplicates import identity
from llmstream.api.keys import GATEWAY
from llmstream.api.render import NativeFormat
from llmstream.api.schemas import ChatBody, chat_request, named_webhook
from llmstream.api.sse import Waiting, position, serve
from llmstream.duplicates import Identity
from llmstream.errors import NotFound
from llmstream.gateway import Gateway
from llmstream.report import job_body
from llmstream.store.lanes import Standing
from llmstream.types import GenerateRequest, Job, JobState, new_id

STREAM = "stream"

routes = web.RouteTableDef()


@routes.post("/chat/async")
@needs("generate")
async def submit_chat(request: web.Request) -> web.Response:
    """Accepts a job and answers at once; the answer is read at ``stream_url``."""
    gateway = request.app[GATEWAY]
    schema, generate, known = await _read(request, gateway)
    session = session_of(request, schema.session_id, schema.history, schema.multitask)
    submission = _submission(request, gateway, schema)
    if session is None:
        job = await gateway.submit(generate, identity=known, **submission)
    else:
        async with next_turn(request, session, generate, known, schema.durability, schema) as turn:
            job = await gateway.submit(turn.request, identity=known, **submission)
            turn.began(job)
    # A replica that did not accept a memory job cannot find it by its session, but knows its id for what it is.
    url = stream_url(request, job, named=schema.session_id is not None or job.durability == "memory")
    status = (await gateway.job(job.id)).status if known is not None and known.named else "queued"
    return web.json_response(
        {
            "status": status,
            "task_id": job.id,
            "session_id": job.session_id,
            "stream_url": url,
            **({"not_before": job.not_before} if job.not_before is not None else {}),
        },
        status=202,
        headers={"x-job-id": job.id},
    )


@routes.post("/chat")
@needs("generate")
async def chat(request: web.Request) -> web.StreamResponse:
    """Answers in the same response, streamed."""
    gateway = request.app[GATEWAY]
    schema, generate, known = await _read(request, gateway)
    session = session_of(request, schema.session_id, schema.history, schema.multitask)
    submission = Submission(**_submission(request, gateway, schema), patience_s=gateway.settings.breaker.wait_s)
    if session is None:
        job, follower = await gateway.start(generate, identity=known, **submission)
    else:
        async with next_turn(request, session, generate, known, schema.durability, schema) as turn:
            job, follower = await gateway.start(turn.request, identity=known, **submission)
            turn.began(job, follower)
    headers = {"x-job-id": job.id, "Location": stream_url(request, job, named=True)}
    return await serve(request, follower, NativeFormat(), headers=headers, waiting=standing(gateway, JobState(job)))


@routes.get("/stream/{session_id}", name=STREAM, allow_head=False)
@needs("read", ticket=True)
async def stream(request: web.Request) -> web.StreamResponse:
    """The latest answer of a session, or that of ``?task_id=``; goes on behind ``Last-Event-ID``.

    A job that belongs to no session is read under its own id.

    204 when there is nothing more, which tells an EventSource to stop.
    """
    gateway = request.app[GATEWAY]
    session_id = request.match_info["session_id"]
    task_id, asks = request.query.get("task_id"), caller(request)
    state = await asks.job(task_id) if task_id else await asks.latest_job(session_id)
    job_id = state.job.id
    if task_id and (state.job.session_id or task_id) != session_id:
        raise NotFound(f"Session {session_id!r} has no job {task_id!r}.")
    after = position(request, "event-stream")
    headers = {"x-job-id": job_id}
    if await gateway.exhausted(state, after):
        return web.Response(status=204, headers=headers)
    follower = gateway.read(state.job, after)
    return await serve(request, follower, NativeFormat(), headers=headers, waiting=standing(gateway, state))


@routes.get("/chat/{task_id}")
@needs("read")
async def status(request: web.Request) -> web.Response:
    """How far a job has come, with the text so far."""
    gateway = request.app[GATEWAY]
    state = await caller(request).job(request.match_info["task_id"])
    return await _status(gateway, state)


@routes.post("/chat/{task_id}/cancel")
@routes.delete("/chat/{task_id}")
@needs("generate")
async def cancel(request: web.Request) -> web.Response:
    """Ends a job wherever it waits or runs; doing it twice is fine."""
    gateway = request.app[GATEWAY]
    return await _status(gateway, await caller(request).cancel(request.match_info["task_id"]))


def stream_url(request: web.Request, job: Job, *, named: bool) -> str:
    """Where a job is read, for a while also without a key; ``named`` where its session may hold several."""
    session_id, query = job.session_id or job.id, {"task_id": job.id} if named else {}
    access = request.app[GATEWAY].access
    if access is not None:
        query[TOKEN] = access.tickets.issue(job.principal, session_id, query.get("task_id"))
    return str(request.app.router[STREAM].url_for(session_id=session_id).with_query(query))


async def _read(request: web.Request, gateway: Gateway) -> tuple[ChatBody, GenerateRequest, Identity | None]:
    body, raw = await read_json(request)
    schema = validate(ChatBody, body)
    generate = chat_request(schema, raw, schema.model or default_model(request))
    return schema, generate, identity(request, schema.job_id, body)


def _submission(request: web.Request, gateway: Gateway, schema: ChatBody) -> Submission:
    return Submission(
        principal=request.get(PRINCIPAL),
        priority=schema.priority,
        session_id=schema.session_id or new_id(),
        deadline_s=schema.deadline_s,
        not_before=schema.not_before,
        delay_s=schema.delay_s,
        durability=schema.durability,
        grace_s=_limit(gateway, schema),
        restarts=schema.on_cut != "fail",
        webhook=named_webhook(schema.webhook),
    )


def _limit(gateway: Gateway, schema: ChatBody) -> float | None:
    disconnect = gateway.settings.disconnect
    return disconnect.limit(schema.on_disconnect or disconnect.jobs)


async def _status(gateway: Gateway, state: JobState) -> web.Response:
    body = job_body(state, await gateway.transcript(state.job.id))
    if state.status == "queued":
        place = await gateway.standing(state)
        body |= _place(place)
    return web.json_response(body, headers={"x-job-id": state.job.id})


def standing(gateway: Gateway, state: JobState) -> Waiting:
    """Makes ``queued`` frames. They carry no id: they are no part of the log."""

    async def frame() -> bytes:
        place = await gateway.standing(state)
        if place.ahead is None and not place.paused and place.not_before is None:
            return b""
        return b"data: %s\n\n" % msgspec.json.encode({"type": "queued", **_place(place)})

    return frame


def _place(place: Standing) -> dict[str, Any]:
    """Where a job stands; why it has no position yet, where that is so."""
    told: dict[str, Any] = {"position": place.ahead, "eta_s": place.eta_s}
    if place.paused:
        told["paused"] = True
    if place.not_before is not None:
        told["not_before"] = place.not_before
    return told
