"""``/v1/health`` and ``/v1/chat/stream``: a streaming proxy for several providers."""

from __future__ import annotations

from aiohttp import web

from llmstream.api.access import needs, open_as
from llmstream.api.body import read_json
from llmstream.api.keys import GATEWAY
from llmstream.api.openai import answer

routes = web.RouteTableDef()


@routes.get("/v1/health")
@open_as("health")
async def health(request: web.Request) -> web.Response:
    """Liveness, and the providers that a request may name."""
    names = [provider.name for provider in request.app[GATEWAY].providers]
    return web.json_response({"status": "healthy", "providers": names})


@routes.post("/v1/chat/stream")
@needs("generate")
async def stream(request: web.Request) -> web.StreamResponse:
    """A chat completion that is always streamed."""
    body, raw = await read_json(request)
    if body.get("stream") in (None, False):  # anything else has to be valid
        body = {**body, "stream": True}
    return await answer(request, body, raw)
