"""What a log amounts to: events folded into the answer so far. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from llmstream.types import BEGINNING, Delta, Event, EventId, Finished, Payload, Restart, Usage


class Choice:
    """One choice of an answer, growing."""

    __slots__ = ("_text", "continuable", "fields", "finish_reason", "logprobs", "pieces", "tokens")

    def __init__(self) -> None:
        self._text: list[str] = []
        self.fields: list[dict[str, Any]] = []
        self.tokens: list[int] = []
        self.pieces = 0
        """Pieces that the text came in: most upstreams send each token by itself."""
        self.logprobs: dict[str, list[Any]] | None = None
        self.finish_reason: str | None = None
        self.continuable = True
        """False once something beside text was produced, tool calls and the like, or text that a filter has changed for
        good: these are never stitched."""

    def add(self, delta: Delta, *, said: bool = False) -> None:
        if delta.text:
            self._text.append((said and delta.said) or delta.text)
            self.pieces += 1
            self.continuable = self.continuable and delta.said != ""
        if delta.tokens:
            self.tokens += delta.tokens
        if delta.fields:
            self.fields.append(delta.fields)
            self.continuable = self.continuable and delta.fields.keys() <= {"role"}
        if delta.logprobs:
            self._add_logprobs(delta.logprobs)
        if delta.finish_reason:
            self.finish_reason = delta.finish_reason

    def _add_logprobs(self, logprobs: dict[str, Any]) -> None:
        for key, values in logprobs.items():
            if values is not None:
                self.logprobs = self.logprobs or {}
                self.logprobs.setdefault(key, []).extend(values)

    @property
    def text(self) -> str:
        return "".join(self._text)

    @property
    def message(self) -> dict[str, Any]:
        """The OpenAI assistant message: streamed fields merged the way the SDKs accumulate them."""
        message: dict[str, Any] = {"role": "assistant"}
        for fields in self.fields:
            merge_fields(message, fields)
        text = self.text
        message["content"] = text if text or "tool_calls" not in message else None
        message.setdefault("refusal", None)
        return message


def merge_fields(target: dict[str, Any], fields: dict[str, Any]) -> None:
    """Adds one streamed delta to ``target``: strings grow, indexed list items merge by ``index``, the rest replaces."""
    for key, value in fields.items():
        old = target.get(key)
        if value is None:
            target.setdefault(key, None)
        elif isinstance(old, str) and isinstance(value, str) and key not in {"role", "id", "type"}:
            target[key] = old + value
        elif isinstance(old, dict) and isinstance(value, dict):
            merge_fields(old, value)
        elif isinstance(value, list) and value and all(isinstance(item, dict) and "index" in item for item in value):
            target[key] = items = old if isinstance(old, list) else []
            for item in value:
                while len(items) <= item["index"]:
                    items.append({})
                merge_fields(items[item["index"]], {k: v for k, v in item.items() if k != "index"})
        elif isinstance(value, dict):
            target[key] = {}
            merge_fields(target[key], value)
        else:
            target[key] = value


class Transcript:
    """The answer of one job up to :attr:`position`."""

    __slots__ = ("_said", "choices", "finished", "position", "usage")

    def __init__(self, events: Iterable[Event] = (), *, said: bool = False) -> None:
        """``said``: as its model said it, for whoever goes on with it; by default as readers see it."""
        self._said = said
        self.position: EventId = BEGINNING
        self.choices: dict[int, Choice] = {}
        self.usage: Usage | None = None
        self.finished: Finished | None = None
        for event in events:
            self.add(event)

    def add(self, event: Event) -> None:
        """Folds the next event in; events must come in log order, each once."""
        self.extend((event.data,), event.id)

    def extend(self, payloads: Iterable[Payload], last: EventId) -> None:
        """Folds in what the next events say, of which ``last`` is the id of the last."""
        self.position = last
        for data in payloads:
            if isinstance(data, Delta):
                choice = self.choices.get(data.index)
                if choice is None:
                    choice = self.choices[data.index] = Choice()
                choice.add(data, said=self._said)
                if data.usage is not None:
                    self.usage = data.usage
            elif isinstance(data, Restart):
                self.choices.clear()
                self.usage = None
            elif isinstance(data, Finished):
                self.finished = data
                self.usage = data.usage or self.usage

    @property
    def empty(self) -> bool:
        """True while nothing of an answer was logged."""
        return not self.choices

    @property
    def ended(self) -> int:
        """Choices that have come to their end."""
        return sum(choice.finish_reason is not None for choice in self.choices.values())

    @property
    def text(self) -> str:
        """The text of the first choice."""
        first = self.choices.get(0)
        return first.text if first else ""

    @property
    def tokens(self) -> list[int]:
        first = self.choices.get(0)
        return first.tokens if first else []

    @property
    def produced(self) -> int:
        """Tokens of the answer so far, as well as they are known: the pieces it came in where nobody counted."""
        return self._counted or (self.choices[0].pieces if 0 in self.choices else 0)

    @property
    def counted(self) -> bool:
        """Whether ``produced`` is more than a guess."""
        return self._counted > 0 or self.text == ""

    @property
    def _counted(self) -> int:
        if self.usage is not None:
            return self.usage.completion_tokens
        first = self.choices.get(0)
        logprobs = first.logprobs if first else None
        return len(self.tokens) or len((logprobs or {}).get("content", ()))

    @property
    def finish_reason(self) -> str | None:
        first = self.choices.get(0)
        return first.finish_reason if first else None

    @property
    def continuable(self) -> bool:
        """Whether a provider that can continue text may go on from here: one choice, text only, not ended."""
        return set(self.choices) == {0} and self.choices[0].continuable and self.finish_reason is None
