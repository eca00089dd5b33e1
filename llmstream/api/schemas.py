"""What clients may send. Validation lives here and nowhere else; unknown fields of OpenAI bodies travel on unharmed."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

import msgspec
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.config import JsonDict

from llmstream.api.times import Later
from llmstream.config import OnCut, OnDisconnect
from llmstream.config_routes import Multitask
from llmstream.config_webhooks import EventType
from llmstream.types import MAX_PRIORITY, MIN_PRIORITY, Durability, GenerateRequest, Kind, Webhook, encode

Number = StrictFloat  # takes whole numbers, too
Tokens = Annotated[StrictInt, Field(ge=1, le=2**31 - 1)]
Seed = Annotated[StrictInt, Field(ge=-(2**63), le=2**63 - 1)]
Priority = Annotated[StrictInt, Field(ge=MIN_PRIORITY, le=MAX_PRIORITY)]
JobId = Annotated[StrictStr, Field(pattern=r"^[A-Za-z0-9_.:-]{1,128}$")]
SessionId = Annotated[StrictStr, Field(pattern=r"^[A-Za-z0-9_.:@-]{1,128}$")]

EXTENSIONS = frozenset({
    "provider", "priority", "session_id", "deadline_s", "job_id", "on_disconnect", "on_cut", "durability",
    "not_before", "delay_s", "history", "multitask", "webhook",
})  # fmt: skip
"""Fields of ours in an OpenAI body; upstreams never see them."""


class WebhookBody(BaseModel):
    """Who is to be told of the job's end; an URL alone stands for the first field."""

    model_config = ConfigDict(extra="forbid")

    url: StrictStr
    """A public host over https, unless the server's settings allow others."""
    events: Annotated[list[EventType], Field(min_length=1)] | None = None
    """Which ends are wanted; all, where nothing is said."""
    include_text: StrictBool = True
    """Whether the event holds the answer's text."""

    @property
    def named(self) -> Webhook:
        return Webhook(self.url, None if self.events is None else tuple(self.events), self.include_text)


def _url_alone(given: Any) -> Any:
    return {"url": given} if isinstance(given, str) else given


Hook = Annotated[WebhookBody, BeforeValidator(_url_alone, json_schema_input_type=StrictStr | WebhookBody)]

_members = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


class Message(BaseModel):
    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: StrictStr | list[dict[str, Any]] | None = None


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="allow")

    include_usage: StrictBool = False


class OpenAIBody(Later):
    """What chat and text completions have in common."""

    model_config = ConfigDict(extra="allow")

    model: Annotated[StrictStr, Field(min_length=1, max_length=256)]
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[StrictInt, Field(ge=1, le=128)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    max_tokens: Tokens | None = None
    max_completion_tokens: Tokens | None = None
    seed: Seed | None = None
    stop: StrictStr | list[StrictStr] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, Number] | None = None
    provider: StrictStr | None = None
    """Extension: run by this provider."""
    priority: Priority = 0
    """Extension: 10 first, -10 last."""
    session_id: SessionId | None = None
    """Extension: the answer can also be read at ``/stream/{session_id}``."""
    history: StrictBool | None = None
    """Extension: the session is a conversation, and what was said in it before is added."""
    multitask: Multitask | None = None
    """Extension: what to do while another message of the conversation is being answered."""
    deadline_s: Annotated[Number, Field(gt=0, le=7 * 24 * 3600)] | None = None
    """Extension: seconds from now after which the job fails if it is not finished, waiting included."""
    job_id: JobId | None = None
    """Extension: the caller's own id; the same id is the same job."""
    on_disconnect: OnDisconnect | None = None
    """Extension: what becomes of the job when nobody reads it any more."""
    on_cut: OnCut | None = None
    """Extension: what becomes of a streamed answer that its model breaks off where it cannot go on."""
    durability: Durability | None = None
    """Extension: when an event counts as logged."""
    webhook: Hook | None = None
    """Extension: who is to be told of the job's end."""

    @field_validator("stream_options")
    @classmethod
    def _needs_stream(cls, value: StreamOptions | None, info: ValidationInfo) -> StreamOptions | None:
        if value is not None and not info.data.get("stream"):
            raise ValueError("stream_options is only allowed when stream is true")
        return value

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class ChatCompletionBody(OpenAIBody):
    """``POST /v1/chat/completions``"""

    messages: Annotated[list[Message], Field(min_length=1)]
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None
    tools: list[dict[str, Any]] | None = None
    response_format: dict[str, Any] | None = None


