"""Receives the events that tell of the end of jobs, and believes none that the server has not signed.

    pip install standardwebhooks
    export WEBHOOKS__SECRET="whsec_$(openssl rand -base64 32)"
    WEBHOOKS__ALLOW=127.0.0.1 python -m llmstream serve &
    python examples/webhook_receiver.py &
    curl -s http://127.0.0.1:8000/chat/async -H 'Content-Type: application/json' \\
         -d '{"message": "Why is the sky blue?", "webhook": "http://127.0.0.1:9000/hook"}'
"""

from __future__ import annotations

import os

from aiohttp import web
from standardwebhooks import Webhook, WebhookVerificationError

PORT = 9000
WEBHOOK = web.AppKey("webhook", Webhook)
SEEN = web.AppKey("seen", set[str])
"""Ids of events that are done: every event comes at least once. Keep them in a database, for a day."""


async def receive(request: web.Request) -> web.Response:
    body = await request.read()
    try:
        event = request.app[WEBHOOK].verify(body, {name.lower(): value for name, value in request.headers.items()})
    except WebhookVerificationError:
        return web.Response(status=401)
    seen = request.app[SEEN]
    if event["id"] not in seen:
        print(event["type"], event["data"]["id"], event["data"].get("text"), flush=True)
        seen.add(event["id"])  # once its work is done: after any other answer than 2xx it comes again
    return web.Response(status=204)


def make_app(secret: str) -> web.Application:
    app = web.Application(client_max_size=4 * 1024 * 1024)
    app[WEBHOOK], app[SEEN] = Webhook(secret), set()
    app.router.add_post("/hook", receive)
    return app


if __name__ == "__main__":
    web.run_app(make_app(os.environ["WEBHOOKS__SECRET"]), host="127.0.0.1", port=PORT)
