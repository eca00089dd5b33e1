"""A primary and its replica behind one address, and the moment when the replica takes over."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.chaos.test_store_trouble import (
    Service,
    assert_undisturbed,
    done,
    reading,
    serving,
)
from tests.logs import drain, finished, new_job, open_writer, say, stored, text_of
from tests.proxy import Proxy
from tests.store.test_secured import free_port
from tests.valkey import Valkey, stores, valkey
from tests.waiting import wait_until


class Pair:
    """Two servers that follow each other, and the address that leads to the primary."""

    def __init__(self, primary: Valkey, standby: Valkey, front: Proxy, link: Proxy) -> None:
        self.primary = primary
        self.standby = standby
        self.front = front
        self.link = link
        """What the standby hears of the primary passes through here."""

    async def promote(self) -> None:
        """The standby takes writes from now on, with what it has, and new connections lead there."""
        assert await self.standby.ask("REPLICAOF NO ONE") == b"+OK\r\n"
        self.front.redirect(self.standby.socket)


@asynccontextmanager
async def pair(folder: Path, *, planned: bool = False) -> AsyncIterator[Pair]:
    ports = [free_port(), free_port()]
    folders = [folder / "primary", folder / "standby"]
    for each in folders:
        each.mkdir()
    options = [("--port", str(port), "--bind", "127.0.0.1", "--repl-diskless-sync-delay", "0") for port in ports]
    async with (
        valkey(folders[0], *options[0]) as primary,
        valkey(folders[1], *options[1]) as standby,
        Proxy(primary.socket) as front,
        Proxy(primary.socket) as link,
    ):
        source = ports[0] if planned else int(link.url.rsplit(":", 1)[1])
        await standby.ask("REPLICAOF", "127.0.0.1", str(source))

        async def in_step() -> bool:
            return await standby.info("master_link_status") == "up"

        await wait_until(in_step)
        yield Pair(primary, standby, front, link)


async def is_primary(server: Valkey) -> bool:
    return await server.info("role") == "master"


async def test_a_planned_failover(tmp_path: Path) -> None:
    """After FAILOVER the old primary answers READONLY on the old connections: everybody goes over to the new one, and
    the running answer, its reader and the waiting jobs notice nothing."""
    async with (
        pair(tmp_path, planned=True) as servers,
        serving(tmp_path, servers.primary, servers.front.url, 2) as running,
    ):
        jobs = [await running.submit() for _ in range(3)]
        (job, path), *waiting = jobs
        async with reading(running, path):
            assert await servers.primary.ask("FAILOVER") == b"+OK\r\n"
            await wait_until(lambda: is_primary(servers.standby))
            servers.front.redirect(servers.standby.socket)
        await assert_undisturbed(running, job)
        for other, _ in waiting:
            await wait_until(lambda job=other: done(running, job))  # type: ignore[misc]
            await assert_undisturbed(running, other)
        assert await servers.primary.info("role") == "slave"


async def test_a_failover_that_loses_the_last_moments(tmp_path: Path) -> None:
    """The primary dies before its replica has heard the end of it. Until the replica is promoted new work is refused
    and answers are held; then what it never heard is written to it, under the same ids."""
    async with pair(tmp_path) as servers, serving(tmp_path, servers.primary, servers.front.url, 2) as running:
        job, path = await running.submit()
        async with reading(running, path):
            servers.link.pause()
            late, late_path = await running.submit()
            async with reading(running, late_path):
                waiting = [await running.submit(5) for _ in range(2)]
                await servers.primary.kill()
                await wait_until(running.is_red)
                await running.assert_refused()
                servers.front.redirect(servers.standby.socket)
                await refused_by_a_replica(running)
                await servers.promote()
        for each in (job, late):
            await assert_undisturbed(running, each)
        for other, _ in waiting:
            await assert_undisturbed(running, other, 5)


async def refused_by_a_replica(running: Service) -> None:
    """The address leads to a server that is no primary yet: still no error of ours, only "not now"."""
    await wait_until(lambda: _is_readonly(running))
    await running.assert_refused()


async def _is_readonly(running: Service) -> bool:
    return "READONLY" in (running.replicas[0].gateway.unready or "")


async def test_nobody_stays_with_a_primary_that_was_cut_off(tmp_path: Path) -> None:
    """Where the old primary lives on unseen, connections to it that nothing has broken are left as soon as one meets
    the new primary: readers hear what is written there."""
    async with pair(tmp_path) as servers, stores(servers.front.url, 2) as (store, other):
        job = await new_job(store)
        writer = await open_writer(store, job)
        say(writer, "before ")
        await writer.flush()
        reader = asyncio.create_task(drain(other.log.follow(job.id)))
        assert text_of(await stored(other, job.id)) == "before "
        servers.link.cut()
        await servers.promote()
        for each in (store, other):
            servers.front.trap(b"PING")
            with pytest.raises(Exception, match="does not answer"):
                await each.ping()
        say(writer, "after")
        await writer.flush()
        await writer.finish(finished())
        writer.close()
        async with asyncio.timeout(5):
            log = await reader
        assert text_of(log) == text_of(await stored(other, job.id)) == "before after"
