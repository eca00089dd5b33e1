"""``/generate`` and ``/chat_completion``: a queue in front of an LLM core, with the caller's own job ids."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from llmstream.api.access import needs
from llmstream.api.asking import ask, chat, default_model
from llmstream.api.body import read_json, validate
from llmstream.api.keys import GATEWAY
from llmstream.api.native_schemas import CoreBody, CoreChatBody, CoreGenerateBody
from llmstream.api.whole import failed, read_whole

routes = web.RouteTableDef()


@routes.post("/generate")
@needs("generate")
async def generate(request: web.Request) -> web.Response:
    """Answers one message."""
    body, _ = await read_json(request)
    schema = validate(CoreGenerateBody, body)
    return await _answer(request, schema, body, [{"role": "user", "content": schema.content}])


@routes.post("/chat_completion")
@needs("generate")
async def chat_completion(request: web.Request) -> web.Response:
    """Answers a conversation."""
    body, _ = await read_json(request)
    schema = validate(CoreChatBody, body)
    return await _answer(request, schema, body, body["messages"])


async def _answer(
    request: web.Request, schema: CoreBody, body: dict[str, Any], messages: list[dict[str, Any]]
) -> web.Response:
    gateway, meta = request.app[GATEWAY], schema.meta
    members = {
        **schema.further(),
        "messages": messages,
        "temperature": meta.temperature,
        "max_tokens": meta.tokens_limit,
        "stop": meta.stop_words or None,
    }
    asked = chat(meta.model or default_model(request), members, schema.provider)
    settings = gateway.settings
    policy, cacheable = settings.disconnect.jobs, settings.cache.covers_all
    started = await ask(request, asked, schema, body, on_disconnect=policy, cacheable=cacheable)
    with started.follower:
        transcript = await read_whole(request, started.follower)
    return failed(transcript, started.headers) or web.json_response(
        {"content": transcript.text}, headers=started.headers
    )
