"""Several workers on one port: real processes, real signals, one service."""

from __future__ import annotations

import asyncio
import fcntl
import itertools
import os
import random
import signal
import socket
import termios
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

import aiohttp
import pytest

from llmstream.store.store import Store
from llmstream.types import Event, Started
from tests.chaos.reader import Reader
from tests.chaos.truths import assert_exact, attempts_in
from tests.chaos.workers import Workers, alive, all_done, pid_of, replaced, workers
from tests.conftest import assert_every_key_expires
from tests.logs import stored
from tests.replica import tokens
from tests.waiting import wait_until

TAKEOVER_S = 1.0
SHARE = 0.2


async def test_all_workers_serve_under_one_address(tmp_path: Path) -> None:
    """Connections reach every worker, ``server.json`` names the one address, and each log line its process. Where
    there is no terminal SIGHUP replaces all workers."""
    async with workers(tmp_path, 2, logging__level="DEBUG") as service:
        names = set(await service.replicas())
        assert len(names) == 2
        for name in names:
            async with service.connection(name) as client:
                assert client.replica == name
        pids = {pid_of(name) for name in names}
        assert service.process.pid not in pids
        (pid, _) = pids
        os.kill(pid, signal.SIGKILL)
        await wait_until(lambda: f"replica process {pid} was ended by SIGKILL" in service.log)
        service.process.send_signal(signal.SIGHUP)
        await wait_until(lambda: replaced(service, names), timeout=30)


async def test_a_killed_worker_interrupts_no_stream(
    tmp_path: Path, record_testsuite_property: Callable[[str, object], None]
) -> None:
    """Answers that a killed worker was generating go on within a second, exact, for whoever reads them from another
    worker; the dead one is replaced."""
    async with (
        workers(tmp_path, 2, models__echo__delay_ms=20, models__echo__slots=8) as service,
        AsyncExitStack() as stack,
    ):
        victim, survivor = await service.replicas()
        client = await stack.enter_async_context(service.connection(victim))
        paths = dict([await client.ask(tokens=120) for _ in range(8)])
        readers = {job: Reader() for job in paths}
        reading = []
        for job, reader in readers.items():
            connection = await stack.enter_async_context(service.connection(survivor))
            reading.append(asyncio.create_task(reader.read(connection.http, paths[job])))
        await wait_until(lambda: all(len(reader.pieces) > 10 for reader in readers.values()))
        async with service.store() as store:
            states = await store.jobs.find_all(list(paths))
            hit = {state.job.id for state in states if state.replica == victim}
            assert hit
            killed_at = time.monotonic()
            os.kill(pid_of(victim), signal.SIGKILL)
            await asyncio.gather(*reading)
            gaps = [next(piece.at for piece in readers[job].pieces if piece.id.attempt == 2) - killed_at for job in hit]
            for job, reader in readers.items():
                assert reader.end == "complete"
                assert reader.text == tokens(120)
                log = await stored(store, job)
                assert_exact(log, 120)
                assert attempts_in(log) == (2 if job in hit else 1)
            record_testsuite_property("takeover_s", max(gaps))
            assert max(gaps) <= TAKEOVER_S
            await wait_until(lambda: replaced(service, {victim}), timeout=30)
            async with service.connection((set(await service.replicas()) - {survivor}).pop()) as fresh:
                _, path = await fresh.ask(tokens=3)
                reader = Reader()
                await reader.read(fresh.http, path)
                assert reader.text == tokens(3)
            await assert_every_key_expires(store)


async def test_a_rolling_restart_under_load_loses_nothing(tmp_path: Path) -> None:
    """SIGUSR2 replaces every worker while clients submit and read, also of a service that nohup keeps alive without
    its terminal and without anybody who reads what it prints: each accepted job ends with its exact answer, and no job
    was run again except where it was handed over."""
    service = Workers(tmp_path, 2, {"models.echo.delay_ms": 10})
    unread, printed = os.pipe()
    os.close(unread)
    async with on_a_terminal(service, take_terminal_under_nohup, stdout=printed) as hang_up:
        os.close(printed)
        hang_up()
        service.process.send_signal(signal.SIGHUP)
        before = set(await service.replicas())
        accepted: list[str] = []
        done = asyncio.Event()
        clients = [asyncio.create_task(ask(service, accepted, done)) for _ in range(8)]
        await wait_until(lambda: len(accepted) > 16)
        service.process.send_signal(signal.SIGUSR2)
        await wait_until(lambda: replaced(service, before), timeout=60)
        done.set()
        await asyncio.gather(*clients)
        assert len(accepted) > 32
        async with service.store() as store:
            await wait_until(lambda: all_done(store, accepted))
            handed_over = 0
            for job in accepted:
                log = await stored(store, job)
                assert_exact(log, 40)
                given = int(await store.writes.call("HGET", store.keys.job(job), "handed_over") or 0)
                assert attempts_in(log) == 1 + given
                handed_over += given
            assert handed_over
            await assert_every_key_expires(store)