EITHER: JsonDict = {
    "oneOf": [
        {"required": ["message"], "properties": {"message": {"type": "string"}}},
        {"required": ["messages"], "properties": {"messages": {"type": "array"}}},
    ]
}
"""What :meth:`ChatBody._one_of_both` checks, for the document."""


class ChatBody(Later):
    """``POST /chat`` and ``POST /chat/async``: one message, or a conversation."""

    model_config = ConfigDict(extra="allow", json_schema_extra=EITHER)

    message: Annotated[StrictStr, Field(min_length=1)] | None = None
    """The question. Give this or ``messages``."""
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    """A conversation."""
    model: Annotated[StrictStr, Field(min_length=1, max_length=256)] | None = None
    """The server's default model answers where there is none."""
    priority: Priority = 0
    """10 first, -10 last."""
    session_id: SessionId | None = None
    """The answer can also be read at ``/stream/{session_id}``."""
    history: StrictBool | None = None
    """Whether the message goes on with the conversation of ``session_id``, and is kept in it."""
    multitask: Multitask | None = None
    """What the message does while another one of its conversation is being answered."""
    provider: StrictStr | None = None
    """Run by this provider."""
    deadline_s: Annotated[Number, Field(gt=0, le=7 * 24 * 3600)] | None = None
    """Seconds from now after which the job fails if it is not finished, waiting included."""
    job_id: JobId | None = None
    """The caller's own id; the same id is the same job."""
    on_disconnect: OnDisconnect | None = None
    """What becomes of the job when nobody reads it any more."""
    on_cut: OnCut | None = None
    """What becomes of an answer that its model breaks off where it cannot go on."""
    durability: Durability | None = None
    """When an event counts as logged."""
    webhook: Hook | None = None
    """Who is to be told of the job's end: a URL, or one with what is wanted there."""
    max_tokens: Tokens | None = None
    """Longest answer."""
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.message is None) == (self.messages is None):
            raise ValueError("give either 'message' (a string) or 'messages' (a conversation)")
        return self


def named_webhook(hook: WebhookBody | None) -> Webhook | None:
    return hook.named if hook is not None else None


def openai_request(kind: Kind, schema: OpenAIBody, body: dict[str, Any], raw: bytes) -> GenerateRequest:
    """The request as the gateway takes it: the caller's own bytes without our extensions."""
    kept = msgspec.Raw(raw) if EXTENSIONS.isdisjoint(body) else msgspec.Raw(encode(_own(raw)))
    return GenerateRequest(kind=kind, model=schema.model, raw=kept, provider=schema.provider)


def chat_request(schema: ChatBody, raw: bytes, default_model: str) -> GenerateRequest:
    """A native chat body as an OpenAI one; fields beside ours travel on."""
    kept, model = _own(raw), schema.model or default_model
    kept["model"] = msgspec.Raw(encode(model))
    if (said := kept.pop("message", None)) is not None and schema.message is not None:
        kept["messages"] = msgspec.Raw(b'[{"role":"user","content":%b}]' % said)
    return GenerateRequest(kind="chat", model=model, raw=msgspec.Raw(encode(kept)), provider=schema.provider)


def _own(raw: bytes) -> dict[str, msgspec.Raw]:
    """The members of a body that are not ours, as they came."""
    return {key: value for key, value in _members(raw).items() if key not in EXTENSIONS}
