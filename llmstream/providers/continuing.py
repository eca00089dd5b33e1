"""An answer that goes on behind what was logged: what of it is new, and what the whole of it counts. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from msgspec.structs import replace

from llmstream.presets import Capabilities
from llmstream.transcript import Transcript
from llmstream.types import Delta, GenerateRequest, Usage


class Continued:
    """The rest of an answer of one choice, of which ``so_far`` was logged."""

    def __init__(self, request: GenerateRequest, so_far: Transcript, can: Capabilities) -> None:
        self.diverged = False
        """Whether it turned out to be another answer. From there on nothing comes through."""
        self._repeated = said_before(request, so_far, can)
        self._position = 0
        self._earlier = so_far if can.continue_by != "replay" else None
        self._produced = produced_tokens(self._earlier)
        self._estimated = not so_far.counted

    def behind(self, deltas: Sequence[Delta]) -> list[Delta]:
        """What of the next deltas is new."""
        return list(self._new(deltas))

    def _new(self, deltas: Sequence[Delta]) -> Iterator[Delta]:
        for delta in deltas:
            rest = delta if self._position == len(self._repeated) else self._rest(delta)
            if self.diverged:
                return
            if rest is not None:
                yield (
                    rest
                    if rest.usage is None or self._earlier is None
                    else self._whole(rest, rest.usage, self._earlier)
                )

    def _whole(self, delta: Delta, usage: Usage, earlier: Transcript) -> Delta:
        """Counts what earlier attempts produced, which the upstream took for a part of the prompt."""
        prompt = earlier.usage.prompt_tokens if earlier.usage else max(usage.prompt_tokens - self._produced, 0)
        details = {**(usage.details or {}), "estimated": True} if self._estimated else usage.details
        return replace(delta, usage=Usage(prompt, usage.completion_tokens + self._produced, details))

    def _rest(self, delta: Delta) -> Delta | None:
        left = len(self._repeated) - self._position
        known = min(left, len(delta.text))
        same = self._repeated.startswith(delta.text[:known], self._position)
        if not same or delta.fields is not None or (delta.finish_reason is not None and known < left):
            self.diverged = True
            return None
        self._position += known
        if known == len(delta.text) and delta.usage is None and delta.finish_reason is None:
            return None
        # Token ids and log probabilities of a delta that is cut in two belong to neither half.
        return replace(delta, text=delta.text[known:], tokens=(), logprobs=None)


def said_before(request: GenerateRequest, so_far: Transcript, can: Capabilities) -> str:
    """What a continued answer begins with, before anything new; empty where it begins with what is new."""
    if can.continue_by == "replay":
        return so_far.text
    if can.continue_by == "prefix_repeated":
        last = request.messages[-1] if request.messages else {}
        own = last.get("content") if last.get("role") == "assistant" else ""
        return (own if isinstance(own, str) else "") + so_far.text
    return ""


def produced_tokens(so_far: Transcript | None) -> int:
    """Tokens of an answer so far, as well as they are known; 0 when they are not."""
    return 0 if so_far is None else so_far.produced
