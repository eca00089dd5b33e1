"""How many tokens a request may use, before anybody has counted them. Pure."""

from __future__ import annotations

from typing import Any

from llmstream.types import GenerateRequest

BYTES_PER_TOKEN = 3
"""Text of most languages has more; so the estimate is rather too high."""
PART_TOKENS = 1000
"""What an image or another part that is no text counts."""
MESSAGE_TOKENS = 8
ANSWER_TOKENS = 1024
"""Longest answer of a request that sets no limit. A longer one is counted when it is over."""


def most_tokens(request: GenerateRequest, longest: int = ANSWER_TOKENS) -> int:
    """Tokens of the prompt, estimated, and of the longest answer: ``longest`` where the request sets no limit."""
    if request.kind == "embedding":
        return prompt_tokens(request)
    return prompt_tokens(request) + (request.max_tokens or longest) * request.choices


def prompt_tokens(request: GenerateRequest) -> int:
    """Tokens of the prompt or inputs, estimated from their size."""
    if request.kind == "embedding":
        return sum(_tokens(value) if isinstance(value, str) else len(value) for value in request.inputs)
    body = request.body
    told = [body.get("prompt"), body.get("tools"), body.get("response_format")]
    return sum(map(_tokens, [*request.messages, *told]))


def _tokens(value: Any) -> int:
    if isinstance(value, str):
        return -(-len(value.encode(errors="replace")) // BYTES_PER_TOKEN)
    if isinstance(value, dict):
        if value.get("type") not in (None, "text", "function") and "role" not in value:
            return PART_TOKENS
        own = MESSAGE_TOKENS if "role" in value else 0
        return own + sum(_tokens(inner) for name, inner in value.items() if name != "role")
    if isinstance(value, list):
        return sum(map(_tokens, value))
    return 1 if value is not None else 0
