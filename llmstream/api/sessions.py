"""``/sessions``: the conversations that the server keeps."""

from __future__ import annotations

from aiohttp import web

from llmstream.api.access import needs
from llmstream.api.asking import principal_of
from llmstream.api.jobs import limit_of
from llmstream.api.keys import GATEWAY
from llmstream.conversations import Conversations

routes = web.RouteTableDef()


@routes.get("/sessions")
@needs("read")
async def sessions(request: web.Request) -> web.Response:
    """The sessions that were used last."""
    found = await _conversations(request).latest(principal_of(request), limit_of(request))
    return web.json_response({"object": "list", "data": found})


@routes.get("/sessions/{session_id}")
@needs("read")
async def session(request: web.Request) -> web.Response:
    """A conversation as far as it has come."""
    return web.json_response(
        await _conversations(request).read(principal_of(request), request.match_info["session_id"])
    )


@routes.delete("/sessions/{session_id}")
@needs("generate")
async def forget(request: web.Request) -> web.Response:
    """Forgets a conversation."""
    session_id = request.match_info["session_id"]
    await _conversations(request).forget(principal_of(request), session_id)
    return web.json_response({"session_id": session_id, "deleted": True})


def _conversations(request: web.Request) -> Conversations:
    return Conversations(request.app[GATEWAY])
