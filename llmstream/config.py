"""Settings: defaults < YAML file < environment < flags, validated once."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from msgspec.structs import replace
from pydantic import Field, SecretStr, field_validator, model_validator

from llmstream.config_broker import BrokerSettings
from llmstream.config_filters import FilterSettings, PresidioSettings, filter_problems
from llmstream.config_routes import CacheSettings, ChatHistorySettings, ModelDefaults, QuestionSettings
from llmstream.config_schema import Section, Setting, comma_separated, plain, schema_of, split_url
from llmstream.config_security import (
    KEY_NAME_PATTERN,
    KEY_NAME_RULE,
    KeySettings,
    RateLimitSettings,
    SecuritySettings,
    limits_in,
)
from llmstream.config_sources import build
from llmstream.config_variables import from_known_variables
from llmstream.config_webhooks import ReceiverSettings, WebhookSettings
from llmstream.presets import PRESETS, Capabilities, ContinueBy, Preset, StreamUsage, preset_of
from llmstream.types import REQUESTED

OnDisconnect = Annotated[str, Field(pattern=r"^(cancel|continue|grace|grace\([0-9]{1,5}(\.[0-9]{1,3})?s\))$")]
OnCut = Literal["fail", "restart"]
NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}")
ROUTE_PATTERN = re.compile(r"[A-Za-z0-9*?][A-Za-z0-9._:/*?@-]{0,127}")
Strategy = Literal["ordered", "weighted", "least_busy", "fastest", "cheapest"]


def default_data_dir() -> Path:
    """``$XDG_DATA_HOME/llmstream``, by default ``~/.local/share/llmstream``."""
    base = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(base).expanduser() / "llmstream"


class ServerSettings(Section):
    host: str = "127.0.0.1"
    """Address to listen on. Without API keys only loopback addresses are allowed."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """TCP port; 0 picks a free one."""
    name: Annotated[str, Field(min_length=1, max_length=100)] = "llmstream"
    """What the service is called in ``/status`` and, as ``service.name``, in traces. ``app.name`` sets it
    too, as ``app`` is another name of this section."""
    workers: Annotated[int, Field(ge=1, le=256)] = 1
    """Replica processes that ``serve`` runs on the one port; each loads its own copy of every local model.
    ``UVICORN_WORKERS`` sets it too."""
    worker_timeout_s: Annotated[float, Field(ge=1)] = 10.0
    """One of several workers that shows no life for so long hangs, and is killed and replaced."""
    shutdown_grace_s: Annotated[float, Field(ge=0)] = 20.0
    """On SIGTERM, seconds that open streams and running jobs get before they are cut and left to be taken over."""
    max_body_bytes: Annotated[int, Field(ge=1024)] = 20 * 1024 * 1024
    """Largest accepted request body."""
    max_header_bytes: Annotated[int, Field(ge=1024, le=1024 * 1024)] = 8190
    """Longest request line, and longest single header."""
    header_timeout_s: Annotated[float, Field(gt=0)] = 30.0
    """What a sender gets to begin, and then to complete, a request's headers; a connection between two requests may be
    silent for longer."""
    body_timeout_s: Annotated[float, Field(gt=0)] = 30.0
    """What a sender gets for its whole body."""
    ping_s: Annotated[float, Field(gt=0)] = 15.0
    """Seconds between comment lines on a silent SSE stream."""
    retry_window_s: Annotated[float, Field(ge=0)] = 600.0
    """For so long an SDK's automatic retry attaches to the job of the request it repeats; 0: every retry is new."""

    docs: bool = True
    """Serves ``/openapi.json``, ``/docs`` and ``/redoc``."""

    @property
    def loopback(self) -> bool:
        """Whether only programs on this machine can reach the server."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host.lower() == "localhost"


class StoreSettings(Section):
    url: SecretStr | None = None
    """Redis 7+/Valkey 8+ URL, also of cluster nodes; without one an embedded Valkey runs in ``data_dir``. ``REDIS_URL``
    sets it too."""
    host: str | None = None
    """Where Redis listens, for ``store.url`` to be made of; ``REDIS_HOST`` sets it too."""
    port: Annotated[int, Field(ge=1, le=65535)] = 6379
    """Port beside ``store.host``; ``REDIS_PORT`` sets it too."""
    prefix: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")] = "llmstream"
    """Starts the name of every key."""
    timeout_s: Annotated[float, Field(gt=0)] = 5.0
    """Deadline of one command."""
    outage_s: Annotated[float, Field(ge=0)] = 30.0
    """How long running jobs hold what is not logged yet while the store is away."""
    retention_s: Annotated[float, Field(gt=0)] = 24 * 3600.0
    """How long a finished job and its log can be read."""
    unfinished_retention_s: Annotated[float, Field(gt=0)] = 7 * 24 * 3600.0
    """How long an unfinished job is kept when no replica runs."""
    durability: Literal["full", "fsync", "memory"] = "full"
    """``full``: the store has what a client sees; ``fsync``: on its disk; ``memory``: nothing is stored. A request may
    ask for any."""
    memory_bytes: Annotated[int, Field(ge=1)] = 256 * 1024 * 1024
    """What the memory jobs of one replica may take together, prompts and answers; more are refused with 429."""
    memory_answer_bytes: Annotated[int, Field(ge=1)] = 4 * 1024 * 1024
    """Largest answer of a memory job; a larger one is cut and fails."""
    memory_retention_s: Annotated[float, Field(ge=0)] = 60.0
    """How long a finished memory job can be read."""
    sync: Literal["everysec", "always"] = "everysec"
    """When the embedded Valkey's log of changes reaches the disk."""

    @model_validator(mode="before")
    @classmethod
    def _of_host_and_port(cls, given: Any) -> Any:
        if not isinstance(given, dict) or given.get("url") is not None or not given.get("host"):
            return given
        host = f"[{given['host']}]" if ":" in str(given["host"]) else given["host"]
        return {**given, "url": f"redis://{host}:{given.get('port', 6379)}/0"}

    @field_validator("url")
    @classmethod
    def _redis_url(cls, url: SecretStr | None) -> SecretStr | None:
        if url and not all(map(_is_redis_url, store_urls(url.get_secret_value()))):
            raise ValueError(
                "redis://, rediss:// or unix:// with a host or path, for example redis://user:password@host:6379/0; "
                "special characters in a password are written as %XX"
            )
        return url


