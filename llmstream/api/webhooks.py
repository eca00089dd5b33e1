"""``/webhooks``: events on their way, those that were given up, and the secret that verifies them."""

from __future__ import annotations

from typing import Literal, get_args

from aiohttp import web

from llmstream.api.access import caller, needs
from llmstream.api.jobs import limit_of
from llmstream.errors import BadRequest

Kind = Literal["waiting", "dead"]
KINDS: tuple[Kind, ...] = get_args(Kind)

routes = web.RouteTableDef()


@routes.get("/webhooks/deliveries")
@needs("read")
async def deliveries(request: web.Request) -> web.Response:
    """Events that wait for their next try, the next one first; with ``?status=dead`` those that were given up."""
    rows = await caller(request).deliveries(_status(request), limit_of(request))
    return web.json_response({"object": "list", "data": rows})


@routes.post("/webhooks/deliveries/{task_id}/retry")
@needs("generate")
async def retry(request: web.Request) -> web.Response:
    """Sends the event of a job that is over once more; one that waits for its next try stays as it is."""
    job_id, receivers = await caller(request).send_again(request.match_info["task_id"])
    return web.json_response({"task_id": job_id, "receivers": receivers}, status=202)


@routes.get("/webhooks/secret")
@needs("generate")
async def secret(request: web.Request) -> web.Response:
    """What verifies the events of the caller's jobs; two while one replaces the other."""
    keys = caller(request).webhook_secrets()
    return web.json_response({"key": keys[0], "keys": keys}, headers={"Cache-Control": "no-store"})


def _status(request: web.Request) -> Kind:
    status = request.query.get("status", "waiting")
    for kind in KINDS:
        if kind == status:
            return kind
    raise BadRequest(f"status must be waiting or dead, not {status[:60]!r}.", param="status")
