"""What the routes of single families assume where a request does not say it."""

from __future__ import annotations

from pathlib import PurePath
from typing import Annotated, Literal

from pydantic import Field

from llmstream.config_schema import Section

Temperature = Annotated[float, Field(ge=0, le=2)]
Multitask = Literal["wait", "reject", "interrupt"]
MaxTokens = Annotated[int, Field(ge=1, le=2**31 - 1)]


def name_of(source: str | None, name: str | None) -> str | None:
    """What clients call weights that are called ``name``: those in a file as the file."""
    return PurePath(name).stem if source == "local" and name is not None else name


class ModelDefaults(Section):
    name: str | None = None
    """Answers requests that name no model; None: the first one configured. With ``source`` it names the weights."""
    source: Literal["hub", "local"] | None = None
    """Makes a local model of ``name``: ``hub``: the ``owner/repo`` or ``owner/repo/file.gguf`` of Hugging Face;
    ``local``: the path of a file, without folder and ending what clients ask for. None: ``models`` says it all."""
    device: Literal["cpu", "cuda"] | None = None
    """Where that model is computed: ``cpu``, or with all its layers on the GPU. None: ``models.NAME.gpu_layers``."""
    embeddings: str | None = None
    """Makes embeddings for requests that name no model; None: the first one here that makes them."""
    max_tokens: MaxTokens = 512
    """Longest answer of ``/v1/generate`` and ``/v1/chat`` where the request says nothing."""
    temperature: Temperature = 0.7
    """Temperature of ``/v1/generate`` and ``/v1/chat`` where the request says nothing."""

    @property
    def served(self) -> str | None:
        """What clients call the model."""
        return name_of(self.source, self.name)


class QuestionSettings(Section):
    system_prompt: str | None = None
    """System message for ``/question``. ``LLM_SYSTEM_PROMPT`` sets it too."""
    temperature: Temperature = 0.7
    """Temperature for ``/question``. ``LLM_TEMPERATURE`` sets it too."""
    max_tokens: MaxTokens | None = None
    """Longest answer of ``/question``; None leaves it to the model. ``LLM_MAX_TOKENS`` sets it too."""
    timeout_s: Annotated[float, Field(gt=0, le=7 * 24 * 3600)] = 30.0
    """Seconds for an answer of ``/question``, waiting included. ``REQUEST_TIMEOUT`` sets it too."""
    max_chars: Annotated[int, Field(ge=1)] = 4000
    """Longest text of a question."""


class CacheSettings(Section):
    enabled: bool = True
    """Answers a request to ``/v1/generate``, or to ``/v1/chat`` without a session, that equals an earlier one of the
    same principal with the earlier answer, also where another one would have come out."""
    everywhere: bool = False
    """The same on ``/v1/chat/completions``, ``/v1/embeddings``, ``/v1/chat/stream``, ``/generate``,
    ``/chat_completion`` and ``/question``."""
    size: Annotated[int, Field(ge=1)] = 100
    """Answers kept for each principal; the least recently used ones go first."""
    ttl_seconds: Annotated[float, Field(gt=0)] = 3600.0
    """How long after its request an answer may be given again; never longer than ``store.retention_s``."""
    shared: bool = False
    """One cache for all principals: who asks the same gets what another one was told."""
    share_in_flight: bool = False
    """Equal requests get one answer also while it is being generated; cancelling it ends it for all."""

    @property
    def covers_all(self) -> bool:
        """Whether routes use it that do so only on demand."""
        return self.enabled and self.everywhere


class ChatHistorySettings(Section):
    enabled: bool = True
    """Keeps the conversation of a ``session_id`` that ``/v1/chat`` gets, or another route with ``history: true``."""
    everywhere: bool = False
    """The same on ``/chat``, ``/chat/async``, ``/v1/chat/completions`` and ``/v1/chat/stream`` where the request does
    not say ``history: false``."""
    ttl_seconds: Annotated[float, Field(gt=0)] = 7200.0
    """How long a conversation is kept after its last message; never longer than ``store.retention_s``."""
    max_bytes: Annotated[int, Field(ge=1)] = 256 * 1024
    """What is kept of one conversation, as JSON; the oldest turns go first."""
    multitask: Multitask = "wait"
    """What a message does that comes while another one is being answered: ``wait``, ``reject`` (409) or ``interrupt``
    (end that answer). A request may ask for any."""
    wait_s: Annotated[float, Field(gt=0)] = 300.0
    """How long a message waits at most for the answers before it."""
