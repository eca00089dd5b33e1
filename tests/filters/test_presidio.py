"""What Presidio recognizes. Its models are no packages, so these are recognizers that do without."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmstream.config_filters import FilterSettings, PresidioSettings
from llmstream.errors import ConfigError
from llmstream.filters.filters import Filters
from llmstream.filters.presidio import Sentences
from llmstream.patterns.known import known
from llmstream.patterns.scanner import Found, Scanner
from llmstream.server import Server
from llmstream.transcript import Transcript
from llmstream.types import Delta, Event, EventId, GenerateRequest
from tests.api.reading import conversation
from tests.conftest import echo_settings
from tests.sse import parse

MAC, COIN = "00:1B:44:11:3A:B7", "1A1zP1eP5QGefi2DMPTfTL5SLmv7DivfNa"
FILTERS = {"mac": FilterSettings(entity="MAC_ADDRESS"), "coin": FilterSettings(entity="CRYPTO", action="restore")}


@pytest.fixture
async def filters() -> Filters:
    found = Filters({**FILTERS, "email": FilterSettings()}, PresidioSettings())
    await found.open()
    return found


async def test_requests_and_answers(filters: Filters) -> None:
    """Entities are redacted and restored beside patterns, on the way in and out."""
    said = f"My card is {MAC}, my wallet {COIN}, and I am bob@example.com."
    given = GenerateRequest.of("chat", "m", {"messages": [{"content": said}]})
    asked = await filters.masked(await filters.redacted(given))
    assert asked.messages == [{"content": "My card is [MAC], my wallet <COIN_1>, and I am [EMAIL]."}]
    screen = filters.outward(asked)
    assert screen is not None
    assert screen.slow
    screen.begin()
    answer = f"Pay <COIN_1> or {MAC}. Bye eve@x.org! And"
    cut = [Delta(answer[at : at + 7]) for at in range(0, len(answer), 7)]
    deltas = [each for delta in cut for each in screen.put([delta])]
    assert "".join(each.text for each in deltas) == f"Pay {COIN} or [MAC]. Bye [EMAIL]!"
    deltas += screen.put([Delta(finish_reason="stop")])
    log = Transcript([Event(EventId(1, at), delta) for at, delta in enumerate(deltas, 1)])
    assert (log.text, log.finish_reason) == (f"Pay {COIN} or [MAC]. Bye [EMAIL]! And", "stop")


async def test_over_http(tmp_path: Path) -> None:
    """Streams and whole answers, from a model that does not wait to be read."""
    sections: Any = {"filters": {"mac": {"entity": "MAC_ADDRESS", "direction": "out"}, "coin": FILTERS["coin"]}}
    async with Server(echo_settings(tmp_path, **sections)) as server, aiohttp.ClientSession(server.url) as http:
        text = f"It is {MAC}. Pay {COIN} now. Bye"
        for more in ({}, {"stream": True}):
            async with http.post("/v1/chat/completions", json=conversation(text, **more)) as response:
                answer = await response.read()
        chunks = [frame.json["choices"][0]["delta"] for frame in parse(answer) if frame.data != "[DONE]"]
        said = [chunk.get("content", "") for chunk in chunks]
        assert "".join(said) == f"It is [MAC]. Pay {COIN} now. Bye"
        async with http.get(response.headers["Location"].removesuffix("?stream=true")) as response:
            assert (await response.json())["choices"][0]["message"]["content"] == "".join(said)


def shouts(text: str) -> Sequence[Found]:
    """Recognizes words in capitals, and sees a sentence only as a whole."""
    found, start = [], 0
    for word in text.split(" "):
        if word.isupper() and len(word) > 2:
            found.append(Found("shout", start, start + len(word)))
        start += len(word) + 1
    return found


pieces = st.one_of(
    st.sampled_from(["Hello there. ", "HELP me! ", "a ", "WORD", "\n", "bob@example.com. ", "3.5 ", "Sure?", " LOUD"]),
    st.sampled_from(["x" * 30 + " ", "x" * 45]),
)


@given(st.lists(pieces, max_size=12), st.data())
@settings(max_examples=150)
def test_sentences_do_not_depend_on_the_pieces(parts: list[str], data: st.DataObject) -> None:
    """Whatever pieces a text comes in, it is looked at in the same sentences, and never more than the limit waits
    beside what may become a match of a pattern."""
    text = "".join(parts)
    scanner = Scanner([known("email")])
    whole, end = Sentences(shouts, scanner, 60).scan(text)
    assert end == len(text)
    sentences, seen = Sentences(shouts, scanner, 60), list[Found]()
    start = 0
    cuts = sorted({0, len(text), *data.draw(st.lists(st.integers(0, len(text)), max_size=12))})
    for _, upto in pairwise(cuts):
        found, settled = sentences.scan(text[:upto], start, over=False)
        seen += found
        start = settled
        held, waiting = scanner.scan(text[:upto], start, over=False)
        assert len(text[start:upto].lstrip()) <= 60 + upto - waiting + sum(each.end - each.start for each in held)
    found, _ = sentences.scan(text, start)
    assert [*seen, *found] == whole


@pytest.mark.parametrize(
    ("entity", "presidio", "reason"),
    [
        ("PERSON", PresidioSettings(), "set presidio.model"),
        ("NONSENSE", PresidioSettings(), "known: .*CRYPTO"),
        ("CRYPTO", PresidioSettings(model="no_such_model"), "presidio.model = 'no_such_model': spaCy cannot load it"),
        ("CRYPTO", PresidioSettings(language="xx-nowhere"), "presidio.language = 'xx-nowhere'"),
    ],
)
async def test_what_presidio_cannot_do_is_said_at_the_start(
    entity: str, presidio: PresidioSettings, reason: str
) -> None:
    """An entity that nobody recognizes, a model that is not there: an error that says so, before there are requests."""
    with pytest.raises(ConfigError, match=reason):
        await Filters({"x": FilterSettings(entity=entity)}, presidio).open()


async def test_without_presidio(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the extra is missing, the error names it."""
    monkeypatch.setitem(__import__("sys").modules, "presidio_analyzer", None)
    with pytest.raises(ConfigError, match=r"pip install 'llmstream\[presidio\]'"):
        await Filters(FILTERS, PresidioSettings()).open()
