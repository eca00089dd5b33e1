"""A store spread over the nodes of a Redis Cluster."""

from __future__ import annotations

import asyncio
import functools
import secrets
import signal
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import aiohttp
import pytest

from llmstream.commands import checks
from llmstream.config import StoreSettings
from llmstream.errors import ConfigError, StoreUnavailable
from llmstream.server import Server
from llmstream.store import breakers, budgets, presence, rate_limits, tail
from llmstream.store import cluster as cluster_module
from llmstream.store.readers import Lease
from llmstream.store.store import Store, open_store
from llmstream.types import Durability, Event, EventId, Job, new_id
from tests.cluster import ClusterNode, Migration, RealCluster, free_ports, real_cluster
from tests.conftest import assert_every_key_expires, echo_settings
from tests.logs import drain, events_of, finished, new_job, open_writer, say, stored, text_of
from tests.replica import echo, replica, submit, tokens
from tests.scheduler.test_scheduler import die
from tests.sse import parse
from tests.store.test_secured import documented_rights, run_jobs
from tests.valkey import stores, valkey
from tests.waiting import wait_until


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealCluster]:
    with real_cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


@pytest.fixture(autouse=True)
def _no_second_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """Readers depend on what they are told."""
    monkeypatch.setattr(tail, "RECHECK_S", 1000)


@asynccontextmanager
async def views_of(cluster: RealCluster, count: int = 2) -> AsyncIterator[Sequence[Store]]:
    """So many replicas' views of the cluster, under a prefix of their own."""
    async with stores(cluster.url, count, prefix=secrets.token_hex(4)) as views:
        yield views
        await wait_until(lambda: all(node.sound for node in cluster.nodes))
        await assert_every_key_expires(views[0])


async def job_on(cluster: RealCluster, node: ClusterNode, store: Store, **fields: object) -> Job:
    """A job whose keys are on this node."""
    while True:
        job = await new_job(store, **fields)
        if cluster.owner(store.keys.log(job.id)) is node:
            return job


async def test_limits_on_a_cluster(cluster: RealCluster) -> None:
    """Limits of targets, breakers and rate limits of callers hold wherever their keys lie, and freed slots are told."""
    async with views_of(cluster) as (one, other):
        ours, theirs = one.budgets("r1", lease_s=60), other.budgets("r2", lease_s=60)
        limits, targets = budgets.Limits(slots=1), [f"target{number}" for number in range(12)]
        assert len({cluster.owner(one.keys.budget(target)[0]).port for target in targets}) == 3
        held = [await ours.acquire(target, limits, 10, "a") for target in targets]
        waiting = [asyncio.create_task(theirs.acquire(target, limits, 10, "b")) for target in targets]
        await wait_until(lambda: len(theirs._lines) == len(targets))
        await asyncio.gather(ours.renew(), theirs.renew())
        for reservation in held:
            ours.settle(reservation, 5)
        await asyncio.gather(*waiting)
        assert await ours.spent(targets[0]) == (1, 2, 15)

        policy = breakers.Policy(failures=1)
        mine, yours = (view.breakers(f"r{number}", policy, lease_s=60) for number, view in enumerate((one, other)))
        mine.failed(breakers.Pass("target0"))
        await wait_until(lambda: not (mine.admits("target0") or yours.admits("target0")))

        rates = [rate_limits.Rate(name, 1, 3600, 3) for name in ("requests", "tokens")]
        for _ in range(3):
            taken = await one.rate_limits.take("key", *map(rate_limits.Charge, rates), job_id=new_id())
            assert taken.allowed
        refused = await other.rate_limits.take("key", *map(rate_limits.Charge, rates))
        assert not any(verdict.allowed for verdict in refused.verdicts)
        await other.rate_limits.give_back(taken)
        assert (await other.rate_limits.take("key", *map(rate_limits.Charge, rates))).allowed
        assert taken.job_id is not None
        await other.rate_limits.settle("key", "tokens", taken.job_id, 1)


async def test_many_jobs_over_two_replicas(cluster: RealCluster) -> None:
    """Forty jobs on two replicas are answered in full wherever they are read; their logs lie on all nodes, to
    which there are as many connections as before, and no command takes a detour."""
    async with views_of(cluster) as (one, other), replica(one), replica(other, name="r2"):
        for store in (one, other):
            await asyncio.gather(*(pipe.call("PING") for node in store.nodes for pipe in (node.writes, node.reads)))
        before, moved = cluster.clients(), cluster.counted("MOVED")
        jobs = [await submit(one, tokens=5) for _ in range(40)]
        assert {cluster.owner(one.keys.log(job.id)) for job in jobs} == set(cluster.nodes)
        logs = await asyncio.gather(*(drain(store.log.follow(job.id)) for job in jobs for store in (one, other)))
        assert all(text_of(log) == tokens(5) for log in logs)
        assert logs[::2] == logs[1::2]
        assert cluster.clients() == before
        assert cluster.counted("MOVED") == moved


