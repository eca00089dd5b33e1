"""``/v1``: what official OpenAI clients call."""

from __future__ import annotations

from functools import cache
from typing import Any
from urllib.parse import quote

import msgspec
from aiohttp import web

from llmstream.acceptance import Submission
from llmstream.api.access import PRINCIPAL, caller, needs
from llmstream.api.asking import CACHED, Asked, next_turn, reuse, session_of
from llmstream.api.body import read_json, validate
from llmstream.api.duplicates import identity
from llmstream.api.keys import GATEWAY
from llmstream.api.render import ChatFormat, chat_completion, completion_id
from llmstream.api.schemas import ChatCompletionBody, named_webhook, openai_request
from llmstream.api.sse import position, serve
from llmstream.api.whole import failed, read_whole
from llmstream.errors import BadRequest, ModelNotFound, NotFound
from llmstream.gateway import Gateway
from llmstream.store.follower import Follower
from llmstream.types import BEGINNING, EventId, Job, ModelInfo

COMPLETION = "chat-completion"

routes = web.RouteTableDef()


@routes.post("/v1/chat/completions")
@needs("generate")
async def create_chat_completion(request: web.Request) -> web.StreamResponse:
    """Generates an answer: as a stream that can be resumed, or whole."""
    return await answer(request, *await read_json(request))


async def answer(request: web.Request, body: dict[str, Any], raw: bytes) -> web.StreamResponse:
    """Answers a chat completion with this body, whose bytes go upstream."""
    gateway = request.app[GATEWAY]
    schema = validate(ChatCompletionBody, body)
    disconnect = gateway.settings.disconnect
    generate, known = openai_request("chat", schema, body, raw), identity(request, schema.job_id, body)
    there: Asked | None = None
    if gateway.settings.cache.covers_all and schema.session_id is None:
        there, generate, known = await reuse(request, generate, known, schema)
    session = session_of(request, schema.session_id, schema.history, schema.multitask)
    submission = Submission(
        principal=request.get(PRINCIPAL),
        priority=schema.priority,
        session_id=schema.session_id,
        deadline_s=schema.deadline_s,
        durability=schema.durability,
        grace_s=disconnect.limit(schema.on_disconnect or disconnect.streams),
        restarts=not schema.stream or (schema.on_cut or gateway.settings.retry.on_cut) == "restart",
        not_before=schema.not_before,
        delay_s=schema.delay_s,
        patience_s=gateway.settings.breaker.wait_s,
        webhook=named_webhook(schema.webhook),
    )
    if there is not None:
        job, follower, cached = there
    elif session is None:
        job, follower, cached = Asked(*await gateway.start(generate, identity=known, **submission))
    else:
        async with next_turn(request, session, generate, known, schema.durability, schema) as turn:
            job, follower, cached = Asked(*await gateway.start(turn.request, identity=known, **submission))
            turn.began(job, follower)
    headers, stream = {**_headers(request, job), **(CACHED if cached else {})}, schema.stream
    old = cached or (known is not None and known.named)
    begins_at = await _skip_to_restart(gateway, job, follower) if old else None
    wire = ChatFormat(job, include_usage=schema.include_usage, begins_at=begins_at)
    del schema, body, raw, generate, there, session, submission  # a stream may be open for hours
    if stream:
        del job
        return await serve(request, follower, wire, headers=headers)
    with follower:
        return await _whole(request, job, follower, headers)


@routes.get("/v1/chat/completions/{completion_id}", name=COMPLETION, allow_head=False)
@needs("read")
async def get_chat_completion(request: web.Request) -> web.StreamResponse:
    """A stored completion; with ``?stream=true`` its stream, from the beginning or behind ``Last-Event-ID``."""
    gateway = request.app[GATEWAY]
    state = await caller(request).job(request.match_info["completion_id"].removeprefix("chatcmpl-"))
    job_id = state.job.id
    if state.job.request.kind != "chat":
        raise NotFound(f"Job {job_id!r} is not a chat completion.")
    headers = _headers(request, state.job)
    if _flag(request, "stream"):
        after = position(request, "openai")
        if await gateway.exhausted(state, after):
            return web.Response(status=204, headers=headers)
        restart = await gateway.last_restart(job_id) if state.attempt > 1 and after == BEGINNING else None
        if restart is not None:
            after = EventId(restart.attempt, restart.seq - 1)
        wire = ChatFormat(state.job, include_usage=_flag(request, "include_usage"), begins_at=restart)
        return await serve(request, gateway.read(state.job, after), wire, headers=headers)
    with gateway.read(state.job) as follower:
        return await _whole(request, state.job, follower, headers)


@routes.get("/v1/models")
@needs("read")
async def list_models(request: web.Request) -> web.Response:
    """What this service can run now."""
    return web.json_response({"object": "list", "data": [_model(model) for model in caller(request).models]})


@routes.get("/v1/models/{model:.+}")
@needs("read")
async def get_model(request: web.Request) -> web.Response:
    """One model."""
    name = request.match_info["model"]
    for model in caller(request).models:
        if model.name == name:
            return web.json_response(_model(model))
    raise ModelNotFound(f"The model {name!r} does not exist here; GET /v1/models lists what does.", param="model")


async def _whole(request: web.Request, job: Job, follower: Follower, headers: dict[str, str]) -> web.Response:
    transcript = await read_whole(request, follower)
    if (refusal := failed(transcript, headers)) is not None:
        return refusal
    body = msgspec.json.encode(chat_completion(job, transcript))
    return web.Response(body=body, headers={**headers, "Content-Type": "application/json; charset=utf-8"})


async def _skip_to_restart(gateway: Gateway, job: Job, follower: Follower) -> EventId | None:
    """A reader of a job that is not new begins where the answer last started over: what came before is void."""
    try:
        state = await gateway.job(job.id)
        restart = await gateway.last_restart(job.id) if state.attempt > 1 else None
    except BaseException:
        follower.close()
        raise
    if restart is not None:
        follower.position = EventId(restart.attempt, restart.seq - 1)
    return restart


def _headers(request: web.Request, job: Job) -> dict[str, str]:
    location = _location(request.app.router[COMPLETION]).format(quote(completion_id(job), safe=""))
    return {"x-job-id": job.id, "Location": location}


@cache
def _location(route: web.AbstractResource) -> str:
    """Where a completion is read as a stream, with a place for its id."""
    before, _, after = str(route.url_for(completion_id="-ID-")).rpartition("-ID-")
    return f"{before}{{}}{after}?stream=true"


def _flag(request: web.Request, name: str) -> bool:
    value = request.query.get(name, "false").lower()
    if value not in {"true", "false", "1", "0"}:
        raise BadRequest(f"{name} must be true or false, not {value!r}.", param=name)
    return value in {"true", "1"}


def _model(model: ModelInfo) -> dict[str, object]:
    body: dict[str, object] = {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": model.provider,
    }
    if model.context is not None:
        body["context_length"] = model.context
    if model.kinds is not None:
        body["capabilities"] = {"chat": "chat" in model.kinds, "embeddings": "embedding" in model.kinds}
    return {**body, **model.extra}
