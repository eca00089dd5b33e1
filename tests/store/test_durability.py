"""When an event counts as logged."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from llmstream.config import StoreSettings
from llmstream.errors import BadRequest, ConfigError, StoreUnavailable
from llmstream.server import Server
from llmstream.store.store import Store, open_store
from llmstream.store.synced import Synced
from tests.conftest import assert_every_key_expires
from tests.logs import finished, new_job, open_writer, say, stored, text_of
from tests.proxy import distant
from tests.valkey import stores, valkey
from tests.waiting import wait_until

OLD_REDIS = shutil.which("redis-server")


@pytest.fixture
async def synced(tmp_path: Path) -> AsyncIterator[Store]:
    async with valkey(tmp_path, "--appendfsync", "everysec") as server, stores(server.url) as (store,):
        yield store
        await assert_every_key_expires(store)


async def test_fsync_waits_for_the_disk(synced: Store) -> None:
    """An event of an fsync job is seen only after the server has confirmed that it is on its disk."""
    job = await new_job(synced, durability="fsync")
    writer = await open_writer(synced, job)
    say(writer, "word")
    await writer.flush()
    assert (await _persistence(synced))["aof_pending_bio_fsync"] == "0"
    calls = await synced.writes.call("INFO", "commandstats")
    assert b"cmdstat_waitaof" in calls
    await writer.finish(finished())
    writer.close()
    assert text_of(await stored(synced, job.id)) == "word"


async def _persistence(store: Store) -> dict[str, str]:
    raw: bytes = await store.writes.call("INFO", "persistence")
    return dict(line.split(":", 1) for line in raw.decode().splitlines() if ":" in line)


async def test_many_jobs_share_one_wait(synced: Store) -> None:
    """A hundred fsync jobs that speak at the same time wait for the disk together, not one after the other."""
    writers = [await open_writer(synced, await new_job(synced)) for _ in range(2)]
    for writer in writers:
        writer.close()
    jobs = await asyncio.gather(*(new_job(synced, durability="fsync") for _ in range(100)))
    writers = await asyncio.gather(*(open_writer(synced, job) for job in jobs))
    before = await _waits(synced)
    for writer in writers:
        say(writer, "word")
    await asyncio.gather(*(writer.flush() for writer in writers))
    assert await _waits(synced) - before <= 2
    for writer in writers:
        writer.close()


async def _waits(store: Store) -> int:
    raw: bytes = await store.writes.call("INFO", "commandstats")
    line = next((line for line in raw.decode().splitlines() if line.startswith("cmdstat_waitaof")), "calls=0,")
    return int(line.split("calls=")[1].split(",")[0])


async def test_full_waits_for_no_disk(synced: Store) -> None:
    """A job without a wish for more never asks the disk."""
    before = await _waits(synced)
    job = await new_job(synced)
    writer = await open_writer(synced, job)
    say(writer, "word")
    await writer.finish(finished())
    writer.close()
    assert await _waits(synced) == before


async def test_an_answer_of_the_disk_that_was_lost_is_asked_for_again(store: Store) -> None:
    """When the connection breaks while the disk is waited for, the event is neither seen before it is safe nor logged
    twice."""
    async with distant(store) as (far, proxy):
        job = await new_job(far, durability="fsync")
        writer = await open_writer(far, job)
        trap = proxy.trap(b"WAITAOF")
        say(writer, "once")
        await trap.sprung.wait()
        await writer.flush()
        await writer.finish(finished())
        writer.close()
        assert text_of(await stored(store, job.id)) == "once"


async def test_nothing_to_wait_for_is_no_confirmation(synced: Store) -> None:
    """Where the write that is to be waited for is refused, what only looks at the store is not confirmed either."""
    (node,) = synced.nodes
    sender = Synced(node._syncs, 5.0, lambda: ("SET",))
    with pytest.raises(StoreUnavailable, match="has not confirmed"):
        await sender.call("XRANGE", "k", "-", "+")


async def test_a_server_without_a_log_on_disk_is_refused(tmp_path: Path) -> None:
    """Asking for fsync of a server that keeps nothing on disk is a clear error, for a request and as the default."""
    async with valkey(tmp_path, "--appendonly", "no") as server:
        async with stores(server.url) as (store,):
            store.check("full")
            with pytest.raises(BadRequest, match="appendonly yes"):
                store.check("fsync")
        settings = StoreSettings.model_validate({"url": server.url, "durability": "fsync"})
        with pytest.raises(ConfigError, match=r"store\.durability.*appendonly yes"):
            async with open_store(settings, tmp_path):
                pass


@pytest.mark.skipif(OLD_REDIS is None, reason="needs a Redis beside the packaged Valkey")
async def test_a_server_that_cannot_wait_is_refused(tmp_path: Path) -> None:
    """A Redis before 7.2 cannot wait for its disk: fsync is a clear error that names what is
    needed, and works where every write is on the disk before its answer."""
    async with valkey(tmp_path, binary=Path(OLD_REDIS or "")) as server, stores(server.url) as (store,):
        if (await store.version())[1] >= (7, 2):
            pytest.skip("this Redis can wait for its disk")
        with pytest.raises(BadRequest, match=r"Redis 7\.2 or later"):
            store.check("fsync")
        await store.writes.call("CONFIG", "SET", "appendfsync", "always")
        await store.learn()
        store.check("fsync")
        job = await new_job(store, durability="fsync")
        writer = await open_writer(store, job)
        say(writer, "word")
        await writer.finish(finished())
        writer.close()
        assert text_of(await stored(store, job.id)) == "word"


async def test_a_request_chooses(server: Server, http: aiohttp.ClientSession) -> None:
    """The body's ``durability`` reaches the job, the model does not see it, and an unknown one is refused by name."""
    body = {"messages": [{"role": "user", "content": "hi"}], "model": "echo", "durability": "fsync"}
    async with http.post("/v1/chat/completions", json=body) as answer:
        assert answer.status == 200
        job = (await server.gateway.job(answer.headers["x-job-id"])).job
        assert job.durability == "fsync"
        assert "durability" not in job.request.body
    async with http.post("/v1/chat/completions", json={**body, "durability": "hope"}) as answer:
        assert answer.status == 400
        assert (await answer.json())["error"]["param"] == "durability"
    async with http.post("/chat/async", json={"message": "hi", "durability": "fsync"}) as answer:
        task = (await answer.json())["task_id"]
    assert (await server.gateway.job(task)).job.durability == "fsync"
    await wait_until(lambda: _done(server, task))


async def _done(server: Server, job_id: str) -> bool:
    return (await server.gateway.job(job_id)).done
