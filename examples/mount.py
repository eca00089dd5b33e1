"""Mounts llmstream under /llm of an aiohttp application that has routes of its own.

python examples/mount.py
curl http://127.0.0.1:8080/llm/v1/models
"""

from __future__ import annotations

from aiohttp import web

import llmstream


async def hello(_request: web.Request) -> web.Response:
    return web.Response(text="my own application\n")


def main() -> None:
    app = web.Application()
    app.router.add_get("/", hello)
    app.add_subapp("/llm/", llmstream.create_app(llmstream.load()))
    web.run_app(app, host="127.0.0.1", port=8080)


if __name__ == "__main__":
    main()
