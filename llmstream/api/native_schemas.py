"""What clients of the routes beside OpenAI's may send."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictStr, field_validator

from llmstream.api.schemas import EXTENSIONS, Hook, JobId, Message, Number, Priority, SessionId, Tokens
from llmstream.api.times import Later
from llmstream.config import OnCut, OnDisconnect
from llmstream.config_routes import Multitask
from llmstream.types import Durability

Temperature = Annotated[Number, Field(ge=0, le=2)]
ModelName = Annotated[StrictStr, Field(min_length=1, max_length=256)]
Prompt = Annotated[StrictStr, Field(min_length=1)]


class JobFields(Later):
    """What can be said about the job of any request."""

    model_config = ConfigDict(extra="allow")

    provider: StrictStr | None = None
    """Run by this provider."""
    priority: Priority = 0
    """10 first, -10 last."""
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

    def further(self) -> dict[str, Any]:
        """Members that we do not know: they travel on."""
        return {name: value for name, value in (self.model_extra or {}).items() if name not in EXTENSIONS}


class Meta(BaseModel):
    """How an LLM core is to generate."""

    model_config = ConfigDict(extra="forbid")

    temperature: Temperature = 0.2
    tokens_limit: Tokens = 8096
    """Longest answer."""
    stop_words: list[StrictStr] = []
    """The answer ends before the first of them."""
    model: ModelName | None = None
    """The server's default model answers where there is none."""


class CoreBody(JobFields):
    """What both routes of an LLM core have in common."""

    meta: Meta = Meta()
    """How to generate."""


class CoreGenerateBody(CoreBody):
    """``POST /generate``"""

    content: Prompt
    """The question."""


class CoreChatBody(CoreBody):
    """``POST /chat_completion``"""

    messages: Annotated[list[Message], Field(min_length=1)]
    """The conversation."""


class QuestionBody(JobFields):
    """``POST /question``"""

    text: StrictStr
    """The question, of at most ``question.max_chars`` characters."""

    @field_validator("text")
    @classmethod
    def _says_something(cls, text: str) -> str:
        if not text.strip():
            raise ValueError("the question is empty")
        return text


class ServiceBody(JobFields):
    """What both routes of a model service have in common."""

    model: ModelName | None = None
    """The server's default model answers where there is none."""
    max_tokens: Tokens | None = None
    """Longest answer."""
    temperature: Temperature | None = None


class PromptBody(ServiceBody):
    """``POST /v1/generate``"""

    prompt: Prompt
    """The question."""


class ServiceChatBody(ServiceBody):
    """``POST /v1/chat``"""

    messages: Annotated[list[Message], Field(min_length=1)]
    """The conversation; in a session, what is new of it."""
    stream: StrictBool = False
    """Answers with server-sent events."""
    session_id: SessionId | None = None
    """The conversation that the messages belong to: what was said before is added."""
    history: StrictBool = True
    """False: the session is only where the answer can be read."""
    multitask: Multitask | None = None
    """What to do while another message of the session is being answered."""
