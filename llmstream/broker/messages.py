"""What messages say: orders in the words of a queue in front of an LLM core, jobs of ours, and results. Pure."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from llmstream.config_webhooks import EventType
from llmstream.errors import BadRequest, UpstreamBroken
from llmstream.store.repeats import digest
from llmstream.transcript import Transcript
from llmstream.types import MAX_PRIORITY, MIN_PRIORITY, Failure, GenerateRequest, Job, JobState, Webhook, encode

JOB = "llmstream.job"
"""The AMQP ``type`` of a message that holds a whole job."""
ORDER = "task"
DEFAULT_LIMIT = 8096
_SPARE_TOKENS = 256
"""A limit that leaves less of the context than this to the prompt is no tighter than the context itself."""
_CANCELLED = Failure(message="The job was cancelled.", type="invalid_request_error", code="cancelled", status=409)

JobId = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_.:-]{1,128}$")]


class OrderMeta(Struct, frozen=True):
    """How to generate."""

    temperature: Annotated[float, Meta(ge=0, le=2)] | None = 0.2
    tokens_limit: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = DEFAULT_LIMIT
    """Most tokens of the answer; None: as many as the model can give."""
    stop_words: list[str] | None = None
    model: Annotated[str, Meta(min_length=1, max_length=256)] | None = None
    """None: the first one that is configured."""


class OrderMessage(Struct, frozen=True):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[dict[str, Any]]


class OrderWebhook(Struct, frozen=True, forbid_unknown_fields=True):
    """Who is to be told of the end."""

    url: str
    events: Annotated[tuple[EventType, ...], Meta(min_length=1)] | None = None
    include_text: bool = True


class Order(Struct, frozen=True):
    """A generation somebody asks for: one prompt as ``content``, or a conversation as ``messages``."""

    job_id: JobId
    meta: OrderMeta = OrderMeta()
    content: str | list[dict[str, Any]] | None = None
    messages: Annotated[list[OrderMessage], Meta(min_length=1)] | None = None
    priority: Annotated[int, Meta(ge=MIN_PRIORITY, le=MAX_PRIORITY)] | None = None
    webhook: str | OrderWebhook | None = None
    """A URL, or one with what is wanted there."""

    def __post_init__(self) -> None:
        if (self.content is None) == (self.messages is None):
            raise ValueError("give either 'content' (a prompt) or 'messages' (a conversation)")

    @property
    def asked(self) -> dict[str, Any]:
        """What the order says beside its id, as :func:`said`."""
        value = msgspec.to_builtins(self)
        return said(value["meta"], value["messages"] if self.content is None else self.content, self.priority or 0)

    @property
    def fingerprint(self) -> str:
        """Equal for orders that ask for the same answer, and for requests to ``/generate`` and ``/chat_completion``."""
        return digest(msgspec.json.encode(self.asked, order="deterministic").decode())

    @property
    def hook(self) -> Webhook | None:
        """Who is to be told of the end."""
        given = OrderWebhook(self.webhook) if isinstance(self.webhook, str) else self.webhook
        return None if given is None else Webhook(given.url, given.events, given.include_text)

    def request(self, default_model: str, contexts: dict[str, int | None]) -> GenerateRequest:
        """The order as a chat request; ``contexts`` are the tokens that models take, where known."""
        model = self.meta.model or default_model
        messages = self.messages or [OrderMessage("user", self.content or "")]
        body: dict[str, Any] = {"model": model, "messages": msgspec.to_builtins(messages)}
        limit, context = self.meta.tokens_limit, contexts.get(model)
        if limit is not None and (context is None or limit + _SPARE_TOKENS <= context):
            body["max_tokens"] = limit
        if self.meta.temperature is not None:
            body["temperature"] = self.meta.temperature
        if self.meta.stop_words:
            body["stop"] = self.meta.stop_words
        return GenerateRequest.of("chat", model, body)


def said(meta: dict[str, Any], what: str | list[dict[str, Any]], priority: int) -> dict[str, Any]:
    """A generation somebody asks for, the same wherever it comes from: ``meta`` has all its members."""
    return {"meta": {**meta, "stop_words": meta["stop_words"] or []}, "said": what, "priority": priority}


class _Error(Struct, frozen=True):
    message: str
    type: str = "server_error"
    code: str | None = None
    param: str | None = None
    status: Annotated[int, Meta(ge=400, le=599)] = 502


class _Result(Struct, frozen=True):
    content: str | None = None
    error: _Error | None = None


_jobs = msgspec.json.Decoder(Job)
_results = msgspec.json.Decoder(_Result)


def parse(body: bytes, kind: str | None, message_id: str | None) -> Job | Order:
    """Reads a message. ``kind`` is its AMQP type; ``message_id`` stands in for an order's missing ``job_id``.

    An order comes bare, or inside the task that the page's own API makes of it: ``{"kwargs": {"prompt": …}}``.
    Raises BadRequest that says what is wrong.
    """
    try:
        return _jobs.decode(body) if kind == JOB else _order(msgspec.json.decode(body), message_id)
    except RecursionError:
        raise BadRequest("The message is nested too deeply.", code="invalid_message") from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise BadRequest(f"The message cannot be read: {error}.", code="invalid_message") from None


def _order(value: Any, message_id: str | None) -> Order:
    if isinstance(value, dict) and isinstance(value.get("kwargs"), dict):
        message_id = message_id or value.get("id")
        value = value["kwargs"]
    if isinstance(value, dict) and isinstance(value.get("prompt"), dict):
        value = value["prompt"]
    if isinstance(value, dict) and value.get("job_id") is None and message_id:
        value = {**value, "job_id": message_id}
    return msgspec.convert(value, Order)


def job_id_of(body: bytes, message_id: str | None) -> str | None:
    """For a message that cannot be run: whose result somebody may wait for, if that can be made out."""
    try:
        value = msgspec.json.decode(body)
        for name in ("kwargs", "prompt"):
            if isinstance(value.get(name), dict):
                value = value[name]
        return msgspec.convert(value.get("job_id") or message_id, JobId)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, AttributeError):
        return None


def task(order: Order) -> bytes:
    """An order as the page's core reads it."""
    prompt = {name: value for name, value in msgspec.to_builtins(order).items() if value is not None}
    single = order.content is not None
    return encode(
        {
            "type": "task",
            "task": "generate" if single else "chat_completion",
            "args": [],
            "kwargs": {"prompt": prompt, "prompt_type": "single_generation" if single else "chat_completion"},
            "id": order.job_id,
            "retries": 0,
            "eta": None,
        }
    )


def result(state: JobState, transcript: Transcript) -> bytes:
    """What the one who posted an order gets: ``{"content"}``; where there is no answer, ``error`` says why."""
    failure = _CANCELLED if state.status == "cancelled" else state.failure
    if failure is not None:
        return refusal(failure)
    choice = transcript.choices.get(0)
    return encode({"content": choice.text if choice is not None else ""})


def refusal(failure: Failure) -> bytes:
    """The result of an order that was not or could not be run to its end."""
    error = _Error(failure.message, failure.type, failure.code, failure.param, failure.status)
    return encode({"content": "", "error": error})


def answer_of(stored: bytes) -> str | Failure:
    """What a stored result says. Raises UpstreamBroken for one that cannot be read."""
    try:
        found = _results.decode(stored)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise UpstreamBroken(f"The core stored a result that cannot be read: {error}.") from None
    if found.error is not None:
        return Failure(**msgspec.structs.asdict(found.error))
    if found.content is None:
        raise UpstreamBroken("The core stored a result without 'content'.")
    return found.content