async def test_every_step_of_a_job(cluster: RealCluster) -> None:
    """All scripts and commands keep to one hash slot and to the documented rights; wake-ups come from every node."""
    crossed = cluster.counted("CROSSSLOT")
    for node in cluster.nodes:
        node.ask("ACL", "SETUSER", "llmstream", "on", ">secret/1", *documented_rights(True))
        node.ask("ACL", "LOG", "RESET")
    await run_jobs(cluster.url.replace("//", "//llmstream:secret%2F1@"))
    assert all(node.ask("ACL", "LOG") == [] for node in cluster.nodes)
    async with views_of(cluster) as (store, other):
        job = await new_job(store, grace_s=30.0)
        await store.readers.join(job.id, Lease("r", 10))
        await store.readers.leave(job.id, "r")
        await store.repeats.point("name", job.id, 10)
        cancelled: set[str] = set()
        other.signals.on_cancel = cancelled.add
        await wait_until(lambda: cluster.subscribers(store.keys.cancel) == 2)

        async def told_from(node: ClusterNode, ended: set[str]) -> bool:
            # Again and again: nodes of a young cluster may not hear each other yet.
            job = await job_on(cluster, node, store)
            await store.jobs.end(job.id, finished("cancelled"))
            ended.add(job.id)
            return not ended.isdisjoint(cancelled)

        for node in cluster.nodes:
            ended: set[str] = set()
            await wait_until(functools.partial(told_from, node, ended))
        assert (await store.health())["server"].endswith(", cluster of 3 nodes")
    assert cluster.counted("CROSSSLOT") == crossed


async def test_two_servers_on_one_cluster(cluster: RealCluster, tmp_path: Path) -> None:
    """Over HTTP: healthy and ready; a stream that was cut is read on from the other replica; that one cancels; doctor
    is content."""
    settings = echo_settings(tmp_path, store=StoreSettings.model_validate({"url": cluster.url, "prefix": "http"}))
    async with AsyncExitStack() as stack:
        servers = [await stack.enter_async_context(Server(settings)) for _ in range(2)]
        one, other = [await stack.enter_async_context(aiohttp.ClientSession(server.url)) for server in servers]
        for path in ("/health", "/ready", "/health/full"):
            async with other.get(path) as response:
                assert response.status == 200
        async with one.post("/chat/async", json={"message": " ".join("abcdefgh"), "model": "echo"}) as response:
            accepted = await response.json()
        async with one.get(accepted["stream_url"]) as response:
            whole = parse(await response.read())
        async with other.get(accepted["stream_url"], headers={"Last-Event-ID": str(whole[3].id)}) as response:
            assert parse(await response.read()) == whole[4:]
        body = {"model": "echo", "messages": [{"role": "user", "content": "x"}], "stream": True}
        async with one.post("/v1/chat/completions", json={**body, "echo": {"fault": "stall"}}) as response:
            job_id = response.headers["x-job-id"]
            async with other.post(f"/chat/{job_id}/cancel") as cancelled:
                assert (await cancelled.json())["status"] == "cancelled"
            await response.read()
    assert (await checks.store(settings)).status == "ok"


async def begun(store: Store, job: Job) -> bool:
    return text_of(await stored(store, job.id)) != ""


async def test_a_dead_replicas_job_is_taken_over(cluster: RealCluster) -> None:
    """A job whose replica died goes on elsewhere from its last logged token."""
    async with views_of(cluster) as (one, other), replica(one, echo(delay_ms=20)) as scheduler:
        job = await submit(one, tokens=12)
        following = asyncio.create_task(drain(other.log.follow(job.id)))
        await wait_until(lambda: scheduler.running == 1)
        await wait_until(lambda: begun(one, job))
        await die(scheduler)
        async with replica(other, name="r2"):
            assert text_of(await following) == tokens(12)
        assert (await one.jobs.get(job.id)).attempt == 2


