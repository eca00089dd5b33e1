"""Tokens and cost of a job: the same for every client, recorded once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
from openai import AsyncOpenAI

from llmstream.config import PriceSettings, ProviderSettings
from llmstream.server import Server
from llmstream.types import Finished
from tests.api.reading import log_of, status
from tests.conftest import echo_settings
from tests.upstream import Reply, Upstream

HELLO: Any = [{"role": "user", "content": "Hello world"}]
PRICES = {"far/m": PriceSettings(input=1, output=10)}
TOLD = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
COUNTED = {"prompt_tokens": 2 + 4, "completion_tokens": 3, "total_tokens": 9, "estimated": True}


@asynccontextmanager
async def serving(data_dir: Path, upstream: Upstream, **settings: Any) -> AsyncIterator[tuple[Server, AsyncOpenAI]]:
    given: dict[str, Any] = {"models": {}, "prices": PRICES, **settings}
    given.setdefault("providers", {"far": ProviderSettings(base_url=upstream.url, continue_by="assistant_prefill")})
    async with (
        Server(echo_settings(data_dir, **given)) as server,
        AsyncOpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client,
    ):
        yield server, client


async def usages(server: Server, client: AsyncOpenAI, **body: Any) -> list[dict[str, Any]]:
    """The usage of one job, as everybody is told who asks."""

    options: Any = {"model": "m", "messages": HELLO, "stream": True, "stream_options": {"include_usage": True}, **body}
    raw = await client.chat.completions.with_raw_response.create(**options)
    job_id = raw.headers["x-job-id"]
    *_, last = [chunk async for chunk in raw.parse()]
    whole = await client.chat.completions.retrieve(f"chatcmpl-{job_id}")
    finished = [event.data for event in await log_of(server, job_id) if isinstance(event.data, Finished)]
    assert len(finished) == 1
    async with aiohttp.ClientSession(server.url) as http:
        told = [(await status(http, job_id))["usage"] for _ in range(2)]
    found = [usage.model_dump(exclude_none=True) if usage else {} for usage in (last.usage, whole.usage)]
    return [*found, *told]


async def test_what_the_upstream_says_is_priced(tmp_path: Path, upstream: Upstream) -> None:
    """The tokens are the upstream's and the cost comes from the table, the same wherever one looks."""
    async with serving(tmp_path, upstream) as (server, client):
        found = await usages(server, client)
    assert found == [{**TOLD, "cost": 0.000037}] * 4


async def test_what_nobody_says_is_counted(tmp_path: Path, upstream: Upstream) -> None:
    """Where the upstream gives no usage the tokens are counted, marked as estimated, and priced."""
    upstream.models["m"] = Reply(usage=None)
    async with serving(tmp_path, upstream) as (server, client):
        found = await usages(server, client)
        assert found == [{**COUNTED, "cost": 0.000036}] * 4
        answer = await client.chat.completions.create(model="m", messages=HELLO)
    assert answer.usage is not None
    assert answer.usage.model_dump(exclude_none=True) == {**COUNTED, "cost": 0.000036}


async def test_no_price_no_cost(tmp_path: Path, upstream: Upstream) -> None:
    """Without a price nothing is said about the cost, unless the upstream says it."""
    async with serving(tmp_path, upstream, prices={}) as (server, client):
        assert await usages(server, client) == [TOLD] * 4
        upstream.replies.append(Reply(usage={**TOLD, "cost": 0.5}))
        assert await usages(server, client) == [{**TOLD, "cost": 0.5}] * 4


async def test_several_attempts_are_paid_once(tmp_path: Path, upstream: Upstream) -> None:
    """An answer that was cut and continued has one usage and one cost: that of the whole answer."""
    gate = asyncio.Event()
    gate.set()
    upstream.replies += [
        Reply(fault="cut", at=2, gates={2: gate}, usage=None),
        Reply(prefill=True, usage={"prompt_tokens": 10, "completion_tokens": 1, "total_tokens": 11}),
    ]
    async with serving(tmp_path, upstream) as (server, client):
        found = await usages(server, client)
    # "Hello there" came in two pieces, taken for two tokens; the upstream took them for a part of the prompt.
    whole = {"prompt_tokens": 8, "completion_tokens": 3, "total_tokens": 11, "estimated": True, "cost": 0.000038}
    assert found == [whole] * 4