async def test_a_worker_that_hangs_is_replaced(tmp_path: Path) -> None:
    """A stopped worker is killed after its timeout: who reads from it is cut off and reads on from another one, and
    there is a new one in its place."""
    settings = {"models__echo__delay_ms": 20, "server__worker_timeout_s": 1.5}
    async with workers(tmp_path, 2, **settings) as service:
        victim, survivor = await service.replicas()
        async with service.connection(victim) as client, service.connection(survivor) as other:
            _, path = await client.ask(tokens=60)
            reader = Reader()
            reading = asyncio.create_task(reader.read(client.http, path))
            await wait_until(lambda: len(reader.pieces) > 5)
            os.kill(pid_of(victim), signal.SIGSTOP)
            async with asyncio.timeout(15):
                with pytest.raises(aiohttp.ClientError):
                    await reading
                await reader.read(other.http, path)
        assert reader.end == "complete"
        assert reader.text == tokens(60)
        assert f"Replica process {pid_of(victim)} showed no life for 1.5 s." in service.log
        await wait_until(lambda: replaced(service, {victim}), timeout=30)


def take_terminal() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def take_terminal_under_nohup() -> None:
    take_terminal()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


@asynccontextmanager
async def on_a_terminal(service: Workers, take: Callable[[], None], **spawn: int) -> AsyncIterator[Callable[[], None]]:
    """Runs a service on a terminal of its own; the value closes it."""
    ours, its = os.openpty()
    service.spawn = {"stdin": its, "stdout": its, "stderr": its, "preexec_fn": take, **spawn}
    loop = asyncio.get_running_loop()
    loop.add_reader(ours, lambda: os.read(ours, 1 << 16))

    def hang_up() -> None:
        loop.remove_reader(ours)
        os.close(ours)

    try:
        await service.start()
        os.close(its)
        yield hang_up
    finally:
        await service.close()


async def test_a_closed_terminal_ends_the_service(tmp_path: Path) -> None:
    """SIGHUP from a closed terminal ends everything in order, and only that: sent by hand it restarts the workers of a
    service on a terminal as well."""
    service = Workers(tmp_path, 2, {})
    async with on_a_terminal(service, take_terminal) as hang_up:
        before = set(await service.replicas())
        service.process.send_signal(signal.SIGHUP)
        await wait_until(lambda: replaced(service, before), timeout=30)
        pids = [pid_of(name) for name in await service.replicas()]
        hang_up()
        async with asyncio.timeout(20):
            assert await service.process.wait() == 0
        assert not any(map(alive, pids))
        assert not (tmp_path / "server.json").exists()


async def test_sigterm_ends_all_workers_within_the_grace(tmp_path: Path) -> None:
    """SIGTERM to the supervisor ends every process in time with exit status 0; started again the service finishes
    what it had accepted."""
    async with workers(tmp_path, 2, models__echo__delay_ms=20) as service:
        pids = [pid_of(name) for name in await service.replicas()]
        async with service.connection() as client:
            jobs = [await client.submit(tokens=100) for _ in range(12)]
        async with service.store() as store:
            await wait_until(lambda: running(store, jobs, 8))
        start = asyncio.get_running_loop().time()
        assert await service.end(signal.SIGTERM) == 0
        assert asyncio.get_running_loop().time() - start < 5
        assert not any(map(alive, pids))
        assert not (tmp_path / "server.json").exists()
        await service.start()
        async with service.store() as store:
            await wait_until(lambda: all_done(store, jobs), timeout=30)
            for job in jobs:
                assert_exact(await stored(store, job), 100)


async def test_nothing_outlives_a_killed_supervisor(tmp_path: Path) -> None:
    """``kill -9`` of the supervisor leaves neither a worker nor the store behind, and the port is free."""
    async with workers(tmp_path, 2) as service:
        pids = [*map(pid_of, await service.replicas()), await service.store_pid()]
        assert all(map(alive, pids))
        await service.end(signal.SIGKILL)
        await wait_until(lambda: not any(map(alive, pids)))
        # A process whose first thread has ended keeps its sockets until the last one has.
        await wait_until(lambda: is_free(int(service.url.rpartition(":")[2])))


