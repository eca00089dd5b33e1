"""A provider's key is sent to the provider and is found nowhere else."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from llmstream.config import Settings, load, print_config
from llmstream.server import Server
from llmstream.store.store import Store
from tests.api.reading import finished
from tests.conftest import echo_settings
from tests.upstream import Reply, Upstream

SECRET = "sk-planted/0123456789+abcdef"
TELLING = {"error": {"message": f"Incorrect API key provided: {SECRET}", "type": "x", "param": SECRET, "code": SECRET}}
REPLIES = [
    Reply(),
    Reply(status=400, body=TELLING),
    Reply(status=401, body=TELLING),
    Reply(status=403, body=TELLING),
    Reply(status=400, body=json.dumps(TELLING).replace("/", "\\/")),
    Reply(status=422, body=f"what is {SECRET}?"),
    Reply(body=TELLING),
    Reply(body="<html>", headers={"Content-Type": f"text/html; x={SECRET}"}),
    Reply(headers={"Content-Encoding": SECRET}),
]


def configured(data_dir: Path, upstream: Upstream) -> Settings:
    """Settings whose key comes from a file that a variable names."""
    (data_dir / "key").write_text(f"{SECRET}\n")
    env = {"LLM_BASE_URL": upstream.url, "LLM_API_KEY": f"file:{data_dir / 'key'}", "LLM_MODEL": "m"}
    providers = load(env=env).providers
    return echo_settings(data_dir, models={}, providers=providers)


async def contents(store: Store) -> bytes:
    """Everything that the store holds."""
    found: list[Any] = []
    reads = {b"hash": ("HGETALL",), b"stream": ("XRANGE", "-", "+"), b"zset": ("ZRANGE", 0, -1), b"string": ("GET",)}
    for node in store.nodes:
        cursor = None
        while cursor != b"0":
            cursor, names = await node.writes.call("SCAN", cursor or b"0", "COUNT", 1000)
            for name in names:
                command, *rest = reads[await node.writes.call("TYPE", name)]
                found.append((name, await node.writes.call(command, name, *rest)))
    return repr(found).encode()


@pytest.mark.parametrize("reply", REPLIES, ids=range(len(REPLIES)))
async def test_a_key_stays_where_it_is(
    tmp_path: Path, upstream: Upstream, caplog: pytest.LogCaptureFixture, reply: Reply
) -> None:
    """Not even an upstream that repeats the key gets it into an answer, a log, a stored job or the health report."""
    caplog.set_level(logging.DEBUG)
    upstream.models["m"] = reply
    upstream.models["GET /models"] = Reply(status=401, body=TELLING)
    settings = configured(tmp_path, upstream)
    seen = [print_config(settings), repr(settings)]
    async with Server(settings) as server:
        async with aiohttp.ClientSession(server.url) as http:
            body = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
            for stream in (False, True):
                async with http.post("/v1/chat/completions", json={**body, "stream": stream}) as response:
                    seen += [await response.text(), repr(response.headers)]
                    job_id = response.headers["x-job-id"]
            await finished(server, job_id)
            for path in (f"/chat/{job_id}", f"/stream/{job_id}", "/health/full", "/jobs", "/jobs/dead", "/v1/models"):
                async with http.get(path) as response:
                    seen.append(await response.text())
        stored = await contents(server.gateway._store)
    assert upstream.requests[-1].headers["Authorization"] == f"Bearer {SECRET}"
    assert b'"role": "user"' in stored
    assert SECRET.encode() not in stored
    assert SECRET not in "".join(seen)
    assert SECRET not in caplog.text
    assert SECRET not in "".join(str(record.__dict__) for record in caplog.records)
