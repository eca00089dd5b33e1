"""What goes upstream: a request from the start, or on from where an answer was cut. Pure."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from llmstream.transcript import Transcript
from llmstream.types import Delta, GenerateRequest, Usage

_EXTENSIONS: Final[dict[str, type]] = {
    "deadline_s": object,
    "echo": dict,
    "job_id": object,
    "on_cut": object,
    "on_disconnect": object,
    "priority": object,
    "provider": str,
    "session_id": object,
}
"""Members of a body that are meant for us; with a value of another type they are the upstream's own."""


def upstream_body(request: GenerateRequest, so_far: Transcript | None) -> dict[str, Any]:
    """The body as it came, without what was meant for us, as a stream; with ``so_far`` as prefill."""
    body = {key: value for key, value in request.body.items() if not _is_ours(key, value)}
    body["model"] = request.model
    body["stream"] = True
    options = body.get("stream_options")
    body["stream_options"] = {**(options if isinstance(options, dict) else {}), "include_usage": True}
    if so_far is not None:
        body["messages"] = _prefilled(request.messages, so_far.text)
        for limit in ("max_tokens", "max_completion_tokens"):
            if isinstance(body.get(limit), int):
                body[limit] -= produced_tokens(so_far)
    return body


def _is_ours(key: str, value: Any) -> bool:
    return key in _EXTENSIONS and (value is None or isinstance(value, _EXTENSIONS[key]))


def _prefilled(messages: list[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    """Ends the conversation with what the assistant has said, in one message with a prefill of the client's own."""
    last = messages[-1] if messages else {}
    if last.get("role") == "assistant" and isinstance(last.get("content"), str):
        return [*messages[:-1], {**last, "content": last["content"] + text}]
    return [*messages, {"role": "assistant", "content": text}] if text else messages


def produced_tokens(so_far: Transcript | None) -> int:
    """Tokens of an answer so far, as well as they are known: the pieces it came in where nobody counted."""
    if so_far is None:
        return 0
    if so_far.usage is not None:
        return so_far.usage.completion_tokens
    first = so_far.choices.get(0)
    logprobs = first.logprobs if first else None
    return len(so_far.tokens) or len((logprobs or {}).get("content", ())) or (first.pieces if first else 0)


def with_earlier(delta: Delta, so_far: Transcript, produced: int) -> Delta:
    """Counts what earlier attempts produced, which the upstream took for a part of the prompt."""
    if delta.usage is None:
        return delta
    usage = Usage(
        prompt_tokens=so_far.usage.prompt_tokens if so_far.usage else max(delta.usage.prompt_tokens - produced, 0),
        completion_tokens=delta.usage.completion_tokens + produced,
        details=delta.usage.details,
    )
    return msgspec.structs.replace(delta, usage=usage)