class SchedulerSettings(Section):
    max_waiting: Annotated[int, Field(ge=1)] = 10_000
    """Waiting jobs per pool; more are refused with 429."""
    max_scheduled: Annotated[int, Field(ge=1)] = 10_000
    """Jobs per pool whose time to begin (``not_before``) is still to come; more are refused with 429."""
    max_delay_s: Annotated[float, Field(gt=0, le=366 * 24 * 3600)] = 7 * 24 * 3600.0
    """How far ahead ``not_before`` may lie, in seconds."""
    ageing_s: Annotated[float, Field(gt=0)] = 10.0
    """Seconds of waiting that count as much as one step of priority."""
    lease_s: Annotated[float, Field(ge=0.2)] = 2.0
    """A replica silent for this long loses its jobs to others."""
    max_attempts: Annotated[int, Field(ge=1, le=100)] = 3
    """Executions of one job before it fails with what it has."""
    remote_slots: Annotated[int, Field(ge=1)] = 1000
    """Remote generations one replica runs at once, over all providers. ``CELERY_CONCURRENCY`` sets it too."""


class RetrySettings(Section):
    base_s: Annotated[float, Field(ge=0)] = 1.0
    """Longest wait before the second attempt; it doubles with every further one. The wait is a random part of it."""
    cap_s: Annotated[float, Field(ge=0)] = 8.0
    """Longest wait between two attempts, unless the upstream names a longer one (``Retry-After``)."""
    on_cut: OnCut = "fail"
    """What becomes of a stream on ``/v1`` whose model broke off where it cannot go on: ``fail`` keeps what was said,
    ``restart`` begins anew and says so."""


