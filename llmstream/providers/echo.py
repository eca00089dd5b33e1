"""A model that needs no weights: repeats the user or counts, at a set pace, and fails on request."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from llmstream.config import ModelSettings
from llmstream.errors import (
    BadRequest,
    ContextLengthExceeded,
    EngineCrashed,
    ProviderError,
    UpstreamBroken,
    UpstreamRejected,
)
from llmstream.providers import echo_vectors
from llmstream.providers.base import Sink
from llmstream.providers.fields import check_fields
from llmstream.transcript import Transcript
from llmstream.types import Delta, GenerateRequest, Kind, ModelInfo, Usage
from llmstream.vectors import Slices, encode_floats, made_by

DEFAULT_CONTEXT = 4096
_BATCH = 32
_REMEMBERED = 1024

_Count = Annotated[int, Meta(ge=0, le=1_000_000)]


class EchoOptions(Struct, frozen=True, forbid_unknown_fields=True):
    """The ``echo`` member of a request body, which goes before the model's settings."""

    tokens: _Count | None = None
    delay_ms: Annotated[float, Meta(ge=0)] | None = None
    fault: Literal["crash", "stall", "cut", "error", "reject"] | None = None
    at: _Count = 0
    """The fault happens before this token, counted from 0 over all attempts; the number of tokens means the end."""
    attempts: Annotated[int, Meta(ge=1)] | None = None
    """The fault happens the first so many times that this provider runs the request; None: every time."""


class _Plan(Struct, frozen=True):
    """What one request amounts to."""

    words: Sequence[str] | None
    """The answer; None: numbered tokens."""
    length: int
    finish_reason: str
    prompt_tokens: int
    choices: int
    delay_s: float
    fault_at: int | None

    @property
    def usage(self) -> Usage:
        return Usage(prompt_tokens=self.prompt_tokens, completion_tokens=self.length * self.choices)

    def token(self, position: int) -> str:
        return f" tok{position:04d}" if self.words is None else self.words[position]

    def batch(self, start: int, stop: int) -> list[Delta]:
        numbers = range(start, stop)
        return [Delta(text=self.token(i), index=c, tokens=(i,)) for i in numbers for c in range(self.choices)]

    def end(self) -> list[Delta]:
        last = self.choices - 1
        return [
            Delta(index=c, finish_reason=self.finish_reason, usage=self.usage if c == last else None)
            for c in range(self.choices)
        ]


