"""``/v1/embeddings`` for official OpenAI clients; ``/embeddings`` also as a job whose answer is fetched later."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from aiohttp import web

from llmstream.acceptance import Submission
from llmstream.api.access import PRINCIPAL, caller, needs
from llmstream.api.asking import CACHED, Asked, default_model, reuse
from llmstream.api.body import read_json, validate
from llmstream.api.duplicates import identity
from llmstream.api.embedding_schemas import EmbeddingBody, EmbeddingFields, NamedEmbeddingBody, TextsBody
from llmstream.api.keys import GATEWAY
from llmstream.api.render import embedding_list, embedding_result
from llmstream.api.schemas import EXTENSIONS, named_webhook
from llmstream.api.whole import failed, read_whole
from llmstream.errors import NotFound, error_body
from llmstream.transcript import Transcript
from llmstream.types import GenerateRequest, Job

STATUS = "embeddings"
AT_ONCE = 64
"""Vectors that are rendered without leaving the event loop to others."""

routes = web.RouteTableDef()


@routes.post("/v1/embeddings")
@needs("generate")
async def create_embeddings(request: web.Request) -> web.Response:
    """The vectors of one or more inputs."""
    body, raw = await read_json(request)
    return await _answer(request, validate(NamedEmbeddingBody, body), body, raw)


@routes.post("/embeddings")
@needs("generate")
async def submit_embeddings(request: web.Request) -> web.Response:
    """With ``texts`` accepts a batch and answers at once; with ``input`` the same as ``/v1/embeddings``."""
    body, raw = await read_json(request)
    if "input" in body:
        return await _answer(request, validate(EmbeddingBody, body), body, raw)
    gateway, schema = request.app[GATEWAY], validate(TextsBody, body)
    asked = {**schema.further(), "input": schema.texts, "dimensions": schema.dimensions, "user": schema.user_id}
    known = identity(request, schema.job_id, body)
    policy = schema.on_disconnect or gateway.settings.disconnect.jobs
    job = await gateway.submit(_wanted(request, schema, asked), identity=known, **_said(request, schema, policy))
    status = (await gateway.job(job.id)).status if known is not None and known.named else "queued"
    url = str(request.app.router[STATUS].url_for(task_id=job.id))
    return web.json_response(
        {"status": status, "task_id": job.id, "status_url": url}, status=202, headers={"x-job-id": job.id}
    )


@routes.get("/embeddings/{task_id}", name=STATUS)
@needs("read")
async def embeddings_status(request: web.Request) -> web.Response:
    """How far a batch has come, and its vectors once all are there."""
    gateway = request.app[GATEWAY]
    state = await caller(request).job(request.match_info["task_id"])
    job = state.job
    if job.request.kind != "embedding":
        raise NotFound(f"Job {job.id!r} makes no embeddings.")
    transcript = await gateway.transcript(job.id)
    ready = state.status == "completed"
    answer: dict[str, Any] = {"task_id": job.id, "status": state.status, "ready": ready}
    answer |= {"done": transcript.ended, "count": job.request.choices}
    if ready:
        answer["result"] = await asyncio.to_thread(embedding_result, job, transcript)
    elif state.failure is not None:
        answer |= error_body(state.failure)
    encoded = await asyncio.to_thread(msgspec.json.encode, answer)
    return _json(encoded, {"x-job-id": job.id})


async def _answer(request: web.Request, schema: EmbeddingBody, body: dict[str, Any], raw: bytes) -> web.Response:
    gateway = request.app[GATEWAY]
    asked, known = _wanted(request, schema, body, raw), identity(request, schema.job_id, body)
    there: Asked | None = None
    if gateway.settings.cache.covers_all:
        there, asked, known = await reuse(request, asked, known, schema)
    if there is None:
        policy = schema.on_disconnect or gateway.settings.disconnect.streams
        said = _said(request, schema, policy)
        said["patience_s"] = gateway.settings.breaker.wait_s
        there = Asked(*await gateway.start(asked, identity=known, **said))
    headers = {"x-job-id": there.job.id, **(CACHED if there.cached else {})}
    with there.follower:
        transcript = await read_whole(request, there.follower)
    if (refusal := failed(transcript, headers)) is not None:
        return refusal
    return _json(await _rendered(there.job, transcript, schema.encoding_format == "base64"), headers)


async def _rendered(job: Job, transcript: Transcript, base64: bool) -> bytes:
    if base64 or len(transcript.choices) <= AT_ONCE:
        return embedding_list(job, transcript, base64=base64)
    return await asyncio.to_thread(embedding_list, job, transcript, base64=base64)


def _wanted(
    request: web.Request, schema: EmbeddingFields, members: dict[str, Any], raw: bytes | None = None
) -> GenerateRequest:
    """The request as the gateway takes it: without what only says how it is run here; ``raw`` where that is all."""
    model = schema.model or default_model(request, "embedding")
    if raw is not None and schema.model is not None and EXTENSIONS.isdisjoint(members):
        return GenerateRequest(kind="embedding", model=model, raw=msgspec.Raw(raw), provider=schema.provider)
    kept = {name: value for name, value in members.items() if name not in EXTENSIONS and value is not None}
    return GenerateRequest.of("embedding", model, {**kept, "model": model}, schema.provider)


def _said(request: web.Request, schema: EmbeddingFields, on_disconnect: str) -> Submission:
    return Submission(
        principal=request.get(PRINCIPAL),
        priority=schema.priority,
        session_id=schema.session_id,
        deadline_s=schema.deadline_s,
        not_before=schema.not_before,
        delay_s=schema.delay_s,
        durability=schema.durability,
        grace_s=request.app[GATEWAY].settings.disconnect.limit(on_disconnect),
        restarts=schema.on_cut != "fail",
        webhook=named_webhook(schema.webhook),
    )


def _json(body: bytes, headers: dict[str, str]) -> web.Response:
    return web.Response(body=body, headers={**headers, "Content-Type": "application/json; charset=utf-8"})