class DisconnectSettings(Section):
    streams: OnDisconnect = "grace"
    """What becomes of an answer on ``/v1`` that nobody reads any more: ``cancel``, ``continue``, ``grace``,
    ``grace(30s)``."""
    jobs: OnDisconnect = "continue"
    """The same for ``/chat`` and ``/chat/async``."""
    grace_s: Annotated[float, Field(ge=0, le=86400)] = 30.0
    """Seconds that ``grace`` waits for a reader to come back, and every answer for its first reader."""

    def limit(self, policy: str) -> float | None:
        """Seconds without a reader after which a job is cancelled; None: never."""
        if policy == "continue":
            return None
        if policy == "cancel":
            return 0.0
        return self.grace_s if policy == "grace" else float(policy.removeprefix("grace(").removesuffix("s)"))


class DeadlineSettings(Section):
    total_s: Annotated[float, Field(gt=0)] = 300.0
    """Seconds from the start of a job's first attempt to its end."""
    first_token_s: Annotated[float, Field(gt=0)] = 120.0
    """Seconds from the start of an attempt to its first token."""
    stall_s: Annotated[float, Field(gt=0)] = 60.0
    """Seconds between two tokens."""


class ModelSettings(Section):
    source: str = "smollm2"
    """``smollm2``, ``all-minilm-l6-v2`` (makes embeddings), a path of a GGUF/GGML file, or a Hugging Face
    ``owner/repo/file.gguf``. Ignored by ``echo``."""
    engine: Literal["llamacpp", "ctransformers", "echo"] = "llamacpp"
    """What runs the model: llama.cpp, ctransformers for older GGML files, or the built-in echo."""
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
    preset: str | None = None
    """Which known API it is; by default the one of its name, else that of ``base_url``'s host, else ``other``."""
    base_url: str | None = None
    """Root of an OpenAI-compatible API, for example ``https://api.openai.com/v1``; a preset knows its own."""
    api_key: SecretStr | None = None
    """Bearer key; by default what the preset's variable holds, for the preset's own host only. None sends none."""
    models: list[str] = ["*"]
    """Names served by this provider; ``*`` stands for any name no one else serves."""
    connect_timeout_s: Annotated[float, Field(gt=0)] = 10.0
    """Seconds to reach the API."""
    concurrency: Annotated[int, Field(ge=1)] | None = None
    """Requests at once to each of its models, over all replicas; more wait in their lane. None: no limit."""
    rpm: Annotated[int, Field(ge=1)] | None = None
    """Requests a minute to each of its models, over all replicas; by default what ``LLM_RPM`` says."""
    tpm: Annotated[int, Field(ge=1)] | None = None
    """Tokens a minute of each of its models, prompts and answers, over all replicas; by default what ``LLM_TPM``
    says."""
    continue_by: ContinueBy | None = None
    """How a cut answer goes on; ``none``: it starts over. This and what follows is as the preset says by default."""
    continue_path: str | None = None
    """Path on the same host under which continuations are asked for; empty: that of ``base_url``."""
    tools: bool | None = None
    """Whether it can call tools; requests for what an API cannot do get 400."""
    json_schema: bool | None = None
    """Whether it can hold answers to a JSON schema."""
    logprobs: bool | None = None
    """Whether it tells log probabilities."""
    choices: bool | None = None
    """Whether it gives more than one choice (``n``)."""
    embeddings: bool | None = None
    """Whether it makes embeddings."""
    stream_usage: StreamUsage | None = None
    """When its streams tell their tokens: if ``asked`` by ``stream_options``, ``always`` without, or ``never``."""
    max_parallel: Annotated[int, Field(ge=1)] | None = None
    """Requests at once from one replica; more wait."""
    rename: list[Annotated[str, Field(pattern=r"^\w+=\w+$")]] | None = None
    """Members of a chat request that the API calls otherwise, for example ``seed=random_seed``."""

    def known(self, name: str) -> Preset:
        """What is known about the API of the provider ``name``."""
        return preset_of(name, self.preset, self.base_url)

    def url(self, name: str) -> str | None:
        """Its base URL; None for one that says neither where it is nor which it is."""
        return self.base_url or self.known(name).base_url

    def capabilities(self, name: str) -> Capabilities:
        """What it can do: as known, changed by what is set here."""
        fields = Capabilities.__struct_fields__
        said = {field: value for field in fields if (value := getattr(self, field)) is not None}
        if "rename" in said:
            said["rename"] = tuple(said["rename"])
        return replace(self.known(name).can, **said)

    @field_validator("preset")
    @classmethod
    def _known(cls, preset: str | None) -> str | None:
        if preset is not None and preset not in PRESETS:
            raise ValueError(f"one of {', '.join(PRESETS)}")
        return preset

    @field_validator("base_url")
    @classmethod
    def _http_url(cls, url: str | None) -> str | None:
        parts = split_url(url) if url is not None else None
        if url is not None and (not parts or parts.scheme not in ("http", "https") or not parts.hostname):
            raise ValueError("an http:// or https:// URL with a host, for example https://api.openai.com/v1")
        return url

    _lists = field_validator("models", "rename", mode="before")(comma_separated)


