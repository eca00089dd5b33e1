from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmstream.providers import chunks
from llmstream.providers.chunks import END_OF_EVENT, Answer, ChunkStream, EventStream, TooLarge, WholeAnswer
from llmstream.types import Delta, Usage

DONE = b"data: [DONE]\n\n"


def chunk(delta: dict[str, Any] | None = None, *, finish: str | None = None, index: int = 0, **members: Any) -> bytes:
    choice = {"index": index, "delta": delta or {}, "logprobs": members.pop("logprobs", None), "finish_reason": finish}
    return b"data: " + json.dumps({"id": "c", "choices": [choice], **members}, ensure_ascii=False).encode() + b"\n\n"


def read(data: bytes, choices: int = 1) -> tuple[list[Delta], Answer]:
    answer = ChunkStream(choices)
    deltas = answer.feed(data)
    return deltas + ([] if answer.ended else answer.close()), answer


USAGE = b'data: {"usage": {"prompt_tokens": 5, "completion_tokens": 4, "total_tokens": 9, "x": {"y": 1}}}\n\n'
STREAM = b"".join(
    (
        b"\xef\xbb\xbf: hello\n\n",
        chunk({"role": "assistant", "content": ""}),
        chunk({"content": "Grüße 🌍"}),
        chunk({"reasoning_content": "hm"}, usage=None),
        b": ping\r\n\r\n",
        chunk({"content": " x"}).replace(b"\n", b"\r\n"),
        b'event: message\nid: 4\nretry: 10\ndata: {"choices": [{"delta":\ndata:{"content": "y"}}]}\n\n',
        chunk({"content": "z"}).replace(b"\n", b"\r"),
        chunk({"tool_calls": [{"index": 0, "function": {"arguments": "{"}}]}),
        chunk(finish="stop"),
        USAGE,
        DONE,
    )
)
DELTAS = [
    Delta("Grüße 🌍"),
    Delta(fields={"reasoning_content": "hm"}),
    Delta(" x"),
    Delta("y"),
    Delta("z"),
    Delta(fields={"tool_calls": [{"index": 0, "function": {"arguments": "{"}}]}),
    Delta(finish_reason="stop"),
    Delta(usage=Usage(5, 4, {"x": {"y": 1}})),
]


@pytest.mark.parametrize(
    ("data", "events"),
    [
        (b"data: YHOO\ndata: +2\ndata: 10\n\n", [b"YHOO\n+2\n10"]),
        (b": test stream\n\ndata: first event\nid: 1\n\ndata:second event\nid\n\ndata:  third event\n", None),
        (b"data\n\ndata\ndata\n\ndata:", [b"", b"\n"]),
        (b"data:test\n\ndata: test\n\n", [b"test", b"test"]),
        (b"datafoo: x\ndata : y\nfoo\n\n", []),
        (b"data: a\r\rdata: b\r\n\r\ndata: c\n\r", [b"a", b"b", b"c"]),
        (b"\xef\xbb\xbfdata: a\n\n\xef\xbb\xbfdata: b\n\n", [b"a"]),
        (b"data: a\x0b\x0c\x1c\xc2\x85b\n\n", [b"a\x0b\x0c\x1c\xc2\x85b"]),
    ],
)
def test_standard_examples(data: bytes, events: list[bytes] | None) -> None:
    """The examples of the standard and its corner cases give the events that the standard asks for."""
    expected = [b"first event", b"second event"] if events is None else events
    assert EventStream().feed(data) == expected


def test_last_event_without_an_empty_line() -> None:
    """An event that only lacks its empty line is not lost when the stream ends in good order."""
    stream = EventStream()
    assert stream.feed(b"data: a\n\ndata: b") == [b"a"]
    assert stream.feed(END_OF_EVENT) == [b"b"]


def test_events_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """An event that never ends is refused once it is too large, however many good events came before it."""
    monkeypatch.setattr(chunks, "MAX_EVENT_BYTES", 1000)
    stream = EventStream()
    for _ in range(100):
        assert stream.feed(b"data: 0123456789\n\n") == [b"0123456789"]
    for _ in range(55):
        stream.feed(b"data: 0123456789\n")
    with pytest.raises(TooLarge):
        stream.feed(b"data: 0123456789" * 10)
    answer = ChunkStream(1)
    for _ in range(100):
        answer.feed(b"data: 0123456789")
    assert answer.ended
    assert answer.failure == "sent an event of more than 1000 bytes"


