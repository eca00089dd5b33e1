"""Events as bytes on the wire. Pure: the same event always gives the same bytes, whoever reads it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import msgspec

from llmstream.errors import error_body
from llmstream.store.entry import Entry
from llmstream.transcript import Transcript
from llmstream.types import Delta, Event, Failure, Finished, Job, JobState, Payload, Restart, Started, Usage

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

    def render(self, event: Event) -> bytes:
        """Zero or more SSE frames. Only the last bears the event's id, so that nobody resumes in between."""

    def broken(self, failure: Failure) -> bytes:
        """The frame that says why the stream ends before the log does. It is no event and has no id."""


def render_entry(entry: Entry, wire: Format) -> bytes:
    """The frames of an entry, made by whoever needs them first."""
    made = entry.rendered.get(wire.key)
    if made is None:
        made = entry.rendered[wire.key] = b"".join([wire.render(event) for event in entry.events])
    return made


class NativeFormat:
    """``data: {"type": "chunk", "content": "…"}`` … ``data: {"type": "complete"}``, each with its ``id:``."""

    key = "native"

    def render(self, event: Event) -> bytes:
        data = event.data
        if isinstance(data, Finished) and data.usage is not None:
            usage = b"data: " + _json({"type": "usage", **usage_body(data.usage)}) + b"\n\n"
            return usage + _frame(event, _native_finished(data))
        if isinstance(data, Delta) and not (data.text or data.fields):
            return b""  # only says why the answer ended; "complete" follows
        return _frame(event, _native(event.id.attempt, data))

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


def _frame(event: Event, body: dict[str, Any]) -> bytes:
    return b"id: %d-%d\ndata: %s\n\n" % (*event.id, _json(body))


class ChatFormat:
    """OpenAI ``chat.completion.chunk`` events, each with its ``id:``; ends with ``[DONE]``."""

    def __init__(self, job: Job, *, include_usage: bool = False) -> None:
        self.key = ("chat", include_usage)
        self._include_usage = include_usage
        self._job = job
        head = {
            "id": completion_id(job),
            "object": "chat.completion.chunk",
            "created": int(job.created_at),
            "model": job.request.model,
        }
        self._head = _json(head)[:-1]

    def render(self, event: Event) -> bytes:
        data = event.data
        if isinstance(data, Delta):
            return b"id: %d-%d\ndata: %s%s}\n\n" % (*event.id, self._head, _choice(data))
        if isinstance(data, Started):
            return self._roles(event) if event.id.attempt == 1 else b""
        if isinstance(data, Restart):
            return self._error(event, RESTARTED)
        return self._finished(event, data)

    def broken(self, failure: Failure) -> bytes:
        return b"data: %s\n\n" % _json(error_body(failure))

    def _roles(self, event: Event) -> bytes:
        roles = b",".join(
            b'{"index":%d,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}' % index
            for index in range(self._job.request.choices)
        )
        return b'id: %d-%d\ndata: %s,"choices":[%s]}\n\n' % (*event.id, self._head, roles)

    def _finished(self, event: Event, data: Finished) -> bytes:
        if data.status == "cancelled":
            return self._error(event, CANCELLED)
        if data.failure is not None:
            return self._error(event, data.failure)
        usage = b""
        if self._include_usage:
            counts = _json(usage_body(data.usage or Usage()))
            usage = b'data: %s,"choices":[],"usage":%s}\n\n' % (self._head, counts)
        return usage + b"id: %d-%d\ndata: [DONE]\n\n" % event.id

    @staticmethod
    def _error(event: Event, failure: Failure) -> bytes:
        return _frame(event, error_body(failure))


def _choice(data: Delta) -> bytes:
    delta = {**(data.fields or {})}
    if data.text or not (delta or data.finish_reason):
        delta["content"] = data.text
    return b',"choices":[{"index":%d,"delta":%s,"logprobs":%s,"finish_reason":%s}]' % (
        data.index,
        _json(delta),
        _json(data.logprobs),
        _json(data.finish_reason),
    )


def completion_id(job: Job) -> str:
    return f"chatcmpl-{job.id}"


def usage_body(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        **(usage.details or {}),
    }


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


def job_body(state: JobState, transcript: Transcript) -> dict[str, Any]:
    """``GET /chat/{task_id}``, apart from the position in the queue."""
    job = state.job
    started, finished = state.started_at, state.finished_at
    usage = state.usage or transcript.usage
    return {
        "task_id": job.id,
        "session_id": job.session_id,
        "status": state.status,
        "model": job.request.model,
        "priority": job.priority,
        "lane": job.lane,
        "attempt": state.attempt,
        "continues": job.continues,
        "text": transcript.text,
        "finish_reason": transcript.finish_reason or state.reason,
        "usage": usage_body(usage) if usage else None,
        "error": error_body(state.failure)["error"] if state.failure else None,
        "last_event_id": str(transcript.position),
        "timings": {
            "created_at": job.created_at,
            "started_at": started,
            "finished_at": finished,
            "queue_s": round((started or finished or job.created_at) - job.created_at, 6) if started else None,
            "run_s": round(finished - started, 6) if started and finished else None,
        },
    }