class PriceSettings(Section):
    input: Annotated[float, Field(ge=0)]
    """Price of a million tokens of prompt, in any currency."""
    output: Annotated[float, Field(ge=0)]
    """Price of a million tokens of answer."""
    cached: Annotated[float, Field(ge=0)] | None = None
    """Price of a million tokens of prompt that the API had in its cache; None: like others."""


class BreakerSettings(Section):
    failures: Annotated[int, Field(ge=1)] = 5
    """So many failures of a remote target within ``window_s``, over all replicas, open its breaker, if they are
    at least half of all outcomes: it is left alone for a while, then tried once."""
    window_s: Annotated[float, Field(gt=0)] = 30.0
    """Seconds in which failures count together."""
    open_s: Annotated[float, Field(gt=0)] = 5.0
    """Seconds that it is left alone at first; each time in a row it is for twice as long."""
    max_open_s: Annotated[float, Field(gt=0)] = 120.0
    """Longest time that it is left alone."""
    wait_s: Annotated[float, Field(ge=0)] | None = 3.0
    """Seconds that a request whose client waits for the answer waits at most where all its targets are left alone;
    after that, or at once where it would take longer, it gets 503 with ``Retry-After``. None: as long as it may take,
    as jobs of ``/chat/async`` do."""


class TargetSettings(Section):
    provider: str
    """A provider, or a local model, by its name here."""
    model: str | None = None
    """What the provider calls the model; None: as the client does."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Share of the requests with strategy ``weighted``."""
    concurrency: Annotated[int, Field(ge=1)] | None = None
    """Requests at once, over all replicas; None: what the provider's settings say. So are the next two."""
    rpm: Annotated[int, Field(ge=1)] | None = None
    """Requests a minute."""
    tpm: Annotated[int, Field(ge=1)] | None = None
    """Tokens a minute, of prompts and answers."""
    price: Annotated[float, Field(ge=0)] | None = None
    """What counts for strategy ``cheapest``, in any unit that all targets share; those without one come last."""


class RouteSettings(Section):
    targets: Annotated[list[TargetSettings], Field(min_length=1)]
    """Who can answer, the preferred one first: ``[{provider: …, model: …, weight: …, price: …}, …]``."""
    strategy: Strategy = "ordered"
    """Who is asked first; the others follow when that one fails."""
    hedge_s: Annotated[float, Field(gt=0)] | None = None
    """Seconds without a first token after which a second target is asked as well: whose token comes first answers,
    the other one is stopped, and paid for. None: never."""

    @field_validator("targets", mode="before")
    @classmethod
    def _yaml(cls, targets: Any) -> Any:
        """A variable or a flag holds the list as YAML."""
        if not isinstance(targets, str):
            return targets
        try:
            return yaml.safe_load(targets)
        except yaml.YAMLError as error:
            raise ValueError("a list such as [{provider: openai, model: gpt-4o}, {provider: ollama}]") from error