class EchoProvider:
    """A deterministic provider in this process; its tokens are words and their ids are their positions."""

    def __init__(
        self, name: str, settings: ModelSettings, *, sleep: Callable[[float], Awaitable[Any]] = asyncio.sleep
    ) -> None:
        self.name = self.pool = name
        self.slots = settings.slots
        self.running = 0
        """Generations that have begun and not ended."""
        self._settings = settings
        self._context = settings.context or DEFAULT_CONTEXT
        self._sleep = sleep
        self._runs: OrderedDict[bytes, int] = OrderedDict()
        self._closed = asyncio.Event()

    @property
    def models(self) -> Sequence[ModelInfo]:
        kinds: tuple[Kind, ...] = ("chat", "completion", "embedding")
        return (ModelInfo(name=self.name, provider=self.name, context=self._context, kinds=kinds),)

    async def open(self) -> None:
        """Needs nothing."""

    async def close(self) -> None:
        self._closed.set()

    async def check(self, request: GenerateRequest) -> None:
        _options(request)
        if request.kind == "embedding":
            self._check_inputs(request)
            return
        prompt = _count_words(request)
        if (excess := prompt + 1 - self._context) > 0:
            raise ContextLengthExceeded(
                f"The prompt has {prompt} tokens and {self.name!r} a context of {self._context}, answer included: "
                f"too long by {excess} tokens.",
                param="messages" if request.kind == "chat" else "prompt",
            )

    def _check_inputs(self, request: GenerateRequest) -> None:
        check_fields(request, also={"echo"})
        if request.body.get("dimensions") not in (None, echo_vectors.DIMENSIONS):
            raise BadRequest(
                f"The vectors of {self.name!r} have {echo_vectors.DIMENSIONS} dimensions.", param="dimensions"
            )
        longest = max(map(echo_vectors.tokens, request.inputs))
        if longest > self._context:
            raise ContextLengthExceeded(
                f"An input has {longest} tokens and {self.name!r} reads at most {self._context}.", param="input"
            )

    def can_continue(self, request: GenerateRequest, so_far: Transcript) -> bool:
        if request.kind == "embedding":
            return made_by(so_far, self.name)
        if request.choices != 1:
            return False
        plan, produced = self._plan(request, _options(request)), len(so_far.tokens)
        return produced <= plan.length and so_far.text == "".join(map(plan.token, range(produced)))

    async def generate(self, request: GenerateRequest, so_far: Transcript | None, sink: Sink) -> None:
        await self.check(request)
        options = _options(request)
        if request.kind == "embedding":
            await self._embed(request, options, so_far, sink)
            return
        plan = self._plan(request, options, faulty=self._faulty(request, options))
        self.running += 1
        try:
            position = len(so_far.tokens) if so_far else 0
            while position < plan.length:
                if plan.fault_at == position:
                    await self._fail(options)
                step = await self._pace(plan, position)
                if not sink.put(plan.batch(position, position + step)):
                    await sink.drained()
                position += step
            if plan.fault_at == position:
                await self._fail(options)
            sink.put(plan.end())
        finally:
            self.running -= 1

    async def _embed(
        self, request: GenerateRequest, options: EchoOptions, so_far: Transcript | None, sink: Sink
    ) -> None:
        """Like a local model slice by slice; the pause and the faults are those before an input."""
        inputs, faulty = request.inputs, self._faulty(request, options)
        delay_ms = self._settings.delay_ms if options.delay_ms is None else options.delay_ms
        parts = Slices(inputs, self.name, so_far)
        self.running += 1
        try:
            for part in parts:
                for at in part:
                    if faulty and at == options.at:
                        await self._fail(options)
                    await self._sleep(delay_ms / 1000)
                vectors = [encode_floats(echo_vectors.vector(inputs[at])) for at in part]
                tokens = sum(echo_vectors.tokens(inputs[at]) for at in part)
                if not sink.put(parts.deltas(part, vectors, tokens)):
                    await sink.drained()
        finally:
            self.running -= 1

    async def health(self) -> dict[str, object]:
        return {"status": "ok", "engine": "echo", "running": self.running}

    async def _pace(self, plan: _Plan, position: int) -> int:
        """Waits as long as the next tokens take and tells how many they are; never steps over a fault."""
        await self._sleep(plan.delay_s)
        if self._closed.is_set():
            raise EngineCrashed(f"The model {self.name!r} was closed.")
        if plan.delay_s:
            return 1
        stop = min(position + _BATCH, plan.length)
        if plan.fault_at is not None and position < plan.fault_at:
            stop = min(stop, plan.fault_at)
        return stop - position

    def _plan(self, request: GenerateRequest, options: EchoOptions, *, faulty: bool = False) -> _Plan:
        count = self._settings.tokens if options.tokens is None else options.tokens
        said = None if count is not None else _last_said(request).split()
        words = said and [said[0], *(f" {word}" for word in said[1:])]
        length = whole = count if count is not None else len(said or ())
        if request.max_tokens is not None:
            length = min(whole, request.max_tokens)
        delay_ms = self._settings.delay_ms if options.delay_ms is None else options.delay_ms
        return _Plan(
            words=words,
            length=length,
            finish_reason="stop" if length == whole else "length",
            prompt_tokens=_count_words(request),
            choices=request.choices,
            delay_s=delay_ms / 1000,
            fault_at=options.at if faulty else None,
        )

    def _faulty(self, request: GenerateRequest, options: EchoOptions) -> bool:
        """Whether this run of the request is one that fails; counts the run."""
        if options.fault is None or options.attempts is None:
            return options.fault is not None
        key = msgspec.json.encode(request.body, order="deterministic")
        runs = self._runs[key] = self._runs.pop(key, 0) + 1
        if len(self._runs) > _REMEMBERED:
            self._runs.popitem(last=False)
        return runs <= options.attempts

    async def _fail(self, options: EchoOptions) -> None:
        where = f"before token {options.at}, as the request asked"
        match options.fault:
            case "crash":
                raise EngineCrashed(f"The echo engine crashed {where}.")
            case "cut":
                raise UpstreamBroken(f"The echo engine's stream was cut {where}.")
            case "reject":
                raise UpstreamRejected(f"The echo engine refused the request {where}.", param="echo")
            case "stall":
                await self._closed.wait()
                raise EngineCrashed(f"The model {self.name!r} was closed.")
            case _:
                raise ProviderError(f"The echo engine failed {where}.")


def _options(request: GenerateRequest) -> EchoOptions:
    """Reads the ``echo`` member. Raises BadRequest that names what is wrong with it."""
    raw = request.body.get("echo")
    if raw is None or isinstance(raw, bool):  # a text completion may ask with a plain ``true`` to repeat its prompt
        return EchoOptions()
    try:
        return msgspec.convert(raw, EchoOptions)
    except msgspec.ValidationError as error:
        known = ", ".join(EchoOptions.__struct_fields__)
        raise BadRequest(f"The member 'echo' is wrong: {error}. It may have: {known}.", param="echo") from None


def _text(content: Any) -> str:
    """The text of a message's content: a string, or a list of parts of which some are text."""
    if isinstance(content, list):
        parts = (part.get("text") if isinstance(part, dict) else part for part in content)
        return " ".join(part for part in parts if isinstance(part, str))
    return content if isinstance(content, str) else ""


def _last_said(request: GenerateRequest) -> str:
    if request.kind == "completion":
        return _text(request.body.get("prompt"))
    said = [message for message in request.messages if message.get("role") == "user"]
    return _text(said[-1].get("content")) if said else ""


def _count_words(request: GenerateRequest) -> int:
    if request.kind == "completion":
        return len(_text(request.body.get("prompt")).split())
    return sum(len(_text(message.get("content")).split()) for message in request.messages)
