"""Which fields of an OpenAI request a local model takes, and with which values. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

from llmstream.errors import BadRequest
from llmstream.types import GenerateRequest, Kind

MAX_STOPS = 16

WITHOUT_EFFECT = frozenset({
    "metadata", "model", "parallel_tool_calls", "prediction", "prompt_cache_key", "prompt_cache_options",
    "prompt_cache_retention", "safety_identifier", "service_tier", "store", "stream", "stream_options", "user",
    "provider", "priority", "session_id", "on_disconnect", "on_cut", "deadline_s",
})  # fmt: skip
"""Fields that tune a hosted service or this gateway; the answer is the same without them."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "function_call": ("none",),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "reasoning_effort": ("none",),
    "suffix": ("",),
    "verbosity": ("medium",),
    "web_search_options": (),
}
"""Fields that no local model honours, with the values that ask for nothing."""

ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})

Rule = Callable[[Any], str | None]
"""Says what a value should have been, or None when it is right."""


def check_fields(request: GenerateRequest, also: Collection[str] = ()) -> None:
    """Raises BadRequest naming the first field that is wrong, unknown, or cannot be honoured here."""
    rules, required = RULES[request.kind]
    if request.body.get(required) is None:
        raise BadRequest(f"{required} is missing.", param=required)
    for name, value in request.body.items():
        if value is None or name in WITHOUT_EFFECT or name in also:
            continue
        if name in rules:
            expected = rules[name](value)
            if expected:
                raise BadRequest(f"{name} must be {expected}.", param=name)
        elif name not in NEUTRAL:
            raise BadRequest(f"{name} is not a field that local models know; leave it out.", param=name)
        elif not any(value == neutral and type(value) is type(neutral) for neutral in NEUTRAL[name]):
            raise BadRequest(f"{name} cannot be honoured by a local model; leave it out.", param=name)
    _check_together(request)


def _check_together(request: GenerateRequest) -> None:
    body = request.body
    if request.kind == "chat":
        if body.get("top_logprobs") is not None and not body.get("logprobs"):
            raise BadRequest("top_logprobs needs logprobs to be true.", param="top_logprobs")
        if body.get("tool_choice") not in (None, "none", "auto") and not body.get("tools"):
            raise BadRequest("tool_choice needs tools.", param="tool_choice")
        if isinstance(body.get("tool_choice"), dict):
            name = body["tool_choice"]["function"]["name"]
            if all(tool["function"]["name"] != name for tool in body["tools"]):
                raise BadRequest(f"tool_choice asks for {name!r}, which is not among the tools.", param="tool_choice")
        for at, message in enumerate(body["messages"]):
            _check_message(message, f"messages[{at}]")


def _check_message(message: Any, where: str) -> None:
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise BadRequest(f"{where} must be an object whose role is one of {', '.join(sorted(ROLES))}.", param=where)
    content = message.get("content")
    if content is None and (message["role"] != "assistant" or not message.get("tool_calls")):
        raise BadRequest(f"{where}.content is missing.", param=f"{where}.content")
    if isinstance(content, list):
        for at, part in enumerate(content):
            kind = part.get("type") if isinstance(part, dict) else None
            if kind not in ("text", "refusal") or not isinstance(part.get(kind), str):
                raise BadRequest(
                    f"{where}.content[{at}] is not text; this model reads nothing else.",
                    param=f"{where}.content[{at}]",
                )
    elif content is not None and not isinstance(content, str):
        raise BadRequest(f"{where}.content must be a text or a list of text parts.", param=f"{where}.content")


def _number(low: float, high: float) -> Rule:
    def rule(value: Any) -> str | None:
        right = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
        return None if right else f"a number from {low:g} to {high:g}"

    return rule


def _integer(low: int, high: int) -> Rule:
    def rule(value: Any) -> str | None:
        return None if type(value) is int and low <= value <= high else f"an integer from {low} to {high}"

    return rule


def _boolean(value: Any) -> str | None:
    return None if isinstance(value, bool) else "true or false"