class LoggingSettings(Section):
    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Least severe messages to write. ``CELERY_LOGLEVEL`` sets it too."""
    format: Literal["console", "json"] = "console"
    """Lines for people, or one JSON object for each message."""
    requests: Literal["json", "always", "never"] = "json"
    """When each HTTP request is a line of level INFO; ``json``: where that is the format."""

    @property
    def request_lines(self) -> bool:
        return self.requests == "always" or (self.requests == "json" and self.format == "json")

    @field_validator("level", mode="before")
    @classmethod
    def _any_case(cls, level: Any) -> Any:
        return level.upper() if isinstance(level, str) else level


class TelemetrySettings(Section):
    otlp_endpoint: str | None = None
    """OpenTelemetry collector that gets traces and GenAI metrics over OTLP/HTTP, for example ``http://localhost:4318``
    (extra ``otel``). The standard ``OTEL_*`` variables say the rest."""
    memory_headers: bool = False
    """Whether responses bear ``X-Memory-Used`` and ``X-Memory-Delta``, in MB."""

    @field_validator("otlp_endpoint")
    @classmethod
    def _http_url(cls, url: str | None) -> str | None:
        parts = split_url(url) if url is not None else None
        if url is not None and not (parts and parts.scheme in ("http", "https") and parts.hostname):
            raise ValueError("an http:// or https:// URL with a host, for example http://localhost:4318")
        if parts is not None and parts.username is not None:
            raise ValueError("a URL without user and password; OTEL_EXPORTER_OTLP_HEADERS takes what authenticates")
        return url


class Settings(Section):
    """Everything that can be configured. Build it directly, or with :func:`load` from file, environment and flags."""

    data_dir: Path = Field(
        default_factory=default_data_dir,
        json_schema_extra={"default": "$XDG_DATA_HOME/llmstream, else ~/.local/share/llmstream"},
    )
    """Where weights and the embedded store live."""
    server: ServerSettings = ServerSettings()
    store: StoreSettings = StoreSettings()
    broker: BrokerSettings = BrokerSettings()
    scheduler: SchedulerSettings = SchedulerSettings()
    deadlines: DeadlineSettings = DeadlineSettings()
    retry: RetrySettings = RetrySettings()
    breaker: BreakerSettings = BreakerSettings()
    disconnect: DisconnectSettings = DisconnectSettings()
    security: SecuritySettings = SecuritySettings()
    rate_limit: RateLimitSettings = RateLimitSettings()
    webhooks: WebhookSettings = WebhookSettings()
    webhook_receivers: dict[str, ReceiverSettings] = {}
    """Who hears of the end of jobs whose requests name no URL, by name."""
    keys: dict[str, KeySettings] = {}
    """API keys by the name of the principal that shows them."""
    models: dict[str, ModelSettings] = {}
    """Local models by the name clients ask for. With neither models nor providers, ``smollm2`` is served."""
    providers: dict[str, ProviderSettings] = {}
    """Remote APIs by name."""
    prices: dict[str, PriceSettings] = {}
    """What tokens cost, by ``PROVIDER/MODEL``, ``MODEL`` or ``PROVIDER/*``."""
    routes: dict[str, RouteSettings] = {}
    """Names that lead to several targets; ``*`` and ``?`` in a name stand for any characters, for any one."""
    model: ModelDefaults = ModelDefaults()
    question: QuestionSettings = QuestionSettings()
    cache: CacheSettings = CacheSettings()
    chat_history: ChatHistorySettings = ChatHistorySettings()
    filters: dict[str, FilterSettings] = {}
    """What is kept from models and readers, by name."""
    presidio: PresidioSettings = PresidioSettings()
    logging: LoggingSettings = LoggingSettings()
    telemetry: TelemetrySettings = TelemetrySettings()

    @property
    def authenticated(self) -> bool:
        """Whether callers must show an API key; without one only programs on this machine may reach the server."""
        return bool(self.keys) or self.security.api_key is not None or self.security.keys_required

    @property
    def announces(self) -> bool:
        """Whether this server tells anybody of the end of jobs."""
        keys = self.keys.values()
        named = self.webhooks.secret is not None or any(key.webhook_secret is not None for key in keys)
        return named or bool(self.webhook_receivers)

    @field_validator("data_dir")
    @classmethod
    def _at_home(cls, path: Path) -> Path:
        try:
            return path.expanduser()
        except RuntimeError as error:
            raise ValueError("a path; the home directory in it is not known") from error

    @model_validator(mode="after")
    def _consistent(self) -> Settings:
        if problems := [*_contradictions(self), *_incomplete(self)]:
            raise ValueError("\n".join(problems))
        return self


def load(
    file: Path | None = None, env: Mapping[str, str] | None = None, flags: Mapping[str, Any] | None = None
) -> Settings:
    """Reads the settings: defaults < ``file`` (or what ``LLMSTREAM_CONFIG`` names) < ``env`` < ``flags``.

    ``flags`` has dotted keys such as ``server.port``; None means not given. Raises one ConfigError that lists
    everything that is wrong.
    """
    return build(Settings, file, os.environ if env is None else env, flags or {}, from_known_variables)


def print_config(settings: Settings) -> str:
    """Renders settings as YAML that :func:`load` reads again, secrets masked."""
    # Pure ASCII, because PyYAML does not read back every Unicode line break that it writes.
    return yaml.safe_dump(plain(settings), sort_keys=False)


def describe() -> list[Setting]:
    """Every setting with its key, default, meaning and what is allowed; a name of the user's is ``NAME`` in the key."""
    return list(schema_of(Settings).settings.values())


def _contradictions(settings: Settings) -> Iterator[str]:
    server, lease, total = settings.server, settings.scheduler.lease_s, settings.deadlines.total_s
    if not server.loopback and not settings.authenticated:
        yield (
            f"server.host = {server.host!r}: other machines could use this server without a key; set API_KEYS or keys, "
            "or security.keys_required to use those of 'llmstream keys create', or listen on 127.0.0.1 or ::1"
        )
    # A lease of up to two seconds is never the mistake, however short the jobs are.
    if lease > max(total, 2.0):
        yield (
            f"scheduler.lease_s = {lease:g}: a dead replica's jobs would pass deadlines.total_s = {total:g} before "
            "another may take them over; choose a shorter lease"
        )
    if (kept := settings.store.unfinished_retention_s) < total:
        yield (
            f"store.unfinished_retention_s = {kept:g}: running jobs would be forgotten before "
            f"deadlines.total_s = {total:g}; keep them longer"
        )
    yield from _wrong_routes(settings)
    if settings.broker.kind == "rabbitmq" and settings.broker.result_prefix == settings.store.prefix:
        yield (
            f"broker.result_prefix = {settings.broker.result_prefix!r}: results would get into the way of "
            "store.prefix, which is the same; choose another"
        )
    if "remote" in settings.models:
        yield "models.remote: this name stands for the pool of all remote providers; choose another"
    for name in sorted(settings.models.keys() & settings.providers.keys()):
        yield f"models.{name}, providers.{name}: a local model and a provider share this name; rename one"
    yield from _key_problems(settings)
    yield from filter_problems(settings.filters)
    yield from _limit_problems(settings)
    for name in [*settings.models, *settings.providers]:
        if not NAME_PATTERN.fullmatch(name):
            yield (
                f"models, providers: the name {name[:80]!r} is not allowed; expected up to 128 letters, digits and "
                ". _ : / - that begin with a letter or digit"
            )


def _incomplete(settings: Settings) -> Iterator[str]:
    model = settings.model
    said = [f"model.{field} = {value!r}" for field in ("source", "device") if (value := getattr(model, field))]
    if said and model.name is None:
        yield f"{', '.join(said)}: model.name has to say which weights; or say it all under models"
    elif said and model.served not in settings.models:
        yield f"{', '.join(said)}: there is no local model {model.served!r}; set model.source, or add it under models"
    for name, provider in settings.providers.items():
        if provider.url(name) is None:
            meaning = "Root of an OpenAI-compatible API, for example https://api.openai.com/v1"
            yield f"providers.{name}.base_url is required: {meaning}; or say which API it is with preset"
    for name in settings.prices:
        if not NAME_PATTERN.fullmatch(name.removesuffix("/*")):
            yield f"prices: the name {name[:80]!r} is not allowed; expected PROVIDER/MODEL, MODEL or PROVIDER/*"


def _key_problems(settings: Settings) -> Iterator[str]:
    for name in settings.keys:
        if not KEY_NAME_PATTERN.fullmatch(name):
            yield f"keys: the name {name[:80]!r} is not allowed; expected {KEY_NAME_RULE}"
    for name in settings.webhook_receivers:
        if not KEY_NAME_PATTERN.fullmatch(name) or name == REQUESTED:
            yield (
                f"webhook_receivers: the name {name[:80]!r} is not allowed; expected {KEY_NAME_RULE}, other than "
                f"{REQUESTED!r}"
            )
    shown = [key.value.get_secret_value() for key in settings.keys.values()] + settings.security.api_keys
    if len(set(shown)) < len(shown):
        yield "keys, security.api_key: the same API key is here twice; each principal needs one of its own"


def _limit_problems(settings: Settings) -> Iterator[str]:
    """Jobs are counted in the lanes of the store: nobody can count those that do not wait there."""
    broker, memory = settings.broker, settings.store.durability == "memory"
    sections: dict[str, RateLimitSettings | KeySettings] = {"rate_limit": settings.rate_limit}
    sections |= {f"keys.{name}": key for name, key in settings.keys.items()}
    for name, section in sections.items() if settings.rate_limit.enabled else ():
        limits = limits_in(section)
        if (limits.concurrent_jobs or limits.queued_jobs) and memory:
            yield (
                f"{name}: concurrent_jobs and queued_jobs need jobs on record, and store.durability = 'memory' keeps "
                "none; leave one of them out"
            )
        if limits.queued_jobs and broker.kind == "rabbitmq" and broker.consume:
            yield (
                f"{name}.queued_jobs: with broker.kind = 'rabbitmq' jobs wait in RabbitMQ, where they are not counted "
                "by caller; leave it out"
            )


def _wrong_routes(settings: Settings) -> Iterator[str]:
    for name in settings.models:
        if name.startswith("remote:"):
            yield f"models.{name}: names that begin with 'remote:' stand for pools of remote providers; choose another"
    for name, route in settings.routes.items():
        if not ROUTE_PATTERN.fullmatch(name):
            yield (
                f"routes: the name {name[:80]!r} is not allowed; expected up to 128 letters, digits and . _ : / @ - "
                "that begin with a letter or digit, and * or ? for any characters"
            )
        for number, target in enumerate(route.targets):
            if target.provider not in settings.providers and target.provider not in settings.models:
                known = ", ".join(sorted([*settings.providers, *settings.models])) or "none"
                yield f"routes.{name}.targets[{number}]: there is no provider {target.provider!r}; known: {known}"
            elif target.provider in settings.models and (target.concurrency or target.rpm or target.tpm):
                yield (
                    f"routes.{name}.targets[{number}]: concurrency, rpm and tpm are for remote providers; a local "
                    f"model has models.{target.provider}.slots"
                )


def store_urls(url: str) -> list[str]:
    """One URL for each host of a store's URL, which may name several nodes of a cluster."""
    found = re.fullmatch(r"(\w+://(?:[^/?#]*@)?)([^/?#]*)(.*)", url, re.DOTALL)
    if found is None:
        return [url]
    start, hosts, end = found.groups()
    return [f"{start}{host}{end}" for host in hosts.split(",")]


def _is_redis_url(url: str) -> bool:
    parts = split_url(url)
    if not parts:
        return False
    if parts.scheme == "unix":
        return parts.path.startswith("/")
    # A password with an unescaped / # or ? moves into these parts, from where it could end up in a message.
    whole = not parts.fragment and re.fullmatch(r"/?\d*", parts.path) and "@" not in parts.query
    return parts.scheme in ("redis", "rediss") and bool(parts.hostname) and bool(whole)
