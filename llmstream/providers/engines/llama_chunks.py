"""What llama.cpp's stream says, as deltas. Pure, but for the tokenizer that is asked when ids are missing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llmstream.providers.engines.llama_tools import read_call
from llmstream.types import Delta, Failure

Tokenize = Callable[[str], tuple[int, ...]]


class ChoiceReader:
    """Reads the chunks of one choice of a completion or chat stream."""

    def __init__(self, index: int, top_logprobs: int | None, tokenize: Tokenize | None) -> None:
        """``top_logprobs`` None leaves log probabilities out; without ``tokenize`` deltas carry no token ids."""
        self._index, self._top_logprobs, self._tokenize = index, top_logprobs, tokenize
        self._trail = TokenTrail()
        self._logprobs: list[dict[str, Any]] = []
        self.one_call = False
        """Whether the whole text is one tool call, see :mod:`llama_tools`."""
        self._call = ""
        self.prefilled = False
        self.finish_reason: str | None = None
        self.completion_tokens = 0
        self.cached_tokens = 0
        self.failure: Failure | None = None

    def read(self, chunk: dict[str, Any]) -> Delta | None:
        """Takes the next chunk; gives what it adds to the answer."""
        if "error" in chunk or "choices" not in chunk:
            self.failure = failure_of(chunk)
            return None
        if usage := chunk.get("usage"):
            self.completion_tokens = usage.get("completion_tokens", 0)
            self.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
        if progress := chunk.get("prompt_progress"):
            self.prefilled = progress["processed"] >= progress["total"]
            return None
        delta: Delta | None = None
        for choice in chunk["choices"]:
            delta = self._read_choice(choice, (chunk.get("timings") or {}).get("predicted_n", 0))
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
        return delta

    def _read_choice(self, choice: dict[str, Any], generated: int) -> Delta | None:
        said = choice.get("delta") or {}
        text = choice.get("text") or said.get("content") or ""
        fields = {key: value for key, value in said.items() if key not in ("role", "content")} or None
        entries = (choice.get("logprobs") or {}).get("content") or []
        self.prefilled = self.prefilled or bool(text or fields or entries)
        if self.one_call:
            self._call, text = self._call + text, ""
        tokens: tuple[int, ...] = ()
        if self._tokenize:
            known = self._trail.take(text, [int(entry["id"]) for entry in entries], generated)
            tokens = self._tokenize(text) if known is None else known
        if self._top_logprobs is not None:
            self._logprobs += [_logprob(entry, self._top_logprobs) for entry in entries]
        if not text and not fields:
            return None
        logprobs, self._logprobs = self._logprobs, []
        return Delta(
            text=text,
            index=self._index,
            tokens=tokens,
            fields=fields,
            logprobs={"content": logprobs} if self._top_logprobs is not None else None,
        )

    def rest(self) -> Delta | None:
        """What is known only at the end: the tool call that the text was."""
        fields = read_call(self._call) if self._call else None
        if fields is None:
            return None
        self.finish_reason = "tool_calls"
        return Delta(index=self._index, fields=fields)


class TokenTrail:
    """Which token ids stand behind the text sent so far.

    The stream names one token a chunk, but holds text back that may be the beginning of a stop string, and is silent
    about tokens that end inside a character. So ids count only when there are as many as tokens were generated.
    """

    def __init__(self) -> None:
        self._ids: list[int] = []
        self._seen = 0

    def take(self, text: str, ids: list[int], generated: int) -> tuple[int, ...] | None:
        """The ids behind ``text``, the next that was sent; None when the stream kept some to itself.

        ``generated`` counts all tokens of the answer up to now.
        """
        self._ids += ids
        if not text:
            return ()
        known, count = tuple(self._ids), generated - self._seen
        self._ids.clear()
        self._seen = generated
        return known if len(known) == count else None


def too_long(tokens: int, context: int) -> Failure:
    """A prompt that leaves no room for an answer."""
    return Failure(
        f"The prompt has {tokens} tokens and must leave room for an answer in a context of {context}.",
        type="invalid_request_error",
        code="context_length_exceeded",
        status=400,
    )


def failure_of(said: Any) -> Failure:
    """Reads an error in any form the library gives: an error object, a stream chunk with one, a text."""
    error = said.get("error", said) if isinstance(said, dict) else said
    if not isinstance(error, dict):
        return Failure(f"llama.cpp refused the request: {error}", type="invalid_request_error", status=400)
    message = f"llama.cpp: {error.get('message') or error}"
    if error.get("type") == "exceed_context_size_error":
        return Failure(message, type="invalid_request_error", code="context_length_exceeded", status=400)
    if isinstance(error.get("code"), int) and 400 <= error["code"] < 500:
        return Failure(message, type="invalid_request_error", status=error["code"])
    return Failure(message, code="engine_failed", status=502)


def _logprob(entry: dict[str, Any], top: int) -> dict[str, Any]:
    return {**_plain(entry), "top_logprobs": [_plain(other) for other in (entry.get("top_logprobs") or [])[:top]]}


def _plain(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: entry.get(key) for key in ("token", "logprob", "bytes")}