def _stop(value: Any) -> str | None:
    stops = [value] if isinstance(value, str) else value
    right = isinstance(stops, list) and len(stops) <= MAX_STOPS and all(isinstance(s, str) and s for s in stops)
    return None if right else f"a text or a list of at most {MAX_STOPS} texts, none of them empty"


def _logit_bias(value: Any) -> str | None:
    def right(token: str, bias: Any) -> bool:
        number = isinstance(bias, int | float) and not isinstance(bias, bool) and math.isfinite(bias)
        return token.isascii() and token.isdigit() and len(token) <= 9 and number and -100 <= bias <= 100

    if isinstance(value, dict) and all(right(token, bias) for token, bias in value.items()):
        return None
    return "an object from token ids to numbers from -100 to 100"


def _response_format(value: Any) -> str | None:
    kind = value.get("type") if isinstance(value, dict) else None
    if kind in ("text", "json_object"):
        return None
    if kind != "json_schema":
        return "an object whose type is text, json_object or json_schema"
    holder = value.get("json_schema")
    right = isinstance(holder, dict) and isinstance(holder.get("schema"), dict)
    return None if right else 'of the form {"type": "json_schema", "json_schema": {"name": …, "schema": {…}}}'


def _tools(value: Any) -> str | None:
    def right(tool: Any) -> bool:
        function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
        return isinstance(function, dict) and isinstance(function.get("name"), str)

    if isinstance(value, list) and all(right(tool) for tool in value):
        return None
    return "a list of tools of type function, each with a name"


def _tool_choice(value: Any) -> str | None:
    function = value.get("function") if isinstance(value, dict) and value.get("type") == "function" else None
    if isinstance(function, dict) and isinstance(function.get("name"), str):
        return None
    return None if value in ("none", "auto", "required") else "none, auto, required or one function by name"


def _messages(value: Any) -> str | None:
    return None if isinstance(value, list) and value else "a list of at least one message"


def _prompt(value: Any) -> str | None:
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | list):
        value = value[0]
    tokens = isinstance(value, list) and value and all(type(token) is int and 0 <= token < 2**31 for token in value)
    return None if isinstance(value, str) or tokens else "one text or one list of token ids; send others separately"


def _inputs(value: Any) -> str | None:
    return None if isinstance(value, str | list) and value else "a text, a list of token ids, or a list of these"


_SAMPLING: dict[str, Rule] = {
    "temperature": _number(0, 2),
    "top_p": _number(0, 1),
    "top_k": _integer(0, 1_000_000),
    "min_p": _number(0, 1),
    "repetition_penalty": _number(0.01, 100),
    "frequency_penalty": _number(-2, 2),
    "presence_penalty": _number(-2, 2),
    "seed": _integer(-(2**63), 2**63 - 1),
    "stop": _stop,
    "logit_bias": _logit_bias,
    "max_tokens": _integer(1, 2**31 - 1),
    "n": _integer(1, 128),
}
CHAT: dict[str, Rule] = {
    **_SAMPLING,
    "messages": _messages,
    "max_completion_tokens": _integer(1, 2**31 - 1),
    "logprobs": _boolean,
    "top_logprobs": _integer(0, 20),
    "response_format": _response_format,
    "tools": _tools,
    "tool_choice": _tool_choice,
}
COMPLETION: dict[str, Rule] = {**_SAMPLING, "prompt": _prompt, "logprobs": _integer(0, 5)}
EMBEDDING: dict[str, Rule] = {
    "input": _inputs,
    "dimensions": _integer(1, 2**31 - 1),
    "encoding_format": lambda value: None if value in ("float", "base64") else "float or base64",
}
RULES: Mapping[Kind, tuple[dict[str, Rule], str]] = {
    "chat": (CHAT, "messages"),
    "completion": (COMPLETION, "prompt"),
    "embedding": (EMBEDDING, "input"),
}
"""For each kind its fields, and the one that it cannot do without."""
