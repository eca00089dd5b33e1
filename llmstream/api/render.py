"""Events as bytes on the wire. Pure: the same event always gives the same bytes, whoever reads it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import msgspec

from llmstream.errors import error_body
from llmstream.report import usage_body
from llmstream.store.entry import Entry
from llmstream.transcript import Transcript
from llmstream.types import Delta, EventId, Failure, Finished, Job, Payload, Restart, Started, Usage
from llmstream.vectors import decode_floats, vectors

_json: Callable[[Any], bytes] = msgspec.json.Encoder().encode

CANCELLED = Failure(
    message="The job was cancelled; what it had produced can still be read.", type="cancelled", code="cancelled"
)

# A plain OpenAI stream cannot take back what it showed.
RESTARTED = Failure(
    message="The answer had to start over: what came so far is void. Go on behind this event's id for the new one, "
    "or read it whole: the Location header says where.",
    code="restarted",
)


class Format(Protocol):
    """One wire format of one job's events."""

    @property
    def key(self) -> object:
        """Readers with equal keys get equal bytes, so these are made once."""

    def render(self, attempt: int, seq: int, data: Payload) -> bytes:
        """Zero or more SSE frames for the event ``attempt-seq``. Only the last bears this id, so that nobody resumes
        in between."""

    def broken(self, failure: Failure) -> bytes:
        """The frame that says why the stream ends before the log does. It is no event and has no id."""


def render_entry(entry: Entry, wire: Format) -> bytes:
    """The frames of an entry, made by whoever needs them first."""
    made = entry.rendered.get(wire.key)
    if made is None:
        attempt, render, payloads = entry.attempt, wire.render, entry.payloads
        if len(payloads) == 1:
            made = render(attempt, entry.start, payloads[0])
        else:
            made = b"".join([render(attempt, seq, data) for seq, data in enumerate(payloads, entry.start)])
        entry.rendered[wire.key] = made
    return made


class NativeFormat:
    """``data: {"type": "chunk", "content": "…"}`` … ``data: {"type": "complete"}``, each with its ``id:``."""

    key = "native"

    def render(self, attempt: int, seq: int, data: Payload) -> bytes:
        if isinstance(data, Finished) and data.usage is not None:
            usage = b"data: " + _json({"type": "usage", **usage_body(data.usage)}) + b"\n\n"
            return usage + _frame(attempt, seq, _native_finished(data))
        if isinstance(data, Delta) and not (data.text or data.fields):
            return b""  # only says why the answer ended; "complete" follows
        return _frame(attempt, seq, _native(attempt, data))

    def broken(self, failure: Failure) -> bytes:
        return b"data: %s\n\n" % _json({"type": "error", **error_body(failure)})


def _native(attempt: int, data: Payload) -> dict[str, Any]:
    if isinstance(data, Delta):
        body: dict[str, Any] = {"type": "chunk", "content": data.text}
        if data.index:
            body["index"] = data.index
        if data.fields:
            body["delta"] = data.fields
        return body
    if isinstance(data, Started):
        return {"type": "started", "attempt": attempt}
    if isinstance(data, Restart):
        return {"type": "restart", "reason": data.reason}
    return _native_finished(data)


def _native_finished(data: Finished) -> dict[str, Any]:
    if data.status == "cancelled":
        return {"type": "cancelled"}
    if data.failure is not None:
        return {"type": "error", **error_body(data.failure)}
    return {"type": "complete"} if data.reason is None else {"type": "complete", "finish_reason": data.reason}


def _frame(attempt: int, seq: int, body: dict[str, Any]) -> bytes:
    return b"id: %d-%d\ndata: %s\n\n" % (attempt, seq, _json(body))


_PLAIN_CHUNK = (
    b'id: %d-%d\ndata: %s,"choices":[{"index":%d,"delta":{"content":%s},"logprobs":null,"finish_reason":null}]}\n\n'
)
"""Nearly every event: text and nothing else."""


