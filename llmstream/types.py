"""The vocabulary of the whole service: frozen data, no I/O.

A generation is a *job*; a job is a *log* of events. Everything a client ever sees is a rendering of these.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any, Literal, NamedTuple

import msgspec
from msgspec import Struct
from msgspec.structs import replace

Status = Literal["queued", "in_progress", "completed", "failed", "cancelled", "incomplete"]
TERMINAL: frozenset[str] = frozenset({"completed", "failed", "cancelled", "incomplete"})

Lane = Literal["high", "default", "low"]
LANES: tuple[Lane, ...] = ("high", "default", "low")
MIN_PRIORITY, MAX_PRIORITY = -10, 10
_PRIORITIES = range(MIN_PRIORITY, MAX_PRIORITY + 1)

Clock = Callable[[], float]
"""Seconds since the epoch; injected so that tests own the time."""

Durability = Literal["full", "fsync", "memory"]
"""When an event counts as logged: the store has it, or has it on its disk. ``memory``: there is no log in the store."""

Kind = Literal["chat", "completion", "embedding"]


def lane_of(priority: int) -> Lane:
    """Names the lane of a priority: 4..10 high, -3..3 default, -10..-4 low."""
    if priority >= 4:
        return "high"
    return "default" if priority >= -3 else "low"


class EventId(NamedTuple):
    """Where an event stands in its job's log: the Redis stream id and the SSE ``id:`` at once.

    Compares as a pair of integers; the text form ``attempt-seq`` does not sort.
    """

    attempt: int
    seq: int

    def __str__(self) -> str:
        return f"{self.attempt}-{self.seq}"

    @classmethod
    def parse(cls, text: str | bytes) -> EventId:
        """Reads ``attempt-seq``. Raises ValueError when the text is anything else."""
        raw = text.decode("ascii", "replace") if isinstance(text, bytes) else text
        attempt, dash, seq = raw.partition("-")
        if not (dash and attempt.isascii() and attempt.isdigit() and seq.isascii() and seq.isdigit()):
            raise ValueError(f"{raw!r} is not an event id; expected 'attempt-seq', for example '1-42'")
        if len(attempt) > 9 or len(seq) > 15:
            raise ValueError(f"{raw!r} is not an event id; its numbers are out of range")
        return cls(int(attempt), int(seq))


BEGINNING = EventId(0, 0)
"""The position before every event."""


class Usage(Struct, frozen=True, omit_defaults=True):
    """Tokens counted for one job, however many attempts and clients it had."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    details: dict[str, Any] | None = None
    """Further fields of an upstream's usage object, verbatim; ``estimated`` where the tokens were counted here."""
    cost: float | None = None
    """By the price table of the settings, in its currency."""

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


class Failure(Struct, frozen=True, omit_defaults=True):
    """Why a job failed, in the words of the OpenAI error body."""

    message: str
    type: str = "server_error"
    code: str | None = None
    param: str | None = None
    status: int = 500
    retryable: bool = False
    """Whether the same request may succeed at another time."""
    retry_after: float | None = None
    """Seconds after which trying again makes sense, where that is known."""


class Started(Struct, frozen=True, tag="started", omit_defaults=True):
    """Event ``{attempt}-0``: a replica began to execute the job."""

    replica: str
    at: float


class Restart(Struct, frozen=True, tag="restart", omit_defaults=True):
    """What came before is void: this attempt could not go on from the last logged token."""

    reason: str


class Delta(Struct, frozen=True, tag="delta", omit_defaults=True):
    """A piece of one choice of the answer."""

    text: str = ""
    index: int = 0
    tokens: tuple[int, ...] = ()
    """Ids of the tokens behind ``text`` where the provider knows them; a continuation starts from these."""
    fields: dict[str, Any] | None = None
    """Other members of an OpenAI ``delta``, verbatim: role, tool_calls, reasoning_content, refusal, audio …; of an
    embedding job the vector of the input ``index``, see :mod:`llmstream.vectors`."""
    logprobs: dict[str, Any] | None = None
    finish_reason: str | None = None
    usage: Usage | None = None
    said: str | None = None
    """What the model said, where ``text`` is something else; a continuation starts from this. Empty: it is kept
    nowhere, and there is no going on from here."""


