"""``python -m tests.bench.systems.naive_server PORT UPSTREAM STORE``: logs each event, then sends it on."""

from __future__ import annotations

import itertools
import sys
from collections.abc import AsyncIterator, Awaitable, Callable

import aiohttp
import redis.asyncio
import uvloop
from aiohttp import web

KEPT_S = 3600
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def make_handler(http: aiohttp.ClientSession, store: redis.asyncio.Redis) -> Handler:
    numbers = itertools.count()

    async def complete(request: web.Request) -> web.StreamResponse:
        key = f"naive:{next(numbers)}"
        body = await request.read()
        async with http.post("/v1/chat/completions", data=body, headers={"Content-Type": "application/json"}) as answer:
            if answer.content_type != "text/event-stream":
                whole = await answer.read()
                await store.xadd(key, {"e": whole})
                await store.expire(key, KEPT_S)
                return web.Response(body=whole, status=answer.status, content_type=answer.content_type)
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            async for event in _events(answer):
                await store.xadd(key, {"e": event})
                await response.write(event)
            await store.expire(key, KEPT_S)
            await response.write_eof()
            return response

    return complete


async def _events(answer: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    async for line in answer.content:
        if line.startswith(b"data:"):
            yield line + b"\n"


async def _app(upstream: str, store_url: str) -> web.Application:
    app = web.Application()
    store = redis.asyncio.Redis.from_url(store_url, max_connections=10_000)
    http = aiohttp.ClientSession(upstream, connector=aiohttp.TCPConnector(limit=0))

    async def close(_: web.Application) -> None:
        await http.close()
        await store.aclose()

    app.on_cleanup.append(close)
    app.router.add_post("/v1/chat/completions", make_handler(http, store))
    return app


if __name__ == "__main__":
    port, upstream, store_url = sys.argv[1:]
    loop = uvloop.new_event_loop()
    web.run_app(_app(upstream, store_url), host="127.0.0.1", port=int(port), access_log=None, print=None, loop=loop)
