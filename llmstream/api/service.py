"""``/status``, ``/v1/generate`` and ``/v1/chat``: a service around one model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aiohttp import web

from llmstream import history
from llmstream.api.access import needs
from llmstream.api.asking import Asked, Session, ask, chat, default_model, principal_of, served_model
from llmstream.api.body import read_json, validate
from llmstream.api.chat import standing, stream_url
from llmstream.api.keys import GATEWAY
from llmstream.api.native_schemas import PromptBody, ServiceBody, ServiceChatBody
from llmstream.api.render import NativeFormat
from llmstream.api.sse import serve
from llmstream.api.whole import failed, read_whole
from llmstream.transcript import Transcript
from llmstream.types import JobState

if TYPE_CHECKING:
    from llmstream.api.answers import Generated, Said

routes = web.RouteTableDef()


@routes.get("/status")
@needs("read")
async def status(request: web.Request) -> web.Response:
    """Which model is served, and what the cache was good for."""
    gateway = request.app[GATEWAY]
    return web.json_response(
        {
            "service": gateway.settings.server.name,
            "status": "healthy" if gateway.unready is None else "unready",
            "model_loaded": bool(gateway.models),
            "model_name": served_model(request),
            "cache": await gateway.cache.describe(principal_of(request)),
        }
    )


@routes.post("/v1/generate")
@needs("generate")
async def generate(request: web.Request) -> web.Response:
    """Answers one prompt."""
    body, _ = await read_json(request)
    schema = validate(PromptBody, body)
    asked = await _ask(request, schema, body, [{"role": "user", "content": schema.prompt}])
    with asked.follower:
        transcript = await read_whole(request, asked.follower)
    answer: Generated = {"generated_text": transcript.text, "prompt": schema.prompt, **_about(asked, transcript)}
    return failed(transcript, asked.headers) or web.json_response(answer, headers=asked.headers)


@routes.post("/v1/chat")
@needs("generate")
async def converse(request: web.Request) -> web.StreamResponse:
    """Answers a conversation, whole or as a stream that can be resumed."""
    body, _ = await read_json(request)
    schema = validate(ServiceChatBody, body)
    session = Session(schema.session_id, schema.multitask, schema.history) if schema.session_id is not None else None
    asked, stream = await _ask(request, schema, body, body["messages"], session), schema.stream
    del schema, body  # a stream may be open for hours
    if stream:
        headers = {**asked.headers, "Location": stream_url(request, asked.job, named=session is not None)}
        waiting = standing(request.app[GATEWAY], JobState(asked.job))
        return await serve(request, asked.follower, NativeFormat(), headers=headers, waiting=waiting)
    with asked.follower:
        transcript = await read_whole(request, asked.follower)
    answer = {"message": history.answer(transcript), **_about(asked, transcript)}
    return failed(transcript, asked.headers) or web.json_response(answer, headers=asked.headers)


async def _ask(
    request: web.Request,
    schema: ServiceBody,
    body: dict[str, Any],
    messages: list[dict[str, Any]],
    session: Session | None = None,
) -> Asked:
    gateway = request.app[GATEWAY]
    defaults = gateway.settings.model
    members = {
        **schema.further(),
        "messages": messages,
        "max_tokens": schema.max_tokens or defaults.max_tokens,
        "temperature": defaults.temperature if schema.temperature is None else schema.temperature,
    }
    asked = chat(schema.model or default_model(request), members, schema.provider)
    policy = gateway.settings.disconnect.streams
    return await ask(request, asked, schema, body, on_disconnect=policy, cacheable=True, session=session)


def _about(asked: Asked, transcript: Transcript) -> Said:
    usage = transcript.usage
    return {
        "model": asked.job.request.model,
        "tokens_generated": usage.completion_tokens if usage is not None else len(transcript.tokens),
        "cached": asked.cached,
    }