class Finished(Struct, frozen=True, tag="finished", omit_defaults=True):
    """The one terminal event."""

    status: Status
    at: float
    usage: Usage | None = None
    failure: Failure | None = None
    reason: str | None = None
    """What ended the job where the status alone does not say it: ``length``, ``content_filter`` …"""


Payload = Started | Restart | Delta | Finished


class Event(NamedTuple):
    id: EventId
    data: Payload


class _Glance(Struct, frozen=True):
    """What every part of the service has to know of a body, read without making objects of the rest."""

    n: int | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None


_glance = msgspec.json.Decoder(_Glance).decode


class GenerateRequest(Struct, frozen=True, omit_defaults=True, kw_only=True, dict=True):
    """What to generate: an OpenAI request body, kept byte for byte so that nothing is lost on the way upstream."""

    kind: Kind
    model: str
    raw: msgspec.Raw = msgspec.field(name="body")
    """The body as JSON."""
    provider: str | None = None
    """Asks for one provider by name; None lets the router choose."""
    job_id: str | None = None
    """The job that asks, the same over all its attempts; known while it runs."""
    redacted: bool = False
    """Whether what may never be kept has been taken out of the body."""
    names: dict[str, str] | None = None
    """What the placeholders in the body stand for: their originals are put back into the answer."""

    @classmethod
    def of(cls, kind: Kind, model: str, body: Mapping[str, Any], provider: str | None = None) -> GenerateRequest:
        """A request with a body that is not JSON yet. Raises ValueError for what JSON cannot hold."""
        raw = json.dumps(body, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
        return cls(kind=kind, model=model, raw=msgspec.Raw(raw), provider=provider)

    @cached_property
    def body(self) -> dict[str, Any]:
        """The whole body, decoded. Those who only pass it on do without."""
        body: dict[str, Any] = msgspec.json.decode(self.raw)
        return body

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation of a chat request; empty for a text completion."""
        return list(self.body.get("messages") or [])

    @property
    def prompt_chars(self) -> int:
        """Characters of text in the conversation, prompt or inputs."""
        contents = [message.get("content") for message in self.messages]
        contents = contents or [self.body.get("input" if self.kind == "embedding" else "prompt")]
        return sum(map(_chars, contents))

    @property
    def max_tokens(self) -> int | None:
        return self._seen.max_completion_tokens or self._seen.max_tokens

    @property
    def choices(self) -> int:
        """How many answers there will be: for embeddings one for each input."""
        return len(self.inputs) if self.kind == "embedding" else self._seen.n or 1

    @cached_property
    def inputs(self) -> list[str | list[int]]:
        """The texts, or their token ids, of an embedding request."""
        given: Any = self.body.get("input")
        return given if isinstance(given, list) and given and isinstance(given[0], str | list) else [given]

    @cached_property
    def _seen(self) -> _Glance:
        return _glance(self.raw)


Scope = Literal["read", "generate", "admin"]
SCOPES: tuple[Scope, ...] = ("read", "generate", "admin")
"""Each holds those before it: ``read`` sees its principal's own jobs, ``generate`` also makes, cancels and requeues
them, ``admin`` does all that with everybody's."""


def _chars(content: Any) -> int:
    if isinstance(content, list):
        return sum(map(_chars, content))
    if isinstance(content, dict):
        content = content.get("text")
    return len(content) if isinstance(content, str) else 0


LOCAL = "local"
"""The principal of a server without keys."""


class CallerLimits(Struct, frozen=True, omit_defaults=True):
    """How much a caller may ask for; None: no limit."""

    requests_per_minute: int | None = None
    burst_size: int | None = None
    """Requests at once after a pause; None: those of a minute."""
    tokens_per_minute: int | None = None
    concurrent_jobs: int | None = None
    """Jobs that run at once, in each pool."""
    queued_jobs: int | None = None
    """Jobs that wait, in each pool."""

    def over(self, default: CallerLimits) -> CallerLimits | None:
        """These, and the default ones where these say nothing; 0 takes a limit off. None when nothing is limited."""
        fields = self.__struct_fields__
        said = {name: getattr(default if getattr(self, name) is None else self, name) for name in fields}
        found = CallerLimits(**{name: value or None for name, value in said.items()})
        return None if found == CallerLimits(burst_size=found.burst_size) else found


class Metered(Struct, frozen=True):
    """Limits, and whose they are."""

    who: str
    """A key's name, or where the requests come from."""
    limits: CallerLimits


class Principal(Struct, frozen=True, omit_defaults=True):
    """Who asks, and what they may. Jobs of different principals at the same priority take turns.

    The default is who asks a server without keys: may do everything.
    """

    id: str = LOCAL
    scopes: tuple[Scope, ...] = SCOPES
    models: tuple[str, ...] | None = None
    """Patterns such as ``gpt-*`` of the models that may be asked for; None: all."""
    metered: Metered | None = None
    """What its requests count against; None: nothing."""

    @property
    def is_admin(self) -> bool:
        return "admin" in self.scopes

    def may_use(self, model: str) -> bool:
        """Whether a model may be asked for by this name."""
        return self.models is None or any(fnmatchcase(model, pattern) for pattern in self.models)

    def owns(self, job: Job) -> bool:
        """Whether a job may be seen: what belongs to others does not exist."""
        return job.principal == self.id or self.is_admin


class ApiKey(Struct, frozen=True, omit_defaults=True):
    """What is kept of an API key: all but its secret."""

    id: str
    name: str
    """The principal; several keys may have the same."""
    salt: str
    digest: str
    """Hex of the secret's salted hash."""
    scopes: tuple[Scope, ...]
    created_at: float
    expires_at: float
    models: tuple[str, ...] | None = None
    limits: CallerLimits | None = None
    """What this key says about limits; what it does not say is as for others."""

    @property
    def principal(self) -> Principal:
        return Principal(id=self.name, scopes=self.scopes, models=self.models)


def scopes_upto(scopes: Iterable[Scope]) -> tuple[Scope, ...]:
    """All scopes that the given ones hold."""
    return SCOPES[: max((SCOPES.index(scope) + 1 for scope in scopes), default=0)]


Mode = Literal["paused", "draining"]
MODES: tuple[Mode, ...] = ("paused", "draining")


class QueueRule(Struct, frozen=True, omit_defaults=True, kw_only=True):
    """A part of the queue that is ``paused`` (none of it begins) or ``draining`` (nothing is added to it): a lane, the
    models whose names fit a pattern, the models in a lane; everything, where neither is said."""

    mode: Mode
    lane: Lane | None = None
    model: str | None = None
    """``*`` stands for any characters, ``?`` for any one."""
    since: float = 0.0
    by: str = LOCAL
    """The principal who said so."""

    def covers(self, job: Job) -> bool:
        return self.fits(job.lane, job.request.model)

    def fits(self, lane: Lane, model: str) -> bool:
        return self.lane in (None, lane) and (self.model is None or fnmatchcase(model, self.model))


class QueueRules(Struct, frozen=True):
    """All rules that hold at one time, in the order they were made."""

    version: int = 0
    """Grows with every change; 0: nobody has ever made a rule."""
    rules: tuple[QueueRule, ...] = ()

    def find(self, mode: Mode, job: Job) -> QueueRule | None:
        """The first rule that covers a job."""
        return next((rule for rule in self.rules if rule.mode == mode and rule.covers(job)), None)

    def lines(self, mode: Mode) -> str:
        """The rules as the scripts of the queue read them."""
        return "".join(
            f"{_FIRST_LEVEL[rule.lane]}|{_LAST_LEVEL[rule.lane]}|{rule.model or '*'};"
            for rule in self.rules
            if rule.mode == mode
        )


_LEVELS: dict[Lane | None, list[int]] = {
    **{lane: [MAX_PRIORITY - each for each in _PRIORITIES if lane_of(each) == lane] for lane in LANES},
    None: [MAX_PRIORITY - each for each in _PRIORITIES],
}
_FIRST_LEVEL = {lane: min(levels) for lane, levels in _LEVELS.items()}
_LAST_LEVEL = {lane: max(levels) for lane, levels in _LEVELS.items()}


class Webhook(Struct, frozen=True, omit_defaults=True):
    """Where the end of a job is to be told."""

    url: str
    events: tuple[str, ...] | None = None
    """The types of events that are wanted, such as ``response.completed``; None: all."""
    include_text: bool = True


REQUESTED = "request"
"""The receiver that the request itself names; configured ones have names of their own."""


class Counted(Struct, frozen=True, omit_defaults=True):
    """What a job is to the limits of whoever asked for it."""

    who: str
    tokens: bool = False
    """Whether its tokens were charged, to be corrected at its end."""
    concurrent: int | None = None
    """So many of theirs may run at once in its pool."""
    queued: int | None = None
    """So many of theirs may wait in its pool."""


class Job(Struct, frozen=True, omit_defaults=True):
    """One accepted generation: everything that is known and fixed from the moment of submission."""

    id: str
    request: GenerateRequest
    pool: str
    created_at: float
    principal: str = LOCAL
    priority: int = 0
    session_id: str | None = None
    expires_at: float | None = None
    """Seconds since the epoch after which a job that is not finished fails; None: no such limit while it waits."""
    labels: dict[str, str] | None = None
    fingerprint: str | None = None
    """Digest of who asked what: the same under the same id is the same job."""
    grace_s: float | None = None
    """Seconds without any reader after which the job is cancelled; None: it goes on."""
    continues: str | None = None
    """The job that this one was requeued from: its answer goes on where that one stopped."""
    durability: Durability = "full"
    request_id: str | None = None
    """The HTTP request that it came with, for the log of whoever runs it."""
    traceparent: str | None = None
    """The W3C trace context that it came in, for the spans of whoever runs it."""
    counted: Counted | None = None
    """Whose limits it counts against; None: nobody's."""
    restarts: bool = True
    """Whether the answer may start over after its model broke off where it cannot go on; otherwise the job fails and
    keeps what was said. After the death of a replica it starts over in any case."""
    not_before: float | None = None
    """Seconds since the epoch, by the store's clock, before which no attempt begins."""
    patience_s: float | None = None
    """Seconds that it waits where all its targets are left alone, before it fails; None: until its deadline."""
    webhook: Webhook | None = None
    """What the request says about telling its end."""
    receivers: tuple[str, ...] = ()
    """Who hears of its end: names of configured receivers, and ``REQUESTED`` for ``webhook``."""

    @property
    def delay_s(self) -> float:
        """Seconds that it must wait from the moment it was accepted."""
        return 0.0 if self.not_before is None else max(0.0, self.not_before - self.created_at)

    @property
    def lane(self) -> Lane:
        return lane_of(self.priority)

    @property
    def asked(self) -> GenerateRequest:
        """The request as providers get it: with the name of the job."""
        return replace(self.request, job_id=self.id)


class JobState(Struct, frozen=True, omit_defaults=True):
    """A job and how far it has come, as the store knows it at one moment."""

    job: Job
    status: Status = "queued"
    attempt: int = 0
    replica: str | None = None
    started_at: float | None = None
    finished_at: float | None = None
    failure: Failure | None = None
    usage: Usage | None = None
    reason: str | None = None

    @property
    def done(self) -> bool:
        return self.status in TERMINAL

    @property
    def dead(self) -> bool:
        """Whether it failed for want of attempts, so that more of them may help."""
        return self.status == "failed" and self.failure is not None and self.failure.retryable


class ModelInfo(Struct, frozen=True, omit_defaults=True):
    """A model that can be asked for by name."""

    name: str
    provider: str
    created: int = 0
    context: int | None = None
    """Tokens of prompt and answer together; None where the provider does not say."""
    kinds: tuple[Kind, ...] | None = None
    """What it can be asked for; None where the provider does not say."""
    extra: Mapping[str, Any] = {}

    def takes(self, kind: Kind) -> bool:
        """Whether to ask it for a kind where a request names no model; who does not say is taken for a chat model."""
        return kind in (self.kinds or ("chat", "completion"))


def own_id(principal: str, name: str) -> str:
    """The job id that a caller's own id stands for; those of different principals never meet."""
    return name if principal == LOCAL else f"{principal}:{name}"


_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"
_PAIRS = [first + second for first in _ALPHABET for second in _ALPHABET]


def new_id(clock: Clock = time.time) -> str:
    """A new job id: 26 characters, sorted by creation time, with 80 random bits that nobody can guess."""
    number = (int(clock() * 1000) << 80) | int.from_bytes(os.urandom(10))
    return "".join([_PAIRS[(number >> shift) & 1023] for shift in range(120, -1, -10)])


def encode(value: Any) -> bytes:
    return msgspec.json.encode(value)
