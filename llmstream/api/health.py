"""``/health``, ``/ready``, ``/health/full``, ``/stats``: what one looks at first when something is wrong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from aiohttp import web

from llmstream.api.access import needs, open_as
from llmstream.api.asking import served_model
from llmstream.api.keys import GATEWAY
from llmstream.api.queues import rules_body
from llmstream.errors import StoreUnavailable
from llmstream.store.lanes import Census
from llmstream.types import LANES

routes = web.RouteTableDef()


@dataclass(frozen=True, slots=True)
class _Totals:
    waiting: int
    running: int
    slots: int


@routes.get("/health")
@open_as("health")
async def health(request: web.Request) -> web.Response:
    """Liveness: this process answers. Says nothing about what stands behind it."""
    gateway = request.app[GATEWAY]
    return web.json_response(
        {"status": "healthy", "model_loaded": bool(gateway.models), "model_name": served_model(request)}
    )


@routes.get("/ready")
@open_as("health")
async def ready(request: web.Request) -> web.Response:
    """Readiness: 503 while new work had better go elsewhere, as the store is away or this replica drains."""
    reason = request.app[GATEWAY].unready
    if reason is not None:
        raise StoreUnavailable(reason, code="not_ready", retry_after=1)
    return web.json_response({"status": "ready"})


@routes.get("/health/full")
@open_as("health")
async def health_full(request: web.Request) -> web.Response:
    """Everything behind this replica, with the time each look took; 503 when something is missing."""
    gateway = request.app[GATEWAY]
    body = await gateway.health()
    if body["store"]["status"] == "ok":
        body["rules"] = rules_body(gateway.control.rules)
        body["queue"] = {pool: _queue(census) for pool, census in (await gateway.stats()).items()}
    return web.json_response(body, status=200 if body["status"] == "ok" else 503)


@routes.get("/stats")
@needs("read")
async def stats(request: web.Request) -> web.Response:
    """Lanes, waiting, running, replicas, rates and the time a new job would wait."""
    pools = await request.app[GATEWAY].stats()
    lanes = dict.fromkeys(LANES, 0)
    for census in pools.values():
        for lane, count in census.waiting.items():
            lanes[lane] += count
    totals = [_totals(census) for census in pools.values()]
    replicas = sorted({replica for census in pools.values() for replica in census.slots})
    return web.json_response(
        {
            "lanes": lanes,
            "waiting": sum(total.waiting for total in totals),
            "scheduled": sum(census.scheduled for census in pools.values()),
            "paused": sum(census.paused for census in pools.values()),
            "rules": rules_body(request.app[GATEWAY].control.rules),
            "running": sum(total.running for total in totals),
            "replicas": replicas,
            "pools": {name: _queue(census) for name, census in pools.items()},
        }
    )


def _totals(census: Census) -> _Totals:
    return _Totals(sum(census.waiting.values()), sum(census.running.values()), sum(census.slots.values()))


def _queue(census: Census) -> dict[str, Any]:
    totals = _totals(census)
    rate = totals.slots / census.service_s if census.service_s else None
    return {
        "waiting": dict(census.waiting),
        "scheduled": census.scheduled,
        "paused": census.paused,
        "running": totals.running,
        "slots": totals.slots,
        "replicas": {
            name: {"slots": count, "running": census.running.get(name, 0)} for name, count in census.slots.items()
        },
        "served": census.served,
        "service_s": census.service_s,
        "rate_per_s": round(rate, 3) if rate else None,
        "eta_s": round(totals.waiting / rate, 3) if rate else None,
    }
