"""``/generate`` and ``/chat_completion``: a queue in front of an LLM core, with the caller's own job ids.

The core is this service or, behind RabbitMQ, another one.
"""

from __future__ import annotations

from typing import Any

import msgspec
from aiohttp import web

from llmstream.api.access import needs
from llmstream.api.asking import ask, chat, default_model, principal_of
from llmstream.api.body import read_json, validate
from llmstream.api.duplicates import identity
from llmstream.api.keys import GATEWAY
from llmstream.api.native_schemas import CoreBody, CoreChatBody, CoreGenerateBody
from llmstream.api.presence import Attended
from llmstream.api.whole import ended_badly, failed, read_whole
from llmstream.broker.messages import Order, answer_of, said
from llmstream.errors import BadRequest
from llmstream.types import Failure, new_id

ABOUT_ORDERS = frozenset({"job_id", "meta", "content", "messages", "priority"})
MESSAGE = frozenset({"role", "content"})
WAITING = frozenset({"deadline_s"})
"""Says how long to wait for an answer, not which."""

routes = web.RouteTableDef()


@routes.post("/generate")
@needs("generate")
async def generate(request: web.Request) -> web.Response:
    """Answers one message."""
    body, _ = await read_json(request)
    schema = validate(CoreGenerateBody, body)
    return await _answer(request, schema, body, schema.content)


@routes.post("/chat_completion")
@needs("generate")
async def chat_completion(request: web.Request) -> web.Response:
    """Answers a conversation."""
    body, _ = await read_json(request)
    schema = validate(CoreChatBody, body)
    return await _answer(request, schema, body, body["messages"])


async def _answer(
    request: web.Request, schema: CoreBody, body: dict[str, Any], what: str | list[dict[str, Any]]
) -> web.Response:
    # What is the same as an order is known as that order, whichever way it comes.
    same = said(schema.meta.model_dump(), what, schema.priority)
    further = {name: value for name, value in body.items() if name not in ABOUT_ORDERS}
    if request.app[GATEWAY].core is not None:
        return await _order(request, schema, {**further, **same}, further)
    return await _generate(request, schema, {**further, **same}, what)


async def _generate(
    request: web.Request, schema: CoreBody, known_by: dict[str, Any], what: str | list[dict[str, Any]]
) -> web.Response:
    gateway, meta = request.app[GATEWAY], schema.meta
    members = {
        **schema.further(),
        "messages": [{"role": "user", "content": what}] if isinstance(what, str) else what,
        "temperature": meta.temperature,
        "max_tokens": meta.tokens_limit,
        "stop": meta.stop_words or None,
    }
    asked = chat(meta.model or default_model(request), members, schema.provider)
    settings = gateway.settings
    policy, cacheable = settings.disconnect.jobs, settings.cache.covers_all
    started = await ask(request, asked, schema, known_by, on_disconnect=policy, cacheable=cacheable)
    with started.follower:
        transcript = await read_whole(request, started.follower)
    return failed(transcript, started.headers) or web.json_response(
        {"content": transcript.text}, headers=started.headers
    )


async def _order(
    request: web.Request, schema: CoreBody, known_by: dict[str, Any], further: dict[str, Any]
) -> web.Response:
    """Lets the other core answer. A client that leaves finds the result under its ``job_id``."""
    if unsaid := sorted(further.keys() - WAITING):
        raise BadRequest(
            f"{unsaid[0]} cannot be passed on to the core behind RabbitMQ (broker.consume is false); leave it out.",
            param=unsaid[0],
        )
    known = identity(request, schema.job_id, known_by)
    order = _order_of(known_by)
    async with Attended(request):
        job_id, stored = await request.app[GATEWAY].order(order, known, principal_of(request), schema.deadline_s)
    headers, answer = {"x-job-id": job_id}, answer_of(stored)
    if isinstance(answer, Failure):
        return ended_badly(answer, headers)
    return web.json_response({"content": answer}, headers=headers)


def _order_of(known_by: dict[str, Any]) -> Order:
    what = known_by["said"]
    if unknown := sorted({name for each in what if isinstance(each, dict) for name in each.keys() - MESSAGE}):
        raise BadRequest(
            f"messages: {unknown[0]} cannot be passed on to the core behind RabbitMQ; messages have role and content.",
            param="messages",
        )
    name = "content" if isinstance(what, str) else "messages"
    value = {"job_id": new_id(), "meta": known_by["meta"], name: what, "priority": known_by["priority"] or None}
    try:
        return msgspec.convert(value, Order)
    except msgspec.ValidationError as error:
        raise BadRequest(f"The core behind RabbitMQ cannot be asked this: {error}.", param=name) from None
