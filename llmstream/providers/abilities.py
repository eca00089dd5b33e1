"""Whether an API can do what a request asks for. Pure."""

from __future__ import annotations

from typing import Any

import msgspec

from llmstream.errors import BadRequest
from llmstream.presets import Capabilities
from llmstream.types import GenerateRequest


def check_capabilities(request: GenerateRequest, can: Capabilities, provider: str) -> None:
    """Raises BadRequest naming the first member that asks for what the provider cannot do."""
    if can.choices and can.tools and can.logprobs and can.json_schema:
        return
    body = request.body
    shape = body.get("response_format")
    asked = {
        "n": (can.choices, request.choices > 1, "choices", "gives one choice for a request"),
        "tools": (can.tools, bool(body.get("tools") or body.get("functions")), "tools", "cannot call tools"),
        "logprobs": (can.logprobs, _wanted(body.get("logprobs")), "logprobs", "tells no log probabilities"),
        "response_format": (
            can.json_schema,
            isinstance(shape, dict) and shape.get("type") == "json_schema",
            "json_schema",
            "cannot hold an answer to a JSON schema",
        ),
    }
    for param, (able, wanted, setting, cannot) in asked.items():
        if wanted and not able:
            raise BadRequest(
                f"{param}: the provider {provider!r} {cannot}; leave it out or ask another provider. If it can by now, "
                f"set providers.{provider}.{setting} to true.",
                param=param,
                code="unsupported_by_provider",
            )


def told(can: Capabilities) -> dict[str, Any]:
    """Capabilities as ``GET /v1/models`` tells them."""
    shown = ("tools", "json_schema", "logprobs", "choices", "embeddings", "continue_by", "stream_usage")
    return {name: value for name, value in msgspec.structs.asdict(can).items() if name in shown}


def _wanted(logprobs: Any) -> bool:
    return logprobs is not None and logprobs is not False
