"""Settings: defaults < YAML file < environment < flags, validated once."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


def default_data_dir() -> Path:
    """``$XDG_DATA_HOME/llmstream``, by default ``~/.local/share/llmstream``."""
    base = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(base).expanduser() / "llmstream"


class ServerSettings(Section):
    host: str = "127.0.0.1"
    """Address to listen on. Without API keys only loopback addresses are allowed."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """TCP port; 0 picks a free one."""
    shutdown_grace_s: Annotated[float, Field(ge=0)] = 20.0
    """On SIGTERM, seconds that open streams and running jobs get before they are cut and left to be taken over."""
    max_body_bytes: Annotated[int, Field(ge=1024)] = 20 * 1024 * 1024
    """Largest accepted request body."""
    ping_s: Annotated[float, Field(gt=0)] = 15.0
    """Seconds between comment lines on a silent SSE stream."""


class StoreSettings(Section):
    url: SecretStr | None = None
    """Redis 7+/Valkey 8+ URL; without one an embedded Valkey runs in ``data_dir``. ``REDIS_URL`` sets it too."""
    prefix: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")] = "llmstream"
    """Starts the name of every key."""
    connections: Annotated[int, Field(ge=2, le=256)] = 4
    """Connections for reads of history; the total does not depend on the number of clients."""
    timeout_s: Annotated[float, Field(gt=0)] = 5.0
    """Deadline of one command."""
    outage_s: Annotated[float, Field(ge=0)] = 30.0
    """How long running jobs hold what is not logged yet while the store is away."""
    retention_s: Annotated[float, Field(gt=0)] = 24 * 3600.0
    """How long a finished job and its log can be read."""
    unfinished_retention_s: Annotated[float, Field(gt=0)] = 7 * 24 * 3600.0
    """How long an unfinished job is kept when no replica runs."""
    sync: Literal["everysec", "always"] = "everysec"
    """When the embedded Valkey's log of changes reaches the disk."""


class SchedulerSettings(Section):
    max_waiting: Annotated[int, Field(ge=1)] = 10_000
    """Waiting jobs per pool; more are refused with 429."""
    ageing_s: Annotated[float, Field(gt=0)] = 10.0
    """Seconds of waiting that count as much as one step of priority."""
    lease_s: Annotated[float, Field(ge=0.2)] = 2.0
    """A replica silent for this long loses its jobs to others."""
    max_attempts: Annotated[int, Field(ge=1, le=100)] = 3
    """Executions of one job before it fails with what it has."""
    remote_slots: Annotated[int, Field(ge=1)] = 1000
    """Remote generations one replica runs at once, over all providers."""


class DeadlineSettings(Section):
    total_s: Annotated[float, Field(gt=0)] = 300.0
    """Seconds from the start of a job's first attempt to its end."""
    first_token_s: Annotated[float, Field(gt=0)] = 120.0
    """Seconds from the start of an attempt to its first token."""
    stall_s: Annotated[float, Field(gt=0)] = 60.0
    """Seconds between two tokens."""


class ModelSettings(Section):
    source: str = "smollm2"
    """``smollm2``, a path of a GGUF/GGML file, or a Hugging Face ``owner/repo/file.gguf``. Ignored by ``echo``."""
    engine: Literal["llamacpp", "ctransformers", "echo"] = "llamacpp"
    slots: Annotated[int, Field(ge=1, le=256)] = 4
    """Generations at once."""
    context: Annotated[int, Field(ge=32)] | None = None
    """Tokens of prompt and answer together, for each slot; None takes the model's own, at most 8192."""
    threads: Annotated[int, Field(ge=1)] | None = None
    """Compute threads; None takes the cores available to the process."""
    gpu_layers: Annotated[int, Field(ge=0)] | None = None
    """Layers on the GPU; None leaves the choice to the engine."""
    model_type: str | None = None
    """Architecture of a GGML file for ctransformers (``gpt2``, ``llama`` …); GGUF files name their own."""
    system_prompt: str | None = "You are a helpful assistant."
    """System message for conversations without one."""
    tokens: Annotated[int, Field(ge=0)] | None = None
    """echo: numbered tokens to produce; None repeats the words of the last user message."""
    delay_ms: Annotated[float, Field(ge=0)] = 0.0
    """echo: pause before each token."""


class ProviderSettings(Section):
    base_url: str
    """Root of an OpenAI-compatible API, for example ``https://api.openai.com/v1``."""
    api_key: SecretStr | None = None
    """Bearer key; None sends none."""
    models: list[str] = []
    """Names served by this provider; ``*`` stands for any name no one else serves."""
    continue_by: Literal["none", "assistant_prefill"] = "none"
    """How a cut answer goes on: prefill sends what was logged as the last assistant message."""
    connect_timeout_s: Annotated[float, Field(gt=0)] = 10.0


class LoggingSettings(Section):
    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    format: Literal["console", "json"] = "console"


class Settings(Section):
    """Everything that can be configured. Build it directly, or with :func:`load` from file, environment and flags."""

    data_dir: Path = Field(default_factory=default_data_dir)
    """Where weights and the embedded store live."""
    server: ServerSettings = ServerSettings()
    store: StoreSettings = StoreSettings()
    scheduler: SchedulerSettings = SchedulerSettings()
    deadlines: DeadlineSettings = DeadlineSettings()
    models: dict[str, ModelSettings] = {}
    """Local models by the name clients ask for. With neither models nor providers, ``smollm2`` is served."""
    providers: dict[str, ProviderSettings] = {}
    """Remote APIs by name."""
    logging: LoggingSettings = LoggingSettings()
