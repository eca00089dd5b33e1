"""``/metrics``: what Prometheus scrapes."""

from __future__ import annotations

from aiohttp import web

from llmstream.api.access import open_as
from llmstream.api.keys import GATEWAY
from llmstream.telemetry.exposition import exposition
from llmstream.telemetry.snapshot import merged

routes = web.RouteTableDef()


@routes.get("/metrics")
@open_as("metrics")
async def metrics(request: web.Request) -> web.Response:
    """All metrics of all replica processes behind this port, as Prometheus text or OpenMetrics."""
    observer = request.app[GATEWAY].observer
    known = {metric.name: metric for metric in observer.metrics}
    snapshot = merged(await observer.gather(), known)
    body, content_type = exposition(snapshot, known, request.headers.get("Accept", ""))
    return web.Response(body=body, headers={"Content-Type": content_type})
