"""Tools that must be called: llama.cpp binds the answer to their JSON schema, since most templates do not. Pure."""

from __future__ import annotations

import secrets
from typing import Any

import msgspec

from llmstream.types import GenerateRequest


def uses_tools(request: GenerateRequest) -> bool:
    return bool(request.body.get("tools")) and request.body.get("tool_choice") != "none"


def required_tools(request: GenerateRequest) -> list[dict[str, Any]]:
    """The tools one of which must be called; none where the model may choose."""
    choice, tools = request.body.get("tool_choice"), list(request.body.get("tools") or [])
    if choice == "required":
        return tools
    if isinstance(choice, dict):
        return [tool for tool in tools if tool["function"]["name"] == choice["function"]["name"]]
    return []


def call_format(tools: list[dict[str, Any]]) -> dict[str, Any]:
    """A response format that fits exactly the calls of these tools."""
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool["function"]["name"]},
                "arguments": tool["function"].get("parameters") or {"type": "object"},
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    return {"type": "json_schema", "json_schema": {"name": "call", "schema": {"anyOf": calls}}}


def read_call(text: str) -> dict[str, Any] | None:
    """The ``tool_calls`` of a delta, from an answer in the format above; None when it was cut."""
    try:
        call = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    function = {"name": call["name"], "arguments": msgspec.json.encode(call["arguments"]).decode()}
    return {
        "tool_calls": [{"index": 0, "id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}]
    }
