"""The wire formats, on exact bytes."""

from __future__ import annotations

from typing import Any

import pytest

from llmstream.api.render import ChatFormat, Format, NativeFormat, chat_completion, render_entry
from llmstream.report import job_body
from llmstream.store.entry import Entry
from llmstream.transcript import Transcript
from llmstream.types import (
    Delta,
    Event,
    EventId,
    Failure,
    Finished,
    GenerateRequest,
    Job,
    JobState,
    Payload,
    Restart,
    Started,
    Usage,
)

HEAD = '"id":"chatcmpl-j1","object":"chat.completion.chunk","created":1700000000,"model":"m"'
HERE = EventId(1, 7)
USAGE = Usage(prompt_tokens=3, completion_tokens=2)
BROKEN = Failure(message="The engine crashed.", type="upstream_error", code="engine_crashed", status=502)


def job(**body: Any) -> Job:
    request = GenerateRequest.of(kind="chat", model="m", body={"model": "m", "messages": [], **body})
    return Job(id="j1", request=request, pool="m", created_at=1700000000.9)


def render(wire: Format, data: Payload, event_id: EventId = HERE) -> str:
    return wire.render(*event_id, data).decode()


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (Started("r", 1.0), 'id: 1-7\ndata: {"type":"started","attempt":1}\n\n'),
        (Delta(text="Hello"), 'id: 1-7\ndata: {"type":"chunk","content":"Hello"}\n\n'),
        (Delta(text='é\n\u2028"\\'), 'id: 1-7\ndata: {"type":"chunk","content":"é\\n\u2028\\"\\\\"}\n\n'),
        (Delta(text="b", index=1), 'id: 1-7\ndata: {"type":"chunk","content":"b","index":1}\n\n'),
        (
            Delta(fields={"tool_calls": [{"index": 0, "id": "c1"}]}),
            'id: 1-7\ndata: {"type":"chunk","content":"","delta":{"tool_calls":[{"index":0,"id":"c1"}]}}\n\n',
        ),
        (Delta(finish_reason="stop", usage=USAGE), ""),
        (Restart("why"), 'id: 1-7\ndata: {"type":"restart","reason":"why"}\n\n'),
        (Finished("completed", 2.0), 'id: 1-7\ndata: {"type":"complete"}\n\n'),
        (
            Finished("completed", 2.0, usage=USAGE),
            'data: {"type":"usage","prompt_tokens":3,"completion_tokens":2,"total_tokens":5}\n\n'
            'id: 1-7\ndata: {"type":"complete"}\n\n',
        ),
        (
            Finished("incomplete", 2.0, reason="length"),
            'id: 1-7\ndata: {"type":"complete","finish_reason":"length"}\n\n',
        ),
        (Finished("cancelled", 2.0), 'id: 1-7\ndata: {"type":"cancelled"}\n\n'),
        (
            Finished("failed", 2.0, failure=BROKEN),
            'id: 1-7\ndata: {"type":"error","error":{"message":"The engine crashed.","type":"upstream_error",'
            '"param":null,"code":"engine_crashed"}}\n\n',
        ),
    ],
)
def test_native_frames(data: Payload, expected: str) -> None:
    """A native frame holds exactly the words that the page of the queue system promises, and the event's id."""
    assert render(NativeFormat(), data) == expected


def choice(delta: str, *, index: int = 0, logprobs: str = "null", reason: str = "null") -> str:
    chosen = f'{{"index":{index},"delta":{delta},"logprobs":{logprobs},"finish_reason":{reason}}}'
    return f'id: 1-7\ndata: {{{HEAD},"choices":[{chosen}]}}\n\n'


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (Started("r", 1.0), choice('{"role":"assistant","content":""}')),
        (Delta(text="Grüße 👋"), choice('{"content":"Grüße 👋"}')),
        (Delta(text="x", index=2, tokens=(5,)), choice('{"content":"x"}', index=2)),
        (Delta(fields={"refusal": "no"}), choice('{"refusal":"no"}')),
        (
            Delta(text="t", fields={"tool_calls": [{"index": 0, "function": {"arguments": "{"}}]}),
            choice('{"tool_calls":[{"index":0,"function":{"arguments":"{"}}],"content":"t"}'),
        ),
        (
            Delta(text="a", logprobs={"content": [{"token": "a", "logprob": -0.5}]}),
            choice('{"content":"a"}', logprobs='{"content":[{"token":"a","logprob":-0.5}]}'),
        ),
        (Delta(finish_reason="tool_calls"), choice("{}", reason='"tool_calls"')),
        (Delta(), choice('{"content":""}')),
        (Finished("completed", 2.0, usage=USAGE), "id: 1-7\ndata: [DONE]\n\n"),
        (Finished("incomplete", 2.0, reason="length"), "id: 1-7\ndata: [DONE]\n\n"),
        (
            Finished("cancelled", 2.0),
            'id: 1-7\ndata: {"error":{"message":"The job was cancelled; what it had produced can still be read.",'
            '"type":"cancelled","param":null,"code":"cancelled"}}\n\n',
        ),
        (
            Finished("failed", 2.0, failure=BROKEN),
            'id: 1-7\ndata: {"error":{"message":"The engine crashed.","type":"upstream_error","param":null,'
            '"code":"engine_crashed"}}\n\n',
        ),
    ],
)
def test_chat_frames(data: Payload, expected: str) -> None:
    """An OpenAI frame is a chat.completion.chunk with the event's id; an error is an error body."""
    assert render(ChatFormat(job()), data) == expected


