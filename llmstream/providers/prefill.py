"""What goes upstream: a request from the start, or on from where an answer was cut. Pure.

Members of the body that need no change go up byte for byte.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import msgspec
from msgspec import Raw

from llmstream.presets import Capabilities
from llmstream.providers.continuing import produced_tokens
from llmstream.transcript import Transcript
from llmstream.types import GenerateRequest, encode

Members = dict[str, Raw]

_EXTENSIONS: Final[dict[str, type]] = {
    "deadline_s": object,
    "durability": object,
    "echo": dict,
    "job_id": object,
    "on_cut": object,
    "on_disconnect": object,
    "priority": object,
    "provider": str,
    "session_id": object,
}
"""Members of a body that are meant for us; with a value of another type they are the upstream's own."""
_LIMITS: Final = ("max_tokens", "max_completion_tokens")

_TRUE, _FALSE = Raw(b"true"), Raw(b"false")
_WITH_USAGE = Raw(b'{"include_usage":true}')
_BASE64 = Raw(b'"base64"')
_SURVIVES = Raw(b'"continue"')
_COMES_BACK = Raw(b'"grace"')
_ANEW = Raw(b'"restart"')

_members = msgspec.json.Decoder(Members).decode
_list = msgspec.json.Decoder(list[Raw]).decode
_any = msgspec.json.decode


def upstream_body(request: GenerateRequest, so_far: Transcript | None, can: Capabilities) -> bytes:
    """The body as it came, without what was meant for us, as a stream; to go on behind ``so_far``."""
    body, nested = _members(request.raw), can.continue_by == "replay"
    for key in body.keys() & _EXTENSIONS.keys():
        if key == "echo" and nested:
            continue
        value = _any(body[key])
        if value is None or isinstance(value, _EXTENSIONS[key]):
            del body[key]
    if "model" not in body or _any(body["model"]) != request.model:
        body["model"] = Raw(encode(request.model))
    if request.kind == "embedding":
        body["encoding_format"] = _BASE64
        if nested:
            # Its id comes with the answer, too late to cancel it: it has to notice itself that nobody waits any more.
            body["on_disconnect"] = _COMES_BACK
        return encode(body)
    body["stream"] = _TRUE
    _ask_for_usage(body, can)
    if nested:
        body["on_disconnect"], body["on_cut"] = _SURVIVES, _ANEW
    elif so_far is not None:
        _continue(body, so_far, can)
    if can.rename and request.kind == "chat":
        body = _renamed(body, can.rename)
    return encode(body)


def _ask_for_usage(body: Members, can: Capabilities) -> None:
    options = body.get("stream_options")
    if can.stream_usage != "asked":
        body.pop("stream_options", None)
    elif options is None:
        body["stream_options"] = _WITH_USAGE
    else:
        said = _any(options)
        body["stream_options"] = Raw(encode({**(said if isinstance(said, dict) else {}), "include_usage": True}))


def _continue(body: Members, so_far: Transcript, can: Capabilities) -> None:
    messages = _list(body["messages"]) if "messages" in body else []
    marked = {"prefix": True} if can.continue_by in ("prefix", "prefix_repeated") else {}
    body["messages"] = Raw(encode(_prefilled(messages, so_far.text, marked)))
    if can.continue_by == "continue_final_message":
        body["continue_final_message"], body["add_generation_prompt"] = _TRUE, _FALSE
    for limit in body.keys() & _LIMITS:
        most = _any(body[limit])
        if isinstance(most, int):
            body[limit] = Raw(encode(most - produced_tokens(so_far)))


def _prefilled(messages: list[Raw], text: str, marked: Mapping[str, Any]) -> list[Any]:
    """Ends the conversation with what the assistant has said, in one message with a prefill of the client's own."""
    last = _any(messages[-1]) if messages else {}
    if last.get("role") == "assistant" and isinstance(last.get("content"), str):
        return [*messages[:-1], {**last, "content": last["content"] + text, **marked}]
    return [*messages, {"role": "assistant", "content": text, **marked}] if text else messages


def _renamed(body: Members, rename: tuple[str, ...]) -> Members:
    """Calls members what the API calls them; one that is there under that name already stays."""
    names = dict(pair.split("=") for pair in rename)
    if names.keys().isdisjoint(body):
        return body
    return {names.get(key, key): value for key, value in body.items() if key not in names or names[key] not in body}
