"""``kill -9`` in the middle of filtered answers."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import aiohttp

from llmstream.types import Delta, Restart
from tests.chaos.reader import Reader
from tests.chaos.service import Service
from tests.chaos.test_kill import SETTINGS, until_said
from tests.chaos.truths import attempts_in
from tests.conftest import assert_every_key_expires
from tests.logs import stored

PHONE, CARD = "+49 170 1234567", "4111 1111 1111 1111"
FILTERS = {"filters.phone.action": "restore", "filters.card.direction": "out", "models.echo.slots": 4}
WORDS = [f"word{number:02d}" for number in range(40)]


def message(text: str, *places: int) -> str:
    """Words, with ``text`` before some of them."""
    return " ".join(f"{text} {word}" if at in places else word for at, word in enumerate(WORDS))


async def submit(service: Service, text: str) -> tuple[str, str]:
    async with (
        aiohttp.ClientSession(service.url) as http,
        http.post("/chat/async", json={"message": text, "model": "echo"}) as answer,
    ):
        told = await answer.json()
        assert answer.status == 202, told
        return told["task_id"], told["stream_url"]


async def test_a_killed_server_goes_on_with_filtered_answers(tmp_path: Path) -> None:
    """After ``kill -9`` and a new start a reader has each word once and every text as it should be: an answer with
    restored texts goes on where it was, one of which something was taken out starts over visibly, and what was taken
    out is in no log."""
    service = Service(tmp_path, {**SETTINGS, **FILTERS})
    try:
        await service.start()
        asked = (message(PHONE, 1, 5, 20, 39), message(CARD, 2, 30), message(CARD, 35))
        expected = (asked[0], message("[CARD]", 2, 30), message("[CARD]", 35))
        jobs = [await submit(service, text) for text in asked]
        readers = [Reader() for _ in jobs]
        reading = [
            asyncio.create_task(reader.read_at(service.url, path))
            for reader, (_, path) in zip(readers, jobs, strict=True)
        ]
        for reader in readers:
            await until_said(reader, 10)
        await service.end(signal.SIGKILL)
        await asyncio.gather(*reading)
        seen = [reader.text for reader in readers]
        assert all(reader.end == "" for reader in readers)
        await service.start()
        for reader, (_, path), text in zip(readers, jobs, expected, strict=True):
            await reader.read_at(service.url, path)
            assert (reader.end, reader.text) == ("complete", text)
        assert [text.startswith(before) for text, before in zip(expected, seen, strict=True)] == [True, True, True]
        assert [reader.restarts for reader in readers] == [0, 1, 0]
        async with service.store() as store:
            for (job_id, _), restarts in zip(jobs, (0, 1, 0), strict=True):
                log = await stored(store, job_id)
                assert attempts_in(log) == 2
                assert sum(isinstance(event.data, Restart) for event in log) == restarts
                assert not any("1111" in event.data.text for event in log if isinstance(event.data, Delta))
            await assert_every_key_expires(store)
    finally:
        await service.close()