def is_free(port: int) -> bool:
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True


async def test_a_worker_that_cannot_start_ends_the_command(tmp_path: Path) -> None:
    """What keeps a worker from starting, or the port from being shared, is told once, and nothing stays behind."""
    with socket.create_server(("127.0.0.1", 0), reuse_port=True) as taken:
        service = Workers(tmp_path, 2, {"server.port": taken.getsockname()[1]})
        with pytest.raises(AssertionError, match="Cannot listen"):
            await service.start()
        assert await service.process.wait() == 2
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(64))
    service = Workers(tmp_path, 2, {"models.m.source": broken})
    with pytest.raises(AssertionError, match="error: "):
        await service.start()
    assert await service.process.wait() in (1, 2)


async def test_a_thousand_jobs_are_shared_and_each_is_run_once(
    tmp_path: Path, record_testsuite_property: Callable[[str, object], None]
) -> None:
    """Of 1,000 jobs that waited for three workers each runs once, none long before a more urgent one, and every
    worker gets its share."""
    settings = {"models__echo__delay_ms": 8, "scheduler__ageing_s": 100_000}
    async with workers(tmp_path, 3, **settings) as service, service.connection() as client, service.store() as store:
        blockers = [await client.submit(tokens=1, delay_ms=100_000) for _ in range(12)]
        await wait_until(lambda: running(store, blockers, 12))
        priorities = random.Random(1).choices((10, 0, -10), k=1000)
        jobs = {await client.submit(priority, tokens=5): priority for priority in priorities}
        for job in blockers:
            async with client.http.post(f"/chat/{job}/cancel"):
                pass
        await wait_until(lambda: all_done(store, list(jobs)), timeout=60)
        logs = {job: await stored(store, job) for job in jobs}
        for log in logs.values():
            assert_exact(log, 5)
            assert attempts_in(log) == 1
        starts = {job: started(log) for job, log in logs.items()}
        shares = Counter(start.replica for start in starts.values())
        record_testsuite_property("shares", sorted(shares.values()))
        assert len(shares) == 3
        assert all(abs(share - 1000 / 3) <= SHARE * 1000 / 3 for share in shares.values()), shares
        for urgent, other in itertools.pairwise((10, 0, -10)):
            last = max(starts[job].at for job in jobs if jobs[job] == urgent)
            early = [job for job in jobs if jobs[job] == other and starts[job].at < last]
            assert len(early) <= 12, "more than one job for each slot overtook a more urgent one"


async def test_a_burst_through_one_worker_is_spread(
    tmp_path: Path, record_testsuite_property: Callable[[str, object], None]
) -> None:
    """Jobs that one worker accepts while all have room are shared by all of them."""
    async with workers(tmp_path, 3, models__echo__slots=200) as service, service.store() as store:
        async with service.connection() as client:
            jobs = [await client.submit(tokens=1, delay_ms=3000) for _ in range(300)]
        await wait_until(lambda: all_done(store, jobs), timeout=30)
        shares = Counter(state.replica for state in await store.jobs.find_all(jobs))
        record_testsuite_property("shares", sorted(shares.values()))
        assert len(shares) == 3
        # Whoever is slow to answer the wake-up leaves its part to the others, so this is no exact science.
        assert min(shares.values()) >= 60, shares


async def ask(service: Workers, accepted: list[str], done: asyncio.Event) -> None:
    """Submits and reads one job after the other, over whatever connection there is."""
    async with aiohttp.ClientSession(service.url) as http:
        while not done.is_set():
            body = {"message": "go", "model": "echo", "echo": {"tokens": 40}}
            try:
                async with http.post("/chat/async", json=body) as answer:
                    if answer.status == 503:
                        continue
                    assert answer.status == 202, await answer.text()
                    told = await answer.json()
            except aiohttp.ClientError:
                continue
            accepted.append(told["task_id"])
            reader = Reader()
            while not reader.end:
                with suppress(aiohttp.ClientError):
                    await reader.read(http, told["stream_url"])
            assert reader.text == tokens(40)


async def running(store: Store, jobs: list[str], count: int) -> bool:
    """Whether so many of the jobs are being generated."""
    states = await store.jobs.find_all(jobs)
    return sum(state.status == "in_progress" for state in states) == count


def started(log: list[Event]) -> Started:
    (start,) = (event.data for event in log if isinstance(event.data, Started))
    return start
