"""From an OpenAI request to the body llama.cpp takes. Pure."""

from __future__ import annotations

from typing import Any

from llmstream.providers.engines.llama_tools import call_format, required_tools, uses_tools
from llmstream.types import GenerateRequest

_SEEDS = 2**32 - 1  # the last 32-bit value asks llama.cpp for a random seed
_SAME_NAME = ("temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "stop")


def is_bound(request: GenerateRequest) -> bool:
    """Whether a JSON schema binds the answer."""
    return bool((request.body.get("response_format") or {"type": "text"})["type"] != "text")


def top_logprobs(request: GenerateRequest) -> int | None:
    """How many alternatives to tell with each token; None: no log probabilities at all."""
    wanted = request.body.get("logprobs")
    if request.kind == "completion":
        return None if wanted is None else int(wanted)
    return int(request.body.get("top_logprobs") or 0) if wanted else None


def sampling(request: GenerateRequest, index: int, generated: int) -> dict[str, Any]:
    """The fields that choose the tokens of one choice, of which ``generated`` are already there."""
    body = request.body
    fields = {name: body[name] for name in _SAME_NAME if body.get(name) is not None}
    if body.get("repetition_penalty") is not None:
        fields["repeat_penalty"] = body["repetition_penalty"]
    if body.get("seed") is not None:
        # Each choice, and each part of a continued answer, needs random numbers of its own.
        fields["seed"] = (body["seed"] + index + generated) % _SEEDS
    if body.get("logit_bias"):
        # -100 bans a token altogether, which llama.cpp writes as false.
        fields["logit_bias"] = [
            [int(token), False if bias <= -100 else bias] for token, bias in body["logit_bias"].items()
        ]
    return fields


def raw_body(request: GenerateRequest, prompt: list[int], index: int, generated: int, limit: int) -> dict[str, Any]:
    """Asks for a plain completion of token ids.

    The ids of the answer's tokens come with the probabilities, their number with the timings.
    """
    wanted = top_logprobs(request)
    return {
        **sampling(request, index, generated),
        "prompt": prompt,
        "stream": True,
        "return_progress": True,
        "timings_per_token": True,
        "n_predict": limit,
        "n_probs": max(1, wanted or 0),
        # Probabilities before sampling need the whole vocabulary sorted for each token.
        "post_sampling_probs": wanted is None,
    }


def chat_body(request: GenerateRequest, messages: list[dict[str, Any]], index: int, limit: int) -> dict[str, Any]:
    """Asks for a chat answer whose grammar, tool calls and thoughts llama.cpp takes care of."""
    wanted = top_logprobs(request)
    return {
        **sampling(request, index, 0),
        **_bounds(request),
        "messages": messages,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_progress": True,
        "max_tokens": limit,
        **({"logprobs": True, "top_logprobs": max(1, wanted)} if wanted is not None else {}),
    }


def _bounds(request: GenerateRequest) -> dict[str, Any]:
    """What the answer may be: of a JSON schema, with tool calls or not."""
    if required := required_tools(request):
        return {"tools": required, "tool_choice": "none", "response_format": call_format(required)}
    names = ["response_format"]
    if uses_tools(request):
        names += ["tools", "tool_choice", "parallel_tool_calls"]
    return {name: request.body[name] for name in names if request.body.get(name) is not None}


def conversation(request: GenerateRequest, system_prompt: str | None) -> list[dict[str, Any]]:
    """The messages with plain text content, led by ``system_prompt`` where there is no system message."""
    messages = [_plain(message) for message in request.messages]
    if system_prompt and all(message["role"] != "system" for message in messages):
        messages.insert(0, {"role": "system", "content": system_prompt})
    return messages


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    kept = {key: message[key] for key in ("name", "tool_calls", "tool_call_id") if message.get(key) is not None}
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(part.get("text") or part.get("refusal") or "" for part in content)
    role = "system" if message["role"] == "developer" else message["role"]
    return {"role": role, "content": content or "", **kept}
