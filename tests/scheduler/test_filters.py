"""Filtered answers and the faults of their models: nothing lost, nothing twice, nothing of what was taken out."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Sequence

import pytest
from msgspec.structs import replace

from llmstream.config_filters import FilterSettings, PresidioSettings
from llmstream.errors import ShuttingDown, UpstreamBroken
from llmstream.filters.answer import AnswerFilter
from llmstream.filters.filters import Filters
from llmstream.patterns.scanner import Found
from llmstream.scheduler.worker import Worker
from llmstream.store.store import Store
from llmstream.transcript import Transcript
from llmstream.types import Delta, GenerateRequest, Job, Restart
from tests.logs import begin, text_of
from tests.replica import Scripted, lanes_of, submit
from tests.scheduler.test_worker import attempts_in, ending, make_worker
from tests.waiting import wait_until

NAMES = {"<EMAIL_1>": "bob@example.com"}
RESTORED = [" Ask", " <", "EM", "AIL", "_1", ">", " or", " me", "."]
REDACTED = [" Pay", " 4111", " 1111", " 1111", " 1111", " now", "."]


def filtering(
    store: Store, job: Job, provider: Scripted, *, max_attempts: int = 3, **filters: FilterSettings
) -> Worker:
    found = Filters(filters, PresidioSettings())
    return make_worker(store, job, provider, max_attempts=max_attempts, filters=found)


async def submit_named(store: Store, names: dict[str, str] | None = None) -> Job:
    """A job in whose prompt these placeholders stand."""
    job = await submit(store)
    job = replace(job, id=f"{job.id}-named", request=replace(job.request, names=names))
    assert await store.jobs.create(job)
    assert await lanes_of(store).push(job)
    return job


class Cut:
    """A model that says the same each time, and breaks off once; goes on from token ids and insists on their text."""

    def __init__(self, said: Sequence[str], at: int) -> None:
        self.begun: list[int] = []
        """From which token each run began."""
        self._said = said
        self._at = at

    async def say(self, request: GenerateRequest, so_far: Transcript | None) -> AsyncGenerator[Sequence[Delta], None]:
        start = 0
        if so_far is not None:
            start = len(so_far.tokens)
            assert so_far.text == "".join(self._said[:start])
        self.begun.append(start)
        end = self._at if len(self.begun) == 1 else len(self._said)
        for at in range(start, end):
            yield [Delta(self._said[at], tokens=(at,))]
        if end == self._at and len(self.begun) == 1:
            raise UpstreamBroken("Cut.")
        yield [Delta(finish_reason="stop")]

    @property
    def provider(self) -> Scripted:
        return Scripted(self.say, continues=True)


@pytest.mark.parametrize("at", range(len(RESTORED) + 1))
async def test_what_is_restored_goes_on_after_a_cut(store: Store, at: int) -> None:
    """Cut anywhere, also within a placeholder: the model goes on from the token ids of what was logged, the reader gets
    each text once, and what waited is said again."""
    job, model = await submit_named(store, NAMES), Cut(RESTORED, at)
    assert await filtering(store, job, model.provider).run() == "done"
    log, end = await ending(store, job)
    assert (end.status, text_of(log), attempts_in(log)) == ("completed", " Ask bob@example.com or me.", 2)
    assert not any(isinstance(event.data, Restart) for event in log)
    said = "".join(RESTORED)
    assert Transcript(log, said=True).text == said
    assert model.begun[1] <= at
    assert len(model.begun) == 2


@pytest.mark.parametrize("at", range(len(REDACTED) + 1))
async def test_what_is_redacted_starts_over_after_a_cut(store: Store, at: int) -> None:
    """What the model said is nowhere any more once something was taken out: an answer that is cut behind that starts
    over. Before that it goes on, also from the middle of what will be taken out, of which nothing was logged."""
    job, model = await submit(store), Cut(REDACTED, at)
    assert await filtering(store, job, model.provider, card=FilterSettings()).run() == "done"
    log, end = await ending(store, job)
    assert (end.status, Transcript(log).text, attempts_in(log)) == ("completed", " Pay [CARD] now.", 2)
    restarts = sum(isinstance(event.data, Restart) for event in log)
    assert restarts == (at > 5)  # the number may have gone on until something else followed
    assert model.begun[1] == (0 if restarts else min(at, 1))
    assert "1111" not in str(log)
    assert all(token == 0 or token > 4 for event in log if isinstance(event.data, Delta) for token in event.data.tokens)


@pytest.mark.parametrize("at", range(4))
async def test_words_begin_where_they_did(store: Store, at: int) -> None:
    """What an earlier attempt logged decides whether a word begins behind it, as it would have in one go."""
    job, model = await submit(store), Cut(["See A", "4111111111111111", " ok"], at)
    assert await filtering(store, job, model.provider, card=FilterSettings()).run() == "done"
    log, _ = await ending(store, job)
    assert text_of(log) == "See A4111111111111111 ok"


async def test_an_answer_that_starts_over_begins_anew(store: Store) -> None:
    """What came before a restart has no part in what comes behind it."""
    job, model = await submit(store), Cut(["4111", "111111111111", " ok"], 3)
    assert await filtering(store, job, model.provider, card=FilterSettings()).run() == "done"
    log, _ = await ending(store, job)
    assert text_of(log) == "[CARD] ok[CARD] ok"
    assert Transcript(log).text == "[CARD] ok"


SENTENCES = ["Well. It is", " 00:1B:44", ":11:3A:B7", ". So", " <COIN_1> is", " fine! I", " am", " done."]
WALLET = "1A1zP1eP5QGefi2DMPTfTL5SLmv7DivfNa"


@pytest.fixture(scope="module")
def presidio() -> Filters:
    entities = {"mac": FilterSettings(entity="MAC_ADDRESS"), "coin": FilterSettings(entity="CRYPTO", action="restore")}
    filters = Filters(entities, PresidioSettings())
    asyncio.run(filters.open())
    return filters


@pytest.mark.parametrize("at", range(len(SENTENCES)))
async def test_sentences_go_on_or_start_over_after_a_cut(store: Store, presidio: Filters, at: int) -> None:
    """What has to be looked at by the sentence is looked at off the event loop, and a cut loses nothing: an answer goes
    on behind the last whole sentence, or starts over where something was taken out."""
    job, runs = await submit_named(store, {"<COIN_1>": WALLET}), list[str]()
    threads = set[int]()

    async def say(request: GenerateRequest, so_far: Transcript | None) -> AsyncGenerator[Sequence[Delta], None]:
        before = so_far.text if so_far is not None else ""
        assert "".join(SENTENCES).startswith(before)
        runs.append(before)
        for number, piece in enumerate(SENTENCES):
            if number == at and len(runs) == 1:
                raise UpstreamBroken("Cut.")
            known = min(len(piece), max(0, len(before) - len("".join(SENTENCES[:number]))))
            if piece[known:]:
                yield [Delta(piece[known:], tokens=(number,))]
        yield [Delta(finish_reason="stop")]

    recognize = presidio._redact_out._recognize

    def noting(text: str) -> Sequence[Found]:
        threads.add(threading.get_ident())
        return recognize(text)

    found = presidio.outward(job.request)
    assert found is not None
    found._scanner._recognize = noting  # type: ignore[attr-defined]
    try:
        worker = make_worker(store, job, Scripted(say, continues=True), filters=presidio)
        assert await worker.run() == "done"
    finally:
        found._scanner._recognize = recognize  # type: ignore[attr-defined]
    log, end = await ending(store, job)
    assert (end.status, Transcript(log).text) == ("completed", f"Well. It is [MAC]. So {WALLET} is fine! I am done.")
    restarts = sum(isinstance(event.data, Restart) for event in log)
    assert (restarts, runs) == (int(at > 3), ["", "Well." if 0 < at < 4 else ""])
    assert threads
    assert threading.get_ident() not in threads


async def test_another_replica_goes_on_with_what_was_restored(store: Store) -> None:
    """A replica that takes over has the names from the job's record and the model's own words from the log."""
    job = await submit_named(store, NAMES)
    begun = await begin(store, job)
    writer = store.log.writer(begun)
    screen = Filters({}, PresidioSettings()).outward(job.request)
    assert screen is not None
    screen.begin()
    for at, text in enumerate(RESTORED[:7]):
        for delta in screen.put([Delta(text, tokens=(at,))]):
            writer.append(delta, 1)
    await writer.flush()
    writer.close()
    model = Cut(RESTORED, 0)
    model.begun.append(-1)
    assert await filtering(store, job, model.provider).run() == "done"
    log, end = await ending(store, job)
    assert (end.status, text_of(log), model.begun) == ("completed", " Ask bob@example.com or me.", [-1, 7])


async def test_requeued_jobs_keep_their_names(store: Store) -> None:
    """The answer of the job that one was requeued from is taken over with what its model said."""
    old = await submit_named(store, NAMES)
    model = Cut(RESTORED, 7)
    assert await filtering(store, old, model.provider, max_attempts=1).run() == "dead"
    new = replace(await submit_named(store, NAMES), id=f"{old.id}-again", continues=old.id)
    assert await store.jobs.create(new)
    assert await filtering(store, new, model.provider).run() == "done"
    log, end = await ending(store, new)
    assert (end.status, text_of(log), model.begun) == ("completed", " Ask bob@example.com or me.", [0, 7])


async def test_an_answer_with_something_taken_out_is_not_handed_over(store: Store) -> None:
    """A replica that shuts down hands over what others can go on with; an answer that would start over may end here."""
    go_on, redacted = asyncio.Event(), asyncio.Event()

    async def say(request: GenerateRequest, so_far: Transcript | None) -> AsyncGenerator[Sequence[Delta], None]:
        yield [Delta(text) for text in REDACTED[:1]]
        await go_on.wait()
        yield [Delta(text) for text in REDACTED[1:]]
        redacted.set()
        await asyncio.Event().wait()

    job = await submit(store)
    worker = filtering(store, job, Scripted(say, continues=True), card=FilterSettings())
    task = asyncio.create_task(worker.run())
    await wait_until(lambda: worker._intake is not None and worker._intake.got_token)
    before = worker.can_hand_over
    go_on.set()
    await redacted.wait()
    assert (before, worker.can_hand_over) == (True, False)
    worker.interrupt(ShuttingDown("Enough."))
    assert await task == "release"


async def test_a_filter_that_breaks_shows_nothing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A defect of a filter fails the job: what was not looked at is not shown."""

    def broken(self: AnswerFilter, deltas: Sequence[Delta]) -> list[Delta]:
        raise RuntimeError("a defect")

    monkeypatch.setattr(AnswerFilter, "put", broken)
    job, model = await submit(store), Cut(REDACTED, -1)
    assert await filtering(store, job, model.provider, card=FilterSettings()).run() == "done"
    log, end = await ending(store, job)
    assert end.failure is not None
    assert (end.status, text_of(log)) == ("failed", "")
    assert "filter broke" in end.failure.message


async def test_without_filters_an_answer_is_not_looked_at(store: Store) -> None:
    """A job that nothing has to be done for writes to its log directly."""
    job, model = await submit(store), Cut(REDACTED, -1)
    worker = filtering(store, job, model.provider, email=FilterSettings(direction="in"))
    assert await worker.run() == "done"
    assert worker._screen is None
    log, _ = await ending(store, job)
    assert text_of(log) == "".join(REDACTED)