def test_stream() -> None:
    """Text, other members, finish reason and usage of a stream come out as deltas, in order."""
    deltas, answer = read(STREAM)
    assert deltas == DELTAS
    assert answer.failure is None


@given(st.lists(st.integers(0, len(STREAM))))
def test_any_split_reads_the_same(cuts: list[int]) -> None:
    """However a stream's bytes are split, its deltas are the same."""
    bounds = [0, *sorted(cuts), len(STREAM)]
    answer = ChunkStream(1)
    deltas = [delta for a, b in pairwise(bounds) for delta in answer.feed(STREAM[a:b])]
    assert deltas == DELTAS
    assert answer.ended
    assert answer.failure is None


@given(st.integers(0, len(STREAM) - len(USAGE + DONE)), st.sampled_from(["cut", "end"]))
def test_any_prefix_is_told_from_the_whole(length: int, how: str) -> None:
    """A stream that stops before its finish reason never counts as whole and gives nothing that was not sent."""
    answer = ChunkStream(1)
    deltas = answer.feed(STREAM[:length])
    if how == "cut":
        answer.cut("stopped")
    else:
        deltas += answer.close()
    assert deltas == DELTAS[: len(deltas)]
    assert answer.ended
    assert (answer.failure is None) == (DELTAS[6] in deltas)


@pytest.mark.parametrize(
    ("data", "failure"),
    [
        (b"", "a finish reason is missing"),
        (DONE, "said [DONE] before"),
        (chunk({"content": "a"}), "a finish reason is missing"),
        (chunk({"content": "a"}) + DONE, "said [DONE] before"),
        (b"data: {nonsense}\n\n", "sent something malformed"),
        (b'data: {"choices": "many"}\n\n', "sent something malformed"),
        (b"data: [1]\n\n", "sent something malformed"),
        (b"data: " + b"[" * 100_000 + b"\n\n", "sent something malformed"),
        (b'data: {"choices": [{"delta": {"content": "\xff"}}]}\n\n', "sent something malformed"),
        (b'data: {"choices": [{"delta": {"content": "\\ud800"}}]}\n\n', "sent something malformed"),
        (b'data: {"error": {"message": "boom", "code": 502}}\n\n', "reported an error instead of an answer: boom"),
        (b'data: {"error": "boom"}\n\n', "reported an error instead of an answer: boom"),
        (chunk(finish="error"), "gave up in the middle"),
        (chunk(finish="stop", error={"message": "boom"}), "boom"),
    ],
)
def test_faults(data: bytes, failure: str) -> None:
    """A stream that ends early, is malformed or reports an error fails and says so."""
    _, answer = read(data)
    assert answer.failure is not None
    assert failure in answer.failure


def test_text_before_a_fault_is_kept() -> None:
    """What was sent before a malformed chunk in the same bytes is not lost, and nothing behind it is read."""
    deltas, answer = read(chunk({"content": "a"}) + b"data: {\n\n" + chunk({"content": "b"}, finish="stop") + DONE)
    assert deltas == [Delta("a")]
    assert answer.failure is not None


@pytest.mark.parametrize("end", [b"", DONE, b"data: [DONE]", b"data:[DONE] \n\n"])
def test_whole_with_or_without_done(end: bytes) -> None:
    """A stream with a finish reason is whole, with [DONE] or without it."""
    deltas, answer = read(chunk({"content": "a"}) + chunk(finish="length") + end)
    assert deltas == [Delta("a"), Delta(finish_reason="length")]
    assert answer.failure is None


def test_cut_behind_the_finish_reason() -> None:
    """A connection that breaks after the finish reason leaves the answer whole."""
    answer = ChunkStream(1)
    answer.feed(chunk({"content": "a"}, finish="stop"))
    answer.cut("broke")
    assert answer.ended
    assert answer.failure is None


@pytest.mark.parametrize("finished", [(), (0,), (1,), (0, 1)])
def test_every_choice_must_finish(finished: tuple[int, ...]) -> None:
    """An answer of two choices is whole when both have a finish reason."""
    data = chunk({"content": "a"}) + chunk({"content": "b"}, index=1)
    _, answer = read(data + b"".join(chunk(finish="stop", index=index) for index in finished) + DONE, choices=2)
    assert (answer.failure is None) == (finished == (0, 1))


