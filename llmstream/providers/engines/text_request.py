"""What an engine that only completes text takes from an OpenAI request, and what it refuses."""

from __future__ import annotations

import math
import secrets
from typing import Any

from msgspec import Struct

from llmstream.providers.engines.chat_template import Message
from llmstream.types import GenerateRequest

# Values that ask for nothing; any other value asks for something this engine has not got.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "n": (1,),
    "best_of": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "reasoning_effort": ("none",),
    "suffix": ("",),
    "echo": (False,),
    "min_p": (0,),
    "grammar": ("",),
}


class Refused(ValueError):
    """The request cannot run here; ``param`` names the field."""

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param


class Sampling(Struct, frozen=True):
    """How the next token is chosen; temperature 0 takes the likeliest."""

    temperature: float
    top_p: float
    top_k: int
    repetition_penalty: float
    seed: int
    stop: tuple[str, ...]


def check_fields(request: GenerateRequest) -> None:
    """Raises Refused for a field that asks for what plain text generation cannot do."""
    for name, neutral in _NEUTRAL.items():
        value = request.body.get(name)
        # True == 1 in Python, not in JSON.
        if value is not None and not any(
            value == ok and isinstance(value, bool) == isinstance(ok, bool) for ok in neutral
        ):
            raise Refused(f"the ctransformers engine does not support {name}={value!r:.80}; use engine llamacpp", name)


def read_sampling(request: GenerateRequest) -> Sampling:
    """Reads the sampling fields, with OpenAI's defaults (temperature 1, top_p 1) and top_k 40."""
    body = request.body
    seed = _number(body, "seed", None, -(2**63), 2**64)
    return Sampling(
        temperature=_number(body, "temperature", 1.0, 0, 100) or 0.0,
        top_p=_number(body, "top_p", 1.0, 0, 1) or 0.0,
        top_k=int(_number(body, "top_k", 40, -1, 2**31) or 0),
        repetition_penalty=_number(body, "repetition_penalty", 1.0, 0.01, 100) or 1.0,
        seed=secrets.randbits(63) if seed is None else int(seed),
        stop=_stops(body.get("stop")),
    )


def read_messages(request: GenerateRequest, system_prompt: str | None) -> list[Message]:
    """The conversation as roles and texts, led by ``system_prompt`` where it has no system message of its own."""
    messages: list[Message] = []
    for at, message in enumerate(request.messages):
        if not isinstance(message, dict):
            raise Refused(f"messages[{at}] must be an object", "messages")
        role = "system" if message.get("role") == "developer" else message.get("role")
        if role not in ("system", "user", "assistant") or message.get("tool_calls"):
            raise Refused(
                f"the ctransformers engine takes no tool calls and no role {role!r} (messages[{at}])", "messages"
            )
        messages.append({"role": str(role), "content": _content(message.get("content"), at)})
    if not messages:
        raise Refused("messages must hold at least one message", "messages")
    if system_prompt and all(message["role"] != "system" for message in messages):
        messages.insert(0, {"role": "system", "content": system_prompt})
    return messages


def read_prompt(request: GenerateRequest) -> str | list[int]:
    """The one prompt of a text completion: text, or token ids as they come."""
    prompt = request.body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list) and prompt and all(type(token) is int for token in prompt):
        return prompt
    raise Refused(
        "prompt must be one text or one list of token ids; send further prompts as requests of their own", "prompt"
    )


def _content(content: Any, at: int) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    parts = content if isinstance(content, list) else [content]
    if not all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in parts
    ):
        raise Refused(f"messages[{at}].content may hold only text for the ctransformers engine", "messages")
    return "".join(part["text"] for part in parts)


def _stops(stop: Any) -> tuple[str, ...]:
    stops = [stop] if isinstance(stop, str) else stop or []
    if not isinstance(stops, list) or not all(isinstance(text, str) for text in stops):
        raise Refused("stop must be a text or a list of texts", "stop")
    return tuple(text for text in stops if text)


def _number(body: dict[str, Any], name: str, default: float | None, low: float, high: float) -> float | None:
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high or math.isnan(value):
        raise Refused(f"{name} must be a number from {low} to {high}, not {value!r:.80}", name)
    return value
