from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.sse import Frame, Parser, parse

EVERYTHING = (
    b"\xef\xbb\xbf: hello\r\rid: 1\rdata: a\r\ndata:b\n\nevent: x\ndata: \xc3\xa9\r\n\r\nretry: 250\nid\ndata\n\n"
)


@pytest.mark.parametrize(
    ("raw", "frames"),
    [
        (b"data: YHOO\ndata: +2\ndata: 10\n\n", [Frame("YHOO\n+2\n10")]),
        (
            b": test stream\n\ndata: first event\nid: 1\n\ndata:second event\nid\n\ndata:  third event\n\n",
            [Frame("first event", "1"), Frame("second event", ""), Frame(" third event")],
        ),
        (b"data\n\ndata\ndata\n\ndata:", [Frame(""), Frame("\n")]),
        (b"data:test\n\ndata: test\n\n", [Frame("test"), Frame("test")]),
        (b"event: add\ndata: 73857293\n\nevent: remove\ndata: 2153\n\n", None),
        (b"id: 4\n\ndata: x\n", []),
        (b"data:a\rdata:b\r\n\r\n", [Frame("a\nb")]),
        (b"id: a\0b\ndata: x\n\n", [Frame("x")]),
    ],
)
def test_the_examples_of_the_standard(raw: bytes, frames: list[Frame] | None) -> None:
    """The standard's examples give the events that its text says."""
    expected = [Frame("73857293", None, "add"), Frame("2153", None, "remove")] if frames is None else frames
    assert parse(raw) == expected


def test_an_id_without_data_still_counts() -> None:
    """An id that comes without data dispatches nothing and is remembered all the same."""
    parser = Parser()
    assert parser.feed(b"id: 7\n\n: note\nretry: 12\nretry: 1x\n\n") == []
    assert (parser.last_id, parser.comments, parser.retry_ms) == ("7", ["note"], 12)


@given(st.lists(st.integers(0, len(EVERYTHING)), max_size=8))
def test_cuts_change_nothing(cuts: list[int]) -> None:
    """Wherever the bytes are cut, the same events come out."""
    parser, found, start = Parser(), [], 0
    for end in [*sorted(cuts), len(EVERYTHING)]:
        found += parser.feed(EVERYTHING[start:end])
        start = end
    assert found == [Frame("a\nb", "1"), Frame("é", None, "x"), Frame("", "")]
    assert (parser.retry_ms, parser.last_id) == (250, "")
