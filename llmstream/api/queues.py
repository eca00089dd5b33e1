"""``/queues``: what waits where, and which parts of it are paused or drained."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from llmstream.api.access import needs
from llmstream.api.asking import principal_of
from llmstream.api.body import read_json, validate
from llmstream.api.control_schemas import Part, Resumed
from llmstream.api.keys import GATEWAY
from llmstream.types import Mode, QueueRules, lane_of

routes = web.RouteTableDef()


@routes.get("/queues")
@needs("admin")
async def queues(request: web.Request) -> web.Response:
    """The pools with their numbers, and the rules with how many jobs each covers."""
    gateway = request.app[GATEWAY]
    rules = await gateway.control.look()
    waiting, running = [0] * len(rules.rules), [0] * len(rules.rules)
    if rules.rules:
        async for page in gateway.alive():
            for job in page:
                for number, rule in enumerate(rules.rules):
                    if rule.fits(lane_of(job.priority), job.model):
                        (running if job.running else waiting)[number] += 1
    covered = [
        {**row, "by": rule.by, "waiting": waits, "running": runs}
        for row, rule, waits, runs in zip(rules_body(rules), rules.rules, waiting, running, strict=True)
    ]
    pools = {
        name: {
            "waiting": dict(census.waiting),
            "scheduled": census.scheduled,
            "paused": census.paused,
            "running": sum(census.running.values()),
        }
        for name, census in (await gateway.stats()).items()
    }
    return web.json_response({"object": "queues", "rules": covered, "pools": pools})


@routes.post("/queues/pause")
@needs("admin")
async def pause(request: web.Request) -> web.Response:
    """From the answer on no replica begins a job of this part of the queue; running ones go on, new ones wait."""
    return await _hold(request, "paused")


@routes.post("/queues/drain")
@needs("admin")
async def drain(request: web.Request) -> web.Response:
    """From the answer on this part of the queue takes no new jobs; what waits is finished."""
    return await _hold(request, "draining")


@routes.post("/queues/resume")
@needs("admin")
async def resume(request: web.Request) -> web.Response:
    """Ends pause and drain of exactly this part, or with ``all`` every one."""
    control = request.app[GATEWAY].control
    schema = validate(Resumed, await _body(request))
    rules = await (control.resume_all() if schema.all else control.resume(schema.lane, schema.model))
    return _answer(rules)


async def _hold(request: web.Request, mode: Mode) -> web.Response:
    part = validate(Part, await _body(request))
    by = principal_of(request).id
    return _answer(await request.app[GATEWAY].control.hold(mode, part.lane, part.model, by))


async def _body(request: web.Request) -> dict[str, Any]:
    body, _ = await read_json(request)
    return body


def _answer(rules: QueueRules) -> web.Response:
    return web.json_response({"object": "queue.rules", "rules": rules_body(rules)})


def rules_body(rules: QueueRules) -> list[dict[str, Any]]:
    """The rules as everybody may see them."""
    return [{"mode": each.mode, "lane": each.lane, "model": each.model, "since": each.since} for each in rules.rules]
