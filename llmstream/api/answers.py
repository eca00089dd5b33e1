"""What clients get: the shapes of answers and events. Handlers are checked against them, and documented by them."""

from __future__ import annotations

from typing import Any, Literal, NotRequired

from pydantic import ConfigDict
from typing_extensions import TypedDict  # pydantic cannot read that of Python 3.11

from llmstream.types import Lane, Mode, Status

OPEN = ConfigDict(extra="allow")
"""For answers with members of others. Pydantic reads it off a TypedDict, of which mypy knows no attributes: hence the
``type: ignore`` at each use."""


class Error(TypedDict):
    message: str
    """What happened, and what to do."""
    type: str
    param: str | None
    """The field that is wrong."""
    code: str | None
    """For programs; the message may change."""


class ErrorAnswer(TypedDict):
    """Every error, on every route."""

    error: Error


class Usage(TypedDict):
    """Tokens of one answer, however many attempts and readers it had, and what else the upstream counts."""

    __pydantic_config__ = OPEN  # type: ignore[misc]

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    estimated: NotRequired[bool]
    """The upstream said nothing, and the tokens were counted here."""
    cost: NotRequired[float]
    """By the configured prices."""


class AssistantMessage(TypedDict):
    __pydantic_config__ = OPEN  # type: ignore[misc]

    role: str
    content: NotRequired[str | None]


class Choice(TypedDict):
    index: int
    message: AssistantMessage
    logprobs: dict[str, Any] | None
    finish_reason: str | None


class ChatCompletion(TypedDict):
    id: str
    """``chatcmpl-`` and the id of the job."""
    object: Literal["chat.completion"]
    created: int
    """Seconds since 1970."""
    model: str
    choices: list[Choice]
    usage: Usage


class ChunkChoice(TypedDict):
    index: int
    delta: dict[str, Any]
    """A piece of the message: ``content``, ``role``, ``tool_calls`` …"""
    logprobs: dict[str, Any] | None
    finish_reason: str | None