def test_choices_that_nobody_asked_for() -> None:
    """A choice that was begun must finish, even if it is one more than asked for."""
    _, answer = read(chunk({"content": "a"}, index=1) + chunk(finish="stop") + DONE, choices=1)
    assert answer.failure is not None


@pytest.mark.parametrize(
    ("delta", "expected"),
    [
        ({"role": "assistant"}, None),
        ({"role": "assistant", "content": "", "refusal": None, "tool_calls": [], "reasoning": ""}, None),
        ({"role": "assistant", "content": "x", "refusal": None}, Delta("x")),
        ({"content": None, "refusal": "no"}, Delta(fields={"refusal": "no"})),
        ({"content": [{"type": "thinking"}]}, Delta(fields={"content": [{"type": "thinking"}]})),
        ({"content": "x", "audio": {"id": "a"}, "odd": 0}, Delta("x", fields={"audio": {"id": "a"}, "odd": 0})),
    ],
)
def test_members(delta: dict[str, Any], expected: Delta | None) -> None:
    """Members of a delta are kept as they are; the role and what is empty are not worth an event."""
    deltas, _ = read(chunk(delta))
    assert deltas == ([expected] if expected else [])


def test_logprobs() -> None:
    """Log probabilities come with the text they belong to."""
    logprobs = {"content": [{"token": "x", "logprob": -0.1}], "refusal": None}
    assert read(chunk({"content": "x"}, logprobs=logprobs))[0] == [Delta("x", logprobs=logprobs)]


def test_usage_in_every_chunk() -> None:
    """Usage that comes with text stays with it, and odd numbers do not break the stream."""
    data = chunk({"content": "x"}, usage={"prompt_tokens": 2, "completion_tokens": 1, "total_tokens": 3})
    odd = chunk({"content": "y"}, usage={"prompt_tokens": None, "completion_tokens": "many"})
    assert read(data + odd)[0] == [Delta("x", usage=Usage(2, 1)), Delta("y", usage=Usage())]


def test_completion_chunks() -> None:
    """The text of a legacy completion comes from its choices."""
    data = b'data: {"choices": [{"index": 0, "text": "a", "logprobs": {"tokens": ["a"]}, "finish_reason": "stop"}]}\n\n'
    assert read(data)[0] == [Delta("a", logprobs={"tokens": ["a"]}, finish_reason="stop")]


def test_whole_answer() -> None:
    """An answer as one JSON object reads like a stream, with the indexes that streamed tool calls have."""
    body = {
        "object": "chat.completion",
        "choices": [
            {"index": 0, "message": {"role": "assistant", "content": "hi", "refusal": None}, "finish_reason": "stop"},
            {
                "index": 1,
                "message": {"role": "assistant", "content": None, "tool_calls": [{"id": "a"}, {"id": "b"}]},
                "finish_reason": "tool_calls",
            },
        ],
        "usage": {"prompt_tokens": 2, "completion_tokens": 1, "total_tokens": 3},
    }
    raw = json.dumps(body).encode()
    answer = WholeAnswer(2)
    assert answer.feed(raw[:50]) == answer.feed(raw[50:]) == []
    calls = [{"index": 0, "id": "a"}, {"index": 1, "id": "b"}]
    assert answer.close() == [
        Delta("hi", finish_reason="stop"),
        Delta(index=1, fields={"tool_calls": calls}, finish_reason="tool_calls", usage=Usage(2, 1)),
    ]
    assert answer.failure is None


@pytest.mark.parametrize("body", [b"", b"{}", b'{"choices": []}', b'{"error": {"message": "boom"}}', b'{"choices": [{'])
def test_whole_answer_faults(body: bytes) -> None:
    """A JSON object that holds no whole answer is a failure."""
    answer = WholeAnswer(1)
    answer.feed(body)
    assert answer.close() == []
    assert answer.failure is not None


def test_whole_answer_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A JSON object that never ends is refused once it is too large."""
    monkeypatch.setattr(chunks, "MAX_EVENT_BYTES", 1000)
    answer = WholeAnswer(1)
    answer.feed(b" " * 1001)
    assert answer.failure == "sent an answer of more than 1000 bytes"