def test_chat_usage_comes_before_done() -> None:
    """With include_usage a chunk without choices tells the tokens, upstream details verbatim, right before [DONE]."""
    usage = Usage(prompt_tokens=3, completion_tokens=2, details={"prompt_tokens_details": {"cached_tokens": 1}})
    counts = '{"prompt_tokens":3,"completion_tokens":2,"total_tokens":5,"prompt_tokens_details":{"cached_tokens":1}}'
    expected = f'data: {{{HEAD},"choices":[],"usage":{counts}}}\n\nid: 1-7\ndata: [DONE]\n\n'
    assert render(ChatFormat(job(), include_usage=True), Finished("completed", 2.0, usage=usage)) == expected


def test_roles_of_all_choices_share_a_frame() -> None:
    """The roles of n choices come in one frame, so that no cut falls between frames of one id."""
    frame = render(ChatFormat(job(n=2)), Started("r", 1.0))
    role = '"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}'
    assert frame == f'id: 1-7\ndata: {{{HEAD},"choices":[{{"index":0,{role},{{"index":1,{role}]}}\n\n'


def test_chat_says_when_the_answer_starts_over() -> None:
    """A later attempt is silent when it goes on, and an error when the answer has to start over."""
    assert render(ChatFormat(job()), Started("r", 1.0), EventId(2, 0)) == ""
    frame = render(ChatFormat(job()), Restart("why"), EventId(2, 1))
    assert frame.startswith('id: 2-1\ndata: {"error":{"message":"The answer had to start over')
    assert frame.endswith('"code":"restarted"}}\n\n')


@pytest.mark.parametrize("wire", [NativeFormat(), ChatFormat(job())])
def test_what_breaks_a_stream_is_no_event(wire: Format) -> None:
    """The frame that says why a stream ends before its log has no id, so the client resumes behind what it has."""
    frame = wire.broken(BROKEN).decode()
    assert frame.startswith("data: {")
    assert '"error":{"message":"The engine crashed."' in frame


def test_an_entry_is_rendered_once_for_each_format() -> None:
    """Readers of one format share the bytes; those of another get their own."""
    entry = Entry(EventId(1, 2), [Delta(text="a"), Delta(text="b")], 10)
    first = render_entry(entry, NativeFormat())
    assert (
        first == b'id: 1-1\ndata: {"type":"chunk","content":"a"}\n\nid: 1-2\ndata: {"type":"chunk","content":"b"}\n\n'
    )
    assert render_entry(entry, NativeFormat()) is first
    assert render_entry(entry, ChatFormat(job())) != first


def test_the_rest_of_an_entry_is_rendered_anew() -> None:
    """A reader who resumes inside an entry gets the frames behind its position only."""
    entry = Entry(EventId(1, 2), [Delta(text="a"), Delta(text="b")], 10)
    render_entry(entry, NativeFormat())
    rest = entry.after(EventId(1, 1))
    assert render_entry(rest, NativeFormat()) == b'id: 1-2\ndata: {"type":"chunk","content":"b"}\n\n'


def test_whole_completion() -> None:
    """The whole answer is the fold of its events: text joined, tool calls merged, usage and reasons kept."""
    deltas = [
        Delta(text="Hi"),
        Delta(text="!", index=1),
        Delta(fields={"tool_calls": [{"index": 0, "id": "c", "function": {"name": "f", "arguments": "{"}}]}),
        Delta(fields={"tool_calls": [{"index": 0, "function": {"arguments": "}"}}]}),
        Delta(finish_reason="tool_calls"),
        Delta(index=1, finish_reason="stop"),
    ]
    payloads: list[Payload] = [Started("r", 1.0), *deltas, Finished("completed", 2.0, usage=USAGE)]
    transcript = Transcript(Event(EventId(1, seq), data) for seq, data in enumerate(payloads))
    body = chat_completion(job(n=2), transcript)
    assert body["choices"] == [
        {
            "index": 0,
            "message": {
                "role": "assistant",
                "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": "{}"}}],
                "content": "Hi",
                "refusal": None,
            },
            "logprobs": None,
            "finish_reason": "tool_calls",
        },
        {
            "index": 1,
            "message": {"role": "assistant", "content": "!", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        },
    ]
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    assert (body["id"], body["object"], body["created"]) == ("chatcmpl-j1", "chat.completion", 1700000000)


def test_job_body_of_a_failed_job() -> None:
    """A failed job's body keeps the partial text, the reason, and how long it waited and ran."""
    state = JobState(
        job(), status="failed", attempt=2, started_at=1700000001.9, finished_at=1700000004.9, failure=BROKEN
    )
    body = job_body(state, Transcript([Event(EventId(1, 0), Started("r", 1.0)), Event(EventId(1, 1), Delta(text="p"))]))
    assert (body["text"], body["status"], body["last_event_id"]) == ("p", "failed", "1-1")
    assert body["error"] == {
        "message": "The engine crashed.",
        "type": "upstream_error",
        "param": None,
        "code": "engine_crashed",
    }
    assert (body["timings"]["queue_s"], body["timings"]["run_s"]) == (1.0, 3.0)