class ChatFormat:
    """OpenAI ``chat.completion.chunk`` events, each with its ``id:``; ends with ``[DONE]``.

    A restart voids what a reader has seen, which these events cannot say: it is an error to all but readers that begin
    there (``begins_at``).
    """

    def __init__(self, job: Job, *, include_usage: bool = False, begins_at: EventId | None = None) -> None:
        self.key = ("chat", include_usage, begins_at)
        self._include_usage = include_usage
        self._begins_at = begins_at
        self._choices = job.request.choices
        head = {
            "id": completion_id(job),
            "object": "chat.completion.chunk",
            "created": int(job.created_at),
            "model": job.request.model,
        }
        self._head = _json(head)[:-1]

    def render(self, attempt: int, seq: int, data: Payload) -> bytes:
        if isinstance(data, Delta):
            if data.fields is None and data.logprobs is None and data.finish_reason is None:
                return _PLAIN_CHUNK % (attempt, seq, self._head, data.index, _json(data.text))
            return b'id: %d-%d\ndata: %s,"choices":[%s]}\n\n' % (attempt, seq, self._head, _choice(data))
        if isinstance(data, Started):
            return self._roles(attempt, seq) if attempt == 1 else b""
        if isinstance(data, Restart):
            begins = (attempt, seq) == self._begins_at
            return self._roles(attempt, seq) if begins else _frame(attempt, seq, error_body(RESTARTED))
        return self._finished(attempt, seq, data)

    def broken(self, failure: Failure) -> bytes:
        return b"data: %s\n\n" % _json(error_body(failure))

    def _roles(self, attempt: int, seq: int) -> bytes:
        roles = b",".join(
            b'{"index":%d,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}' % index
            for index in range(self._choices)
        )
        return b'id: %d-%d\ndata: %s,"choices":[%s]}\n\n' % (attempt, seq, self._head, roles)

    def _finished(self, attempt: int, seq: int, data: Finished) -> bytes:
        failure = CANCELLED if data.status == "cancelled" else data.failure
        if failure is not None:
            return _frame(attempt, seq, error_body(failure))
        usage = b""
        if self._include_usage:
            counts = _json(usage_body(data.usage or Usage()))
            usage = b'data: %s,"choices":[],"usage":%s}\n\n' % (self._head, counts)
        return usage + b"id: %d-%d\ndata: [DONE]\n\n" % (attempt, seq)


def _choice(data: Delta) -> bytes:
    delta = {**(data.fields or {})}
    if data.text or not (delta or data.finish_reason):
        delta["content"] = data.text
    return b'{"index":%d,"delta":%s,"logprobs":%s,"finish_reason":%s}' % (
        data.index,
        _json(delta),
        _json(data.logprobs),
        _json(data.finish_reason),
    )


def completion_id(job: Job) -> str:
    return f"chatcmpl-{job.id}"


def chat_completion(job: Job, transcript: Transcript) -> dict[str, Any]:
    """The whole answer as one OpenAI ``chat.completion``."""
    choices = [
        {
            "index": index,
            "message": choice.message,
            "logprobs": choice.logprobs,
            "finish_reason": choice.finish_reason,
        }
        for index, choice in sorted(transcript.choices.items())
    ]
    return {
        "id": completion_id(job),
        "object": "chat.completion",
        "created": int(job.created_at),
        "model": job.request.model,
        "choices": choices,
        "usage": usage_body(transcript.usage or Usage()),
    }


def embedding_list(job: Job, transcript: Transcript, *, base64: bool) -> bytes:
    """All vectors of a job as an OpenAI list, as base64 or as numbers."""
    item = b'{"object":"embedding","index":%d,"embedding":%s}'
    data = [
        item % (index, _json(vector if base64 else decode_floats(vector)))
        for index, vector in enumerate(vectors(transcript))
    ]
    usage = usage_body(transcript.usage or Usage())
    del usage["completion_tokens"]
    model = _json(job.request.model)
    return b'{"object":"list","data":[%s],"model":%s,"usage":%s}' % (b",".join(data), model, _json(usage))


def embedding_result(job: Job, transcript: Transcript) -> dict[str, Any]:
    """The same as ``/embeddings/{task_id}`` has it."""
    found = [decode_floats(vector) for vector in vectors(transcript)]
    usage = usage_body(transcript.usage or Usage())
    del usage["completion_tokens"]
    shape = {"count": len(found), "dimensions": len(found[0])}
    return {"embeddings": found, "model": job.request.model, **shape, "usage": usage}