class ChatCompletionChunk(TypedDict):
    """An event of a streamed chat completion. The last event is the text ``[DONE]``."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: NotRequired[Usage]


class Model(TypedDict):
    __pydantic_config__ = OPEN  # type: ignore[misc]

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    """The provider."""
    context_length: NotRequired[int]
    """Tokens of prompt and answer together."""


class Models(TypedDict):
    object: Literal["list"]
    data: list[Model]


class Accepted(TypedDict):
    """A job that runs whether or not anybody reads it."""

    status: Status
    task_id: str
    session_id: str | None
    not_before: NotRequired[float]
    stream_url: str
    """Where the answer is read as server-sent events, for a while also without a key."""


class Requeued(Accepted):
    continues: str | None
    """The job that this one goes on with."""


class QueuedEvent(TypedDict):
    """Nothing has been said yet. Has no id: it is no part of the answer."""

    type: Literal["queued"]
    position: int | None
    """Jobs before this one."""
    paused: NotRequired[bool]
    not_before: NotRequired[float]
    eta_s: float | None
    """Seconds until it begins, as far as that is known."""


class StartedEvent(TypedDict):
    type: Literal["started"]
    attempt: int


class ChunkEvent(TypedDict):
    """A piece of the answer."""

    type: Literal["chunk"]
    content: str
    index: NotRequired[int]
    """The choice, where there are several."""
    delta: NotRequired[dict[str, Any]]
    """What is no text: ``tool_calls``, ``reasoning_content`` …"""


class RestartEvent(TypedDict):
    """What came before is void: the answer starts over."""

    type: Literal["restart"]
    reason: str


class UsageEvent(Usage):
    type: Literal["usage"]


class CompleteEvent(TypedDict):
    """The end of an answer."""

    type: Literal["complete"]
    finish_reason: NotRequired[str]


class CancelledEvent(TypedDict):
    """The end of a cancelled answer."""

    type: Literal["cancelled"]


class ErrorEvent(ErrorAnswer):
    """The end of an answer that failed."""

    type: Literal["error"]


StreamEvent = (
    QueuedEvent | StartedEvent | ChunkEvent | RestartEvent | UsageEvent | CompleteEvent | CancelledEvent | ErrorEvent
)


class Timings(TypedDict):
    created_at: float
    """Seconds since 1970, like the next two."""
    started_at: float | None
    finished_at: float | None
    queue_s: float | None
    run_s: float | None


class JobAnswer(TypedDict):
    """How far a job has come."""

    task_id: str
    session_id: str | None
    status: Status
    model: str
    priority: int
    lane: Lane
    attempt: int
    continues: str | None
    """The job that this one goes on with."""
    text: str
    """What was said so far."""
    finish_reason: str | None
    usage: Usage | None
    error: Error | None
    last_event_id: str
    """``text`` holds what was said up to this event: a stream can go on behind it."""
    timings: Timings
    not_before: NotRequired[float]
    paused: NotRequired[bool]
    position: NotRequired[int | None]
    """Jobs before this one, while it waits."""
    eta_s: NotRequired[float | None]
    """Seconds until it begins, while it waits."""


class JobRow(TypedDict):
    task_id: str
    session_id: str | None
    status: Status
    model: str
    priority: int
    lane: Lane
    attempt: int
    replica: str | None
    continues: str | None
    created_at: float
    started_at: float | None
    finished_at: float | None
    not_before: float | None
    """When it may begin, where a time was given."""


class Jobs(TypedDict):
    object: Literal["list"]
    data: list[JobRow]


class DeadJob(JobRow):
    error: Error | None
    """Why it failed."""


class DeadJobs(TypedDict):
    object: Literal["list"]
    data: list[DeadJob]


class Content(TypedDict):
    content: str


class Text(TypedDict):
    text: str


class Said(TypedDict):
    """What the answers of a model service have in common."""

    model: str
    tokens_generated: int
    cached: bool
    """The answer is that to an earlier, equal request."""


class Generated(Said):
    generated_text: str
    prompt: str


class Replied(Said):
    message: AssistantMessage


class SessionRow(TypedDict):
    session_id: str
    used_at: float
    """Seconds since 1970."""


class Sessions(TypedDict):
    object: Literal["list"]
    data: list[SessionRow]


class SessionMessages(TypedDict):
    session_id: str
    messages: list[dict[str, Any]]
    running: str | None
    """The job that answers the last message now."""
    expires_in_s: float


class Forgotten(TypedDict):
    session_id: str
    deleted: bool


class CacheStatus(TypedDict):
    __pydantic_config__ = OPEN  # type: ignore[misc]

    enabled: bool
    max_size: int
    ttl_seconds: float
    size: NotRequired[int]
    hits: NotRequired[int]
    misses: NotRequired[int]
    shared: NotRequired[int]
    hit_rate: NotRequired[float]


class ServiceHealth(TypedDict):
    status: Literal["healthy"]
    model_loaded: bool
    model_name: str | None


class ServiceStatus(TypedDict):
    service: str
    status: Literal["healthy", "unready"]
    model_loaded: bool
    model_name: str | None
    """Who answers requests that name no model."""
    cache: CacheStatus


class ProxyHealth(TypedDict):
    status: Literal["healthy"]
    providers: list[str]
    """What ``provider`` in a request can name."""


class Ready(TypedDict):
    status: Literal["ready"]


class HeldPart(TypedDict):
    """A part of the queue that is paused, or drains."""

    mode: Mode
    lane: Lane | None
    model: str | None
    since: float
    """Seconds since 1970."""


class ReplicaLoad(TypedDict):
    slots: int
    running: int


class Queue(TypedDict):
    """A pool: the jobs that the same replicas can run."""

    waiting: dict[Lane, int]
    """Jobs that wait."""
    scheduled: int
    """Jobs whose time has not come."""
    paused: int
    running: int
    slots: int
    replicas: dict[str, ReplicaLoad]
    served: int
    service_s: float | None
    """How long a job runs."""
    rate_per_s: float | None
    eta_s: float | None
    """What a new job would wait."""


class Stats(TypedDict):
    lanes: dict[Lane, int]
    """Jobs that wait, over all pools."""
    waiting: int
    scheduled: int
    paused: int
    rules: list[HeldPart]
    running: int
    replicas: list[str]
    pools: dict[str, Queue]


class Part(TypedDict):
    """Something behind the server, with what it says about itself."""

    __pydantic_config__ = OPEN  # type: ignore[misc]

    status: str
    """``ok``, or what is wrong."""


class FullHealth(TypedDict):
    status: Literal["ok", "degraded"]
    replica: str
    store: Part
    providers: dict[str, Part]
    broker: NotRequired[Part]
    rules: NotRequired[list[HeldPart]]
    queue: NotRequired[dict[str, Queue]]
    """By pool."""


class QueueRules(TypedDict):
    object: Literal["queue.rules"]
    rules: list[HeldPart]


class CoveredPart(HeldPart):
    by: str
    """Who said so."""
    waiting: int
    running: int


class PoolNumbers(TypedDict):
    waiting: dict[Lane, int]
    scheduled: int
    paused: int
    running: int


class Queues(TypedDict):
    object: Literal["queues"]
    rules: list[CoveredPart]
    pools: dict[str, PoolNumbers]


class CancelledJobs(TypedDict):
    object: Literal["jobs.cancelled"]
    cancelled: int
    task_ids: list[str]
    more: bool
    """There are more that fit: the call can be repeated."""


class PromptUsage(TypedDict):
    """Tokens of the inputs."""

    __pydantic_config__ = OPEN  # type: ignore[misc]

    prompt_tokens: int
    total_tokens: int


class Embedding(TypedDict):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str
    """Numbers, or the base64 of 32-bit floats, the lowest byte first."""


class Embeddings(TypedDict):
    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: PromptUsage


class EmbeddingsAccepted(TypedDict):
    status: Status
    task_id: str
    status_url: str


class EmbeddingResult(TypedDict):
    embeddings: list[list[float]]
    model: str
    count: int
    dimensions: int
    usage: PromptUsage


class EmbeddingJob(TypedDict):
    """How far a batch has come."""

    task_id: str
    status: Status
    ready: bool
    done: int
    """Inputs whose vectors are there."""
    count: int
    """All of them."""
    result: NotRequired[EmbeddingResult]
    error: NotRequired[Error]


class Delivery(TypedDict):
    id: str
    """The event's; its `webhook-id`."""
    task_id: str
    receiver: str
    """`request`, or the name of one in the configuration."""
    status: Literal["waiting", "dead"]
    attempts: int
    last_attempt_at: float | None
    """Seconds since 1970, like the others."""
    last_status: int | None
    """What the receiver answered."""
    error: str | None
    next_attempt_at: float | None
    given_up_at: float | None


class Deliveries(TypedDict):
    object: Literal["list"]
    data: list[Delivery]


class Resent(TypedDict):
    task_id: str
    receivers: list[str]


class WebhookSecret(TypedDict):
    key: str
    """The newest."""
    keys: list[str]
    """All that sign: two, while one replaces the other."""