async def test_a_slot_that_has_moved(cluster: RealCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first command that meets a slot's old node is sent after it, and those that follow go to the new one."""
    monkeypatch.setattr(cluster_module, "LOOK_S", 60.0)  # nobody reads the map before
    async with views_of(cluster, 1) as (store,):
        job = await job_on(cluster, cluster.nodes[0], store)
        key, before = store.keys.job(job.id), cluster.counted("MOVED")
        Migration(cluster, key, *cluster.nodes[:2]).all_at_once()
        for _ in range(3):
            assert await store.writes.call("EXISTS", key) == 1
        assert cluster.counted("MOVED") == before + 1


@pytest.mark.parametrize("durability", ["full", "fsync"])
async def test_a_migration_in_mid_answer(cluster: RealCluster, durability: Durability) -> None:
    """While the hash slot of a running job moves to another node, everything about the job is sent after it or waits
    for it, and nothing is lost or doubled."""
    async with views_of(cluster) as (store, other):
        job = await job_on(cluster, cluster.nodes[0], store, durability=durability)
        writer = await open_writer(store, job)
        following = asyncio.create_task(drain(other.log.follow(job.id)))
        source, target = cluster.nodes[:2]
        migration = Migration(cluster, store.keys.log(job.id), source, target)
        before = {word: cluster.counted(word) for word in ("ASK", "TRYAGAIN")}
        said: list[str] = []

        async def talk() -> None:
            for _ in range(10):
                said.append(f"{len(said)} ")
                say(writer, said[-1])
                await writer.flush()

        await talk()
        migration.begin()
        await talk()
        migration.move(store.keys.log(job.id))
        await talk()
        ending = asyncio.create_task(writer.finish(finished()))  # record and log are apart
        await wait_until(lambda: cluster.counted("TRYAGAIN") > before["TRYAGAIN"])
        assert not ending.done()
        migration.move()
        migration.finish()
        await ending
        writer.close()
        log = await following
        assert log == await stored(store, job.id)
        assert text_of(log) == "".join(said)
        assert [event.id for event in log] == [EventId(1, seq) for seq in range(len(said) + 2)]
        assert all(cluster.counted(word) > count for word, count in before.items())
        assert store.presence.life == 0


async def patiently(store: Store, job: Job) -> list[Event]:
    """Everything a reader gets who tries again while the store is away."""
    events: list[Event] = []
    with store.log.follow(job.id) as follower:
        while True:
            try:
                async for entries in follower:
                    events += events_of(entries)
                return events
            except StoreUnavailable:
                await asyncio.sleep(0.02)


async def test_nodes_die_and_come_back(cluster: RealCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is said while a node is gone is held, and what it lost is written again, also where nothing more is said;
    logs on other nodes go on."""
    monkeypatch.setattr(presence, "RECOVERY_S", 1.0)  # less than nodes take to serve after a restart
    async with views_of(cluster, 3) as (store, other, silent):
        node, forgetful, healthy = cluster.nodes
        hushed = await job_on(cluster, forgetful, silent)
        last = await open_writer(silent, hushed)
        say(last, "that was all")
        await last.flush()
        jobs = [await job_on(cluster, each, store) for each in cluster.nodes]
        writers = [await open_writer(store, job) for job in jobs]
        following = [asyncio.create_task(patiently(other, job)) for job in jobs]
        for writer in writers:
            say(writer, "before ")
            await writer.flush()
        node.kill()
        forgetful.kill()
        forgetful.forget()
        late = asyncio.create_task(patiently(other, hushed))
        for writer in writers:
            say(writer, "meanwhile ")
        await writers[cluster.nodes.index(healthy)].flush()
        await asyncio.to_thread(cluster.restart, node, forgetful)
        for writer in writers:
            await writer.flush()
            say(writer, "after")
            await writer.finish(finished())
            writer.close()
        for job, reader in zip(jobs, following, strict=True):
            log = await reader
            assert text_of(log) == "before meanwhile after"
            assert [event.id for event in log] == [EventId(1, seq) for seq in range(5)]
            assert log == await stored(store, job.id)
        assert store.presence.life == 2
        await wait_until(lambda: begun(other, hushed))
        await last.finish(finished())
        last.close()
        assert text_of(await late) == "that was all"


async def test_a_full_node_is_noticed(cluster: RealCluster) -> None:
    """When one node takes no writes the store counts as away, also for a replica that writes nothing to it."""
    async with views_of(cluster, 1) as (store,):
        cluster.nodes[1].ask("CONFIG", "SET", "maxmemory", 1)
        await wait_until(lambda: store.presence.trouble is not None)
        cluster.nodes[1].ask("CONFIG", "SET", "maxmemory", 0)
        await wait_until(lambda: store.presence.trouble is None)


async def test_a_node_joins_and_leaves(cluster: RealCluster) -> None:
    """The slot of a running job goes to a new node and back; who listened at that node listens elsewhere then."""
    node = cluster.nodes[0]
    guest = cluster.spare()
    async with views_of(cluster) as (store, other):
        job = await job_on(cluster, node, store)
        key = store.keys.log(job.id)
        writer = await open_writer(store, job)
        following = asyncio.create_task(patiently(other, job))
        say(writer, "at home ")
        await writer.flush()
        Migration(cluster, key, node, guest).all_at_once()
        say(writer, "abroad ")
        await writer.flush()
        await wait_until(lambda: len(other.nodes) == 4)
        await wait_until(lambda: listens_or_renews(other, guest))
        Migration(cluster, key, guest, node).all_at_once()
        say(writer, "at home")
        await writer.finish(finished())
        writer.close()
        assert text_of(await following) == "at home abroad at home"
        await wait_until(lambda: len(store.nodes) == len(other.nodes) == 3)
        await wait_until(lambda: listens_at(other) not in (None, guest.port))


@pytest.mark.parametrize("primary_lives", [True, False])
async def test_a_replica_is_promoted_that_lacks_the_last_words(
    cluster: RealCluster, primary_lives: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new node is found, and gets what had not reached it before anything new, or anything that was decided before;
    nobody listens at the old one any more."""
    if primary_lives:
        monkeypatch.setattr(cluster_module, "LOOK_S", 1000)  # only its answers tell that it is no primary any more
    primary = cluster.nodes[0]
    standby = await asyncio.to_thread(cluster.standby, primary)
    assert standby.process is not None
    async with views_of(cluster) as (store, other):
        await wait_until(lambda: listens_or_renews(other, primary))
        job = await job_on(cluster, primary, store)
        writer = await open_writer(store, job)
        following = asyncio.create_task(patiently(other, job))
        standby.process.send_signal(signal.SIGSTOP)
        primary.ask("CLIENT", "KILL", "TYPE", "REPLICA")
        for word in ("acknowledged ", "and ", "lost "):
            say(writer, word)
            await writer.flush()
        if not primary_lives:
            primary.kill()
        standby.process.send_signal(signal.SIGCONT)
        cluster.promote(standby, primary)
        if primary_lives:
            await wait_until(lambda: primary.says("replication", "role", "slave"))
            with pytest.raises(StoreUnavailable, match="another server"):
                await store.readers.leave(job.id, "nobody")
            monkeypatch.undo()
            for view in (store, other):
                assert isinstance(view._servers, cluster_module.Cluster)
                view._servers.doubt()
        say(writer, "here")
        await writer.finish(finished())
        writer.close()
        log = await following
        assert text_of(log) == "acknowledged and lost here"
        assert log == await stored(store, job.id)
        await wait_until(lambda: len(store.nodes) == 3)
        await wait_until(lambda: listens_at(other) not in (None, primary.port))


def listens_at(store: Store) -> int | None:
    """The port of the node that sends the wake-ups."""
    connection = store.signals._connection
    if connection is None or not connection.is_connected or connection._transport is None:
        return None
    peer = connection._transport.get_extra_info("peername")
    return None if peer is None else int(peer[1])


def listens_or_renews(store: Store, node: ClusterNode) -> bool:
    """Whether the wake-ups come from this node; if not another one is tried."""
    if listens_at(store) not in (None, node.port):
        store.signals.renew()
    return listens_at(store) == node.port


async def test_where_to_find_a_cluster(cluster: RealCluster, tmp_path: Path) -> None:
    """Any node that answers leads to all. A database that a cluster has not, several hosts that are no cluster, and a
    socket are explained."""
    (port,) = free_ports(1)
    nodes = ",".join(node.address for node in cluster.nodes[1:])
    async with stores(f"redis://127.0.0.1:{port},{nodes}/0") as (store,):
        assert len(store.nodes) == 3
    async with valkey(tmp_path, "--port", str(port)):
        for url, words in (
            (f"redis://{nodes}/1", "DB index|cluster mode"),
            (f"redis://127.0.0.1:{port},{nodes}", "several hosts"),
            (f"unix://{cluster.nodes[0].socket}", "redis:// URL"),
        ):
            with pytest.raises(ConfigError, match=words):
                async with open_store(StoreSettings.model_validate({"url": url}), tmp_path):
                    pass
