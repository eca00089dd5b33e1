"""Whether an API can do what a request asks for. Pure."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Struct

from llmstream.errors import BadRequest
from llmstream.presets import Capabilities
from llmstream.types import GenerateRequest


class _Asked(Struct, frozen=True):
    """What not every API can do, read without making objects of the rest of a body."""

    tools: Any = None
    functions: Any = None
    logprobs: Any = None
    response_format: Any = None

    @property
    def shape(self) -> object:
        """The type of the response format."""
        shape = self.response_format
        return shape.get("type") if isinstance(shape, dict) else "text" if shape is None else None


_asked = msgspec.json.Decoder(_Asked).decode


def check_capabilities(request: GenerateRequest, can: Capabilities, provider: str) -> None:
    """Raises BadRequest naming the first member that asks for what the provider cannot do."""
    if request.kind == "embedding":
        if not can.embeddings:
            raise _unable("model", provider, "makes no embeddings", "embeddings")
        return
    if can.choices and can.tools and can.logprobs and can.json_schema:
        return
    body = _asked(request.raw)
    asked = {
        "n": (can.choices, request.choices > 1, "choices", "gives one choice for a request"),
        "tools": (can.tools, bool(body.tools or body.functions), "tools", "cannot call tools"),
        "logprobs": (can.logprobs, body.logprobs not in (None, False), "logprobs", "tells no log probabilities"),
        "response_format": (
            can.json_schema,
            body.shape == "json_schema",
            "json_schema",
            "cannot hold an answer to a JSON schema",
        ),
    }
    for param, (able, wanted, setting, cannot) in asked.items():
        if wanted and not able:
            raise _unable(param, provider, f"{cannot}; leave it out", setting)


def _unable(param: str, provider: str, cannot: str, setting: str) -> BadRequest:
    return BadRequest(
        f"{param}: the provider {provider!r} {cannot} or ask another provider. If it can by now, set "
        f"providers.{provider}.{setting} to true.",
        param=param,
        code="unsupported_by_provider",
    )


def told(can: Capabilities) -> dict[str, Any]:
    """Capabilities as ``GET /v1/models`` tells them."""
    shown = ("tools", "json_schema", "logprobs", "choices", "embeddings", "continue_by", "stream_usage")
    return {name: value for name, value in msgspec.structs.asdict(can).items() if name in shown}


def plain_text(request: GenerateRequest) -> bool:
    """Whether the answer is bound to no form."""
    return _asked(request.raw).shape == "text"
