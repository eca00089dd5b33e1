"""Metrics of several workers behind one port: whoever is scraped answers for all."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import aiohttp

from tests.api.reading import conversation
from tests.chaos.workers import Workers, pid_of, replaced, workers
from tests.scrape import Scrape, scrape
from tests.waiting import wait_until


async def scraped(service: Workers, replica: str) -> Scrape:
    async with service.connection(replica) as client:
        return await scrape(client.http)


async def ask(service: Workers, replica: str, count: int) -> None:
    async with service.connection(replica) as client:
        for _ in range(count):
            async with client.http.post("/v1/chat/completions", json=conversation(echo={"tokens": 5})) as response:
                assert response.status == 200
                await response.read()


def counts(found: Scrape) -> tuple[float, float]:
    """Answers and their tokens."""
    here = {"method": "POST", "endpoint": "/v1/chat/completions", "status": "200"}
    return found.value("http_requests_total", **here), found.value("tokens_generated_total", model="echo")


async def test_whoever_is_scraped_shows_the_exact_totals_of_all(tmp_path: Path) -> None:
    """Whichever worker a scraper reaches, it sees the sum over all; a worker that is killed or replaced takes nothing
    that was shown before away, and what its successor counts is added."""
    async with workers(tmp_path, 3) as service:
        names = await service.replicas()
        assert len(names) == 3
        for number, name in enumerate(names, 1):
            await ask(service, name, number)
        for name in names:
            found = await scraped(service, name)
            assert counts(found) == (6, 30)
            assert found.value("llmstream_processes") == 3
            assert found.value("llmstream_slots", pool="echo") == 3 * 4

        os.kill(pid_of(names[2]), signal.SIGKILL)
        await wait_until(lambda: replaced(service, {names[2]}), timeout=30)
        (new,) = set(await service.replicas()) - set(names)
        for name in (*names[:2], new):
            assert counts(await scraped(service, name)) == (6, 30)
        await ask(service, new, 4)
        assert counts(await scraped(service, names[0])) == (10, 50)

        before = set(await service.replicas())
        await ask(service, names[0], 2)  # which nobody has scraped when its worker ends
        service.process.send_signal(signal.SIGUSR2)
        await wait_until(lambda: replaced(service, before), timeout=60)
        found = await scraped(service, (await service.replicas())[0])
        assert counts(found) == (12, 60)
        assert found.value("llmstream_processes") == 3


async def test_a_worker_that_hangs_is_shown_as_it_was(tmp_path: Path) -> None:
    """A stopped worker delays a scrape by its deadline and is counted as it was last seen."""
    async with workers(tmp_path, 2, server__worker_timeout_s=60) as service:
        awake, asleep = await service.replicas()
        await ask(service, asleep, 3)
        async with service.connection(awake) as client:
            assert counts(await scrape(client.http)) == (3, 15)
            os.kill(pid_of(asleep), signal.SIGSTOP)
            try:
                found = await scrape(client.http)
            finally:
                os.kill(pid_of(asleep), signal.SIGCONT)
            assert counts(found) == (3, 15)
            assert counts(await scrape(client.http)) == (3, 15)


async def test_many_scrapes_at_once_agree(tmp_path: Path) -> None:
    """Scrapes that overlap, through all workers, each get the whole totals."""
    async with workers(tmp_path, 2) as service:
        for name in await service.replicas():
            await ask(service, name, 2)
        async with aiohttp.ClientSession(service.url) as http:
            found = await asyncio.gather(*(scrape(http) for _ in range(20)))
        assert {counts(each) for each in found} == {(4, 20)}
