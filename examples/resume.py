"""Reads an answer to its end over a connection that may break at any time; no token is lost or printed twice.

    python -m llmstream serve &
    python examples/resume.py "Tell me a long story about a lighthouse."

The only state a client has to keep is the id of the last event it has seen.
"""

from __future__ import annotations

import asyncio
import json
import sys

import aiohttp

SERVER = "http://127.0.0.1:8000"
RETRY_S = 1.0


async def submit(session: aiohttp.ClientSession, message: str) -> str:
    """Hands the question in and returns where its answer can be read."""
    async with session.post("/chat/async", json={"message": message}) as response:
        response.raise_for_status()
        accepted = await response.json()
    return str(accepted["stream_url"])


async def read(session: aiohttp.ClientSession, stream_url: str, last_event_id: str) -> tuple[str, bool]:
    """Prints what comes behind ``last_event_id``. Returns the new last id and whether the answer has ended."""
    async with session.get(stream_url, headers={"Last-Event-ID": last_event_id} if last_event_id else {}) as response:
        if response.status == 204:
            return last_event_id, True
        response.raise_for_status()
        async for raw in response.content:
            line = raw.decode().rstrip("\n")
            if line.startswith("id: "):
                last_event_id = line[4:]
            elif line.startswith("data: "):
                event = json.loads(line[6:])
                print(event.get("content", ""), end="", flush=True)
                if event["type"] in {"complete", "cancelled", "error"}:
                    return last_event_id, True
    return last_event_id, False


async def main(message: str) -> None:
    timeout = aiohttp.ClientTimeout(total=None, sock_read=60)
    async with aiohttp.ClientSession(SERVER, timeout=timeout) as session:
        stream_url = await submit(session, message)
        last_event_id, ended = "", False
        while not ended:
            try:
                last_event_id, ended = await read(session, stream_url, last_event_id)
            except (aiohttp.ClientError, TimeoutError):
                print(f"\n[connection lost after {last_event_id or 'nothing'}; reading on]", file=sys.stderr)
                await asyncio.sleep(RETRY_S)
    print()


if __name__ == "__main__":
    asyncio.run(main(" ".join(sys.argv[1:]) or "Why is the sky blue?"))
