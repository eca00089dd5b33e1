from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import SecretStr, ValidationError

from llmstream.broker.rabbitmq import url_of
from llmstream.config import (
    DeadlineSettings,
    LoggingSettings,
    ModelSettings,
    ProviderSettings,
    SchedulerSettings,
    ServerSettings,
    Settings,
    StoreSettings,
    describe,
    load,
    print_config,
    store_urls,
)
from llmstream.errors import ConfigError
from llmstream.types import CallerLimits


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return tmp_path / "llmstream.yaml"


def refusal(file: Path | None = None, env: Mapping[str, str] | None = None, /, **flags: Any) -> str:
    with pytest.raises(ConfigError) as refused:
        load(file, env or {}, {name.replace("__", "."): value for name, value in flags.items()})
    return str(refused.value)


def test_defaults_need_nothing() -> None:
    """Without any source the settings are the defaults, listening on loopback only."""
    settings = load(env={})
    assert settings == Settings()
    assert settings.server.host == "127.0.0.1"


def test_each_layer_overrides_the_one_below(config: Path) -> None:
    """Flags win over the environment, the environment over the file, the file over the defaults."""
    config.write_text("server: {port: 1, ping_s: 1, max_body_bytes: 2000}\n")
    env = {"SERVER__PORT": "2", "SERVER__PING_S": "2"}
    server = load(config, env, {"server.port": 3, "server.host": None}).server
    assert (server.port, server.ping_s, server.max_body_bytes, server.host) == (3, 2.0, 2000, "127.0.0.1")


def test_a_wrong_value_does_not_matter_when_a_higher_layer_replaces_it(config: Path) -> None:
    """Only the winning value of a setting is checked."""
    config.write_text("server: {port: nonsense}\n")
    assert load(config, {"PORT": "80"}).server.port == 80


def test_the_environment_names_the_file(config: Path) -> None:
    """LLMSTREAM_CONFIG is read when no file is given, and a given file wins over it."""
    config.write_text("server: {port: 7}\n")
    assert load(env={"LLMSTREAM_CONFIG": str(config)}).server.port == 7
    other = config.with_name("other.yaml")
    other.write_text("")
    assert load(other, {"LLMSTREAM_CONFIG": str(config)}).server.port == 8000


@pytest.mark.parametrize(
    ("env", "port"),
    [
        ({"PORT": "1"}, 1),
        ({"PORT": "1", "SERVER__PORT": "2"}, 2),
        ({"PORT": "1", "SERVER__PORT": "2", "LLMSTREAM_SERVER__PORT": "3"}, 3),
        ({"PORT": "1", "LLMSTREAM_PORT": "4"}, 4),
        ({"SERVER__PORT": ""}, 8000),
    ],
)
def test_the_more_specific_variable_wins(env: dict[str, str], port: int) -> None:
    """The longer spelling of a setting wins over the shorter one; an empty variable counts as absent."""
    assert load(env=env).server.port == port


@pytest.mark.parametrize(
    ("variable", "value", "key", "meant"),
    [
        ("PORT", "8007", "server.port", 8007),
        ("UVICORN_WORKERS", "4", "server.workers", 4),
        ("CELERY_CONCURRENCY", "4", "scheduler.remote_slots", 4),
        ("CELERY_LOGLEVEL", "info", "logging.level", "INFO"),
        ("LLM_SYSTEM_PROMPT", "Be polite.", "question.system_prompt", "Be polite."),
        ("LLM_TEMPERATURE", "0.7", "question.temperature", 0.7),
        ("LLM_MAX_TOKENS", "1000", "question.max_tokens", 1000),
        ("REQUEST_TIMEOUT", "30.0", "question.timeout_s", 30.0),
        ("BROKER", "redis", "broker.kind", "redis"),
        ("BROKER", "rabbitmq", "broker.kind", "rabbitmq"),
        ("APP__HOST", "::1", "server.host", "::1"),
        ("APP__PORT", "8001", "server.port", 8001),
        ("MODEL__NAME", "google/gemma-2-2b-it", "model.name", "google/gemma-2-2b-it"),
        ("MODEL__MAX_TOKENS", "256", "model.max_tokens", 256),
        ("CACHE__ENABLED", "true", "cache.enabled", True),
        ("CACHE__SIZE", "100", "cache.size", 100),
        ("CACHE__TTL_SECONDS", "3600", "cache.ttl_seconds", 3600.0),
        ("CHAT_HISTORY__TTL_SECONDS", "7200", "chat_history.ttl_seconds", 7200.0),
    ],
)
def test_variables_of_older_systems(variable: str, value: str, key: str, meant: object) -> None:
    """What older systems were configured with configures the same here, under the same name."""
    section, name = key.split(".")
    assert getattr(getattr(load(env={variable: value}), section), name) == meant


THE_PAGES_FILE = """\
app:
  name: "LLM FastAPI Service"
  host: "0.0.0.0"
  port: 8000

model:
  name: "google/gemma-2-2b-it"
  source: "hub"  # or "local"
  device: "cpu"   # or "cuda"
  max_tokens: 512
  temperature: 0.7

security:
  api_key: "change-me-in-env"
  max_prompt_chars: 4000

cache:
  enabled: true
  size: 100
  ttl_seconds: 3600

chat_history:
  enabled: true
  ttl_seconds: 7200  # 2 hours
"""


def test_the_file_of_a_service_around_one_model(config: Path) -> None:
    """The page's file means here what it meant there; its variables go first."""
    config.write_text(THE_PAGES_FILE)
    settings = load(config, {"MODEL__MAX_TOKENS": "256", "SECURITY__API_KEY": "another-key-0123456789"})
    server, model = settings.server, settings.model
    assert (server.name, server.host, server.port) == ("LLM FastAPI Service", "0.0.0.0", 8000)
    assert settings.models == {"google/gemma-2-2b-it": ModelSettings(source="google/gemma-2-2b-it", gpu_layers=0)}
    assert not settings.providers
    assert (model.served, model.max_tokens, model.temperature) == ("google/gemma-2-2b-it", 256, 0.7)
    assert settings.security.api_keys == ["another-key-0123456789"]
    assert settings.security.max_prompt_chars == 4000
    assert (settings.cache.enabled, settings.cache.size, settings.cache.ttl_seconds) == (True, 100, 3600)
    assert (settings.chat_history.enabled, settings.chat_history.ttl_seconds) == (True, 7200)
    config.write_text(print_config(settings).replace("********", "another-key-0123456789"))
    assert load(config, {}) == settings


def test_the_variables_of_a_service_around_one_model(config: Path) -> None:
    """``MODEL__SOURCE`` and ``MODEL__DEVICE`` make a model of a repository or a file; what is said of it goes first."""
    local = {"MODEL__NAME": "/models/gemma-2b.gguf", "MODEL__SOURCE": "local"}
    for device, layers in (("cpu", 0), ("cuda", 10_000)):
        settings = load(env={**local, "MODEL__DEVICE": device})
        assert settings.models == {"gemma-2b": ModelSettings(source="/models/gemma-2b.gguf", gpu_layers=layers)}
        assert settings.model.served == "gemma-2b"
    assert load(env=local).models["gemma-2b"].gpu_layers is None
    config.write_text("models: {gemma-2b: {slots: 2, gpu_layers: 7}}\n")
    said = load(config, {**local, "MODEL__DEVICE": "cpu"}).models["gemma-2b"]
    assert (said.source, said.slots, said.gpu_layers) == ("/models/gemma-2b.gguf", 2, 7)
    assert load(env={"APP__NAME": "ours"}).server.name == "ours"


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"MODEL__SOURCE": "hub"}, "model.name has to say which weights"),
        ({"MODEL__SOURCE": "disk", "MODEL__NAME": "x"}, "one of hub, local"),
        ({"MODEL__DEVICE": "cpu", "MODEL__NAME": "x"}, "there is no local model 'x'"),
        ({"MODEL__DEVICE": "tpu", "MODEL__NAME": "x", "MODEL__SOURCE": "hub"}, "one of cpu, cuda"),
    ],
)
def test_models_that_make_no_sense(env: dict[str, str], message: str) -> None:
    """What is missing or wrong is named."""
    assert message in refusal(None, env)


def test_a_section_has_one_name_in_a_file(config: Path) -> None:
    """``app`` and ``server`` are the same section, and what is wrong in it is named."""
    config.write_text("app: {port: 1}\nserver: {port: 2}\n")
    assert "'server' is here twice; 'app', which is the same, was set on line 1 before" in refusal(config)
    config.write_text("app: {prot: 1}\n")
    assert "server.prot: unknown setting; did you mean 'port'" in refusal(config)


def test_the_section_rate_limit(config: Path) -> None:
    """The section and its variables mean what they meant to an older system; nothing is limited without them."""
    assert load(env={}).rate_limit.defaults == CallerLimits()
    config.write_text("rate_limit: {enabled: true, requests_per_minute: 10}\n")
    assert load(config, {}).rate_limit.defaults == CallerLimits(requests_per_minute=10)
    found = load(config, {"RATE_LIMIT__REQUESTS_PER_MINUTE": "50", "RATE_LIMIT__BURST_SIZE": "100"}).rate_limit
    assert found.defaults == CallerLimits(requests_per_minute=50, burst_size=100)
    assert load(env={"RATE_LIMIT__TRUSTED_PROXIES": "10.0.0.0/8, ::1"}).rate_limit.trusted_proxies == [
        "10.0.0.0/8",
        "::1",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rate_limit: {requests_per_minute: -1}", "rate_limit.requests_per_minute = -1"),
        ("rate_limit: {trusted_proxies: [10.0.0.1/8]}", "10.0.0.1/8 has host bits set"),
        (
            "{rate_limit: {concurrent_jobs: 1}, store: {durability: memory}}",
            "rate_limit: concurrent_jobs and queued_jobs",
        ),
        (
            "{keys: {a: {value: 0123456789abcdef, queued_jobs: 1}}, broker: {kind: rabbitmq}}",
            "keys.a.queued_jobs: with broker.kind = 'rabbitmq'",
        ),
    ],
)
def test_limits_that_cannot_hold_are_refused(config: Path, text: str, message: str) -> None:
    """A limit that is none, or that nobody could count, is a mistake in the configuration."""
    config.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(message)):
        load(config, {})


def test_whose_limits_go_first() -> None:
    """A key's own limits go before those of all, 0 takes one off, and a burst alone is no limit."""
    all_ = CallerLimits(requests_per_minute=10, burst_size=20, tokens_per_minute=30)
    own = CallerLimits(requests_per_minute=5, tokens_per_minute=0, queued_jobs=7)
    assert own.over(all_) == CallerLimits(requests_per_minute=5, burst_size=20, queued_jobs=7)
    assert CallerLimits(requests_per_minute=0).over(CallerLimits(requests_per_minute=10, burst_size=20)) is None


def test_variables_reach_named_sections(config: Path) -> None:
    """A variable makes a model or provider, or changes the one of the file whose name it spells."""
    config.write_text("models: {Qwen2.5-0.5B: {slots: 2}, tiny: }\n")
    env = {
        "MODELS__QWEN2_5_0_5B__CONTEXT": "512",
        "MODELS__TINY__ENGINE": "echo",
        "MODELS__NEW__TOKENS": "5",
        "PROVIDERS__OPENAI__BASE_URL": "https://api.openai.com/v1",
        "PROVIDERS__OPENAI__MODELS": "gpt-a, gpt-b",
        "REDIS_URL": "redis://localhost/1",
        "DATA_DIR": "/data",
    }
    settings = load(config, env)
    assert settings.models == {
        "Qwen2.5-0.5B": ModelSettings(slots=2, context=512),
        "tiny": ModelSettings(engine="echo"),
        "new": ModelSettings(tokens=5),
    }
    assert settings.providers["openai"].models == ["gpt-a", "gpt-b"]
    assert settings.store.url == SecretStr("redis://localhost/1")
    assert settings.data_dir == Path("/data")


def test_variables_of_a_queue_in_front_of_a_core() -> None:
    """The names such systems use reach the broker and the store; a URL goes before its parts."""
    env = {
        "BROKER": "rabbitmq",
        "RABBIT_MQ_HOST": "mq",
        "RABBIT_MQ_PORT": "5673",
        "RABBIT_MQ_LOGIN": "admin",
        "RABBIT_MQ_PASSWORD": "p@ss",
        "QUEUE_NAME": "llm-api-queue",
        "REDIS_HOST": "cache",
        "REDIS_PORT": "6380",
        "REDIS_PREFIX": "mine",
    }
    settings = load(env=env)
    assert url_of(settings.broker) == "amqp://admin:p%40ss@mq:5673/"
    assert (settings.broker.kind, settings.broker.queue, settings.broker.result_prefix) == (
        "rabbitmq",
        "llm-api-queue",
        "mine",
    )
    assert settings.store.url == SecretStr("redis://cache:6380/0")
    assert load(env={**env, "REDIS_URL": "redis://other:1/2"}).store.url == SecretStr("redis://other:1/2")
    assert url_of(load(env={**env, "RABBITMQ_URL": "amqps://a:b@c/v"}).broker) == "amqps://a:b@c/v"
    shown = print_config(load(env={**env, "RABBITMQ_URL": "amqps://a:hidden@c/v"}))
    assert "p@ss" not in shown
    assert "hidden" not in shown
    assert load(env={"REDIS_PORT": "tcp://10.0.0.1:6379", "RABBIT_MQ_PORT": "tcp://10.0.0.1:5672"}) == Settings()


def test_variables_of_an_api_in_front_of_a_core(config: Path) -> None:
    """``INNER_LLM_URL`` leads to the core, over RabbitMQ where a queue is named; what is said otherwise goes first."""
    core = load(env={"INNER_LLM_URL": "localhost:8670"})
    assert (core.broker.kind, core.broker.consume) == ("redis", False)
    assert {name: each.base_url for name, each in core.providers.items()} == {"core": "http://localhost:8670/v1"}
    assert not core.models
    secure = load(env={"INNER_LLM_URL": "https://core.example.com/api/v2/"})
    assert secure.providers["core"].base_url == "https://core.example.com/api/v2"
    queue = load(env={"INNER_LLM_URL": "localhost:8670", "QUEUE_NAME": "llm-api-queue"})
    assert (queue.broker.kind, queue.broker.consume) == ("rabbitmq", False)
    config.write_text("broker: {kind: redis, consume: true, queue: q}\nproviders: {core: {base_url: http://x/v1}}\n")
    own = load(config, {"INNER_LLM_URL": "localhost:8670"})
    assert (own.broker.kind, own.broker.consume, own.providers["core"].base_url) == ("redis", True, "http://x/v1")


@pytest.mark.parametrize("url", ["http://localhost", "amqp://", "localhost:5672"])
def test_other_brokers_are_refused(url: str) -> None:
    """What is no AMQP URL is refused without showing it, and so is a prefix that would mix results with our keys."""
    with pytest.raises(ConfigError, match="amqp://") as caught:
        load(env={"RABBITMQ_URL": f"{url}?password=hidden"})
    assert "hidden" not in str(caught.value)
    with pytest.raises(ConfigError, match="result_prefix"):
        load(env={"BROKER": "rabbitmq", "REDIS_PREFIX": "llmstream"})


def test_flags_reach_names_with_dots() -> None:
    """A dotted flag finds the model's name between section and key."""
    assert load(env={}, flags={"models.qwen2.5.slots": 3}).models == {"qwen2.5": ModelSettings(slots=3)}


def test_unrelated_variables_are_ignored() -> None:
    """What other programs and Kubernetes put into the environment does no harm."""
    env = {
        "PATH": "/bin",
        "Logging__LogLevel__Default": "Information",
        "SEVER__PORT": "1",
        "LLMSTREAM_PORT": "tcp://10.0.0.1:8000",
        "LLMSTREAM_PORT_8000_TCP_ADDR": "10.0.0.1",
        "LLMSTREAM_SERVICE_HOST": "10.0.0.1",
    }
    assert load(env=env) == Settings()


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"SERVER__PROT": "1"}, "SERVER__PROT: server.prot: unknown setting; did you mean 'port'? known: host, port"),
        ({"MODELS__TINY__SLOTZ": "1"}, "models.tiny.slotz: unknown setting; did you mean 'slots'?"),
        ({"MODELS__TINY": "1"}, "MODELS__TINY: models.tiny: set one of source, engine"),
        ({"SERVER__PORT__X": "1"}, "server.port holds a value, nothing is below it"),
        ({"LLMSTREAM_SEVER__PORT": "1"}, "LLMSTREAM_SEVER__PORT: unknown variable; did you mean LLMSTREAM_SERVER__"),
        ({"LLMSTREAM_DATADIR": "x"}, "did you mean LLMSTREAM_DATA_DIR?"),
        ({"SERVER__PORT": "70000"}, "server.port = '70000' (environment variable SERVER__PORT): expected an integer"),
        ({"STORE__SYNC": "never"}, "store.sync = 'never' (environment variable STORE__SYNC): expected one of everysec"),
        ({"SERVER__PING_S": "nan"}, "expected a number above 0"),
        ({"DEADLINES__TOTAL_S": "inf"}, "expected a number above 0"),
        ({"STORE__PREFIX": "a:b"}, "expected text that matches"),
        ({"LLMSTREAM_CONFIG": "/nowhere.yaml"}, "/nowhere.yaml: the configuration file cannot be read: No such file"),
    ],
)
def test_variables_are_checked(env: dict[str, str], message: str) -> None:
    """A wrong variable's error names it, the value, and what is allowed or was meant."""
    assert message in refusal(None, env)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("server:\n  prot: 1\n", ":2: server.prot: unknown setting; did you mean 'port'?"),
        ("sever: {}\n", ":1: sever: unknown setting; did you mean 'server'?"),
        ("models:\n  a:\n    slot: 1\n", ":3: models.a.slot: unknown setting; did you mean 'slots'?"),
        ("server:\n  port: 1\n  port: 2\n", ":3: 'port' is here twice; it was set on line 2 before"),
        ("models:\n  a:\n  b:\n  a:\n", ":4: 'a' is here twice"),
        ("server: 5\n", ":1: server must be a mapping with keys such as host, port"),
        ("- a\n", ":1: the file must be a mapping with keys such as data_dir, server"),
        ("server: {port: [\n", ":2: not valid YAML:"),
        ("server:\n  port: eighty\n", "server.port = 'eighty' ({file}:2): expected an integer from 0 to 65535"),
        ("server:\n  port: yes\n", "server.port = True ({file}:2): expected an integer"),
        ("server:\n  port:\n", "server.port = null ({file}:2): expected an integer"),
        ("server:\n  host: !!python/name:os.system\n", ":2: not valid YAML: could not determine a constructor"),
        ("providers: {a: {}}\n", "providers.a.base_url is required: Root of an OpenAI-compatible API"),
        ("providers:\n  a: {base_url: ftp://x}\n", "providers.a.base_url = 'ftp://x' ({file}:2): expected an http://"),
        (
            "providers:\n  a: {base_url: 'http://h', models: [1]}\n",
            "providers.a.models = [1] ({file}:2): expected a list",
        ),
        ("data_dir: ~nobody-here/x\n", "data_dir = '~nobody-here/x' ({file}:1): expected a path; the home directory"),
    ],
)
def test_the_file_is_checked(config: Path, text: str, message: str) -> None:
    """An error in the file names file and line, the key, the value, and what is allowed or was meant."""
    config.write_text(text)
    assert message.replace("{file}", str(config)) in refusal(config)


def test_a_file_that_is_no_text_is_refused(config: Path) -> None:
    """Bytes that are no text give an error that names the file."""
    config.write_bytes(b"server: \xff\xfe\n")
    assert f"{config}: not valid YAML" in refusal(config)


def test_flags_are_checked() -> None:
    """A wrong flag's error says that it came from the command line."""
    assert "server.port = -1 (command line): expected an integer" in refusal(server__port=-1)
    assert "command line: server.pot: unknown setting; did you mean 'port'?" in refusal(server__pot=1)


def test_the_remote_pool_is_no_model() -> None:
    """A local model cannot take the name under which remote jobs wait."""
    assert "models.remote: this name stands for the pool" in refusal(None, {"MODELS__REMOTE__ENGINE": "echo"})


def test_all_errors_come_at_once(config: Path) -> None:
    """One ConfigError lists what is wrong in every source."""
    config.write_text("sever: {}\nstore: {timeout_s: 0}\n")
    lines = refusal(config, {"SERVER__PORT": "x", "LOGGING__LEVLE": "INFO"}, server__ping_s=0).splitlines()
    assert len(lines) == 1 + 5


def test_yaml_aliases_and_merges_work(config: Path) -> None:
    """A merged mapping is a default that the mapping's own keys override."""
    config.write_text("models:\n  a: &a {slots: 2, context: 64}\n  b: {<<: *a, slots: 3}\n")
    assert load(config, {}).models["b"] == ModelSettings(slots=3, context=64)


def test_log_levels_in_any_case() -> None:
    """The level can be written in lower case."""
    assert load(env={"LOGGING__LEVEL": "debug"}).logging.level == "DEBUG"


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.2", "", "::", "example.com"])
def test_other_machines_are_refused_without_keys(host: str) -> None:
    """Only loopback addresses can be listened on, also when the settings are built directly."""
    if host:
        assert f"server.host = {host!r}: other machines could use this server without a key" in refusal(
            server__host=host
        )
    with pytest.raises(ValidationError, match="without a key"):
        Settings(server=ServerSettings(host=host))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_is_allowed(host: str) -> None:
    """Every spelling of this machine itself is accepted."""
    assert load(env={"SERVER__HOST": host}).server.host == host


def test_contradictions_are_refused() -> None:
    """Settings that cannot work together are named, all of them."""
    env = {
        "SCHEDULER__LEASE_S": "400",
        "STORE__UNFINISHED_RETENTION_S": "10",
        "MODELS__X__ENGINE": "echo",
        "PROVIDERS__X__BASE_URL": "http://h",
    }
    message = refusal(None, env, **{"models__{a}__engine": "echo"})
    assert "scheduler.lease_s = 400: a dead replica's jobs would pass deadlines.total_s = 300" in message
    assert "store.unfinished_retention_s = 10: running jobs would be forgotten" in message
    assert "models.x, providers.x: a local model and a provider share this name" in message
    assert "the name '{a}' is not allowed" in message


@pytest.mark.parametrize(
    "url",
    [
        "http://host",
        "host:6379",
        "redis://",
        "redis://u:p/secret@host",
        "redis://u:p#secret@host",
        "redis://h:secret",
        "redis://h:1,h:secret",
        "redis://h:1,,h:2",
        "unix://x",
    ],
)
def test_store_urls_are_checked_without_showing_them(url: str) -> None:
    """A URL the client could not use is refused; the message shows what is expected, not what was given."""
    message = refusal(None, {"REDIS_URL": url})
    assert "store.url = ******** (environment variable REDIS_URL): expected redis://, rediss:// or unix://" in message
    assert "secret" not in message


def test_a_store_url_may_name_several_hosts() -> None:
    """Each host makes a URL of its own with the same user, password and options; printing hides the password."""
    url = "rediss://u:p%2Cw@h1,[::1]:2/0?ssl_ca_certs=/ca.pem"
    settings = load(None, {"REDIS_URL": url})
    assert settings.store.url == SecretStr(url)
    assert store_urls(url) == [f"rediss://u:p%2Cw@{host}/0?ssl_ca_certs=/ca.pem" for host in ("h1", "[::1]:2")]
    assert store_urls("unix:///a,b") == ["unix:///a,b"]
    assert "p%2Cw" not in print_config(settings)


def test_secrets_can_be_references(config: Path, tmp_path: Path) -> None:
    """env:NAME and file:PATH stand for a secret kept elsewhere; a relative path starts at the configuration file."""
    (tmp_path / "key").write_text("from-file\n")
    config.write_text(
        "store: {url: 'env:URL'}\n"
        "providers:\n"
        "  a: {base_url: 'http://a', api_key: 'file:key'}\n"
        "  b: {base_url: 'http://b', api_key: 'plain'}\n"
    )
    settings = load(config, {"URL": "redis://h", "PROVIDERS__B__API_KEY": f"file:{tmp_path / 'key'}"})
    assert settings.store.url == SecretStr("redis://h")
    assert [provider.api_key for provider in settings.providers.values()] == [SecretStr("from-file")] * 2


def test_broken_references_are_errors(tmp_path: Path) -> None:
    """A reference to nothing names the setting and what it refers to."""
    (tmp_path / "empty").touch()
    env = {
        "STORE__URL": "env:NOT_SET",
        "PROVIDERS__A__BASE_URL": "http://a",
        "PROVIDERS__A__API_KEY": "file:/nowhere",
        "PROVIDERS__B__BASE_URL": "http://b",
        "PROVIDERS__B__API_KEY": f"file:{tmp_path / 'empty'}",
    }
    message = refusal(None, env)
    assert (
        "store.url = env:NOT_SET (environment variable STORE__URL): the environment variable NOT_SET is not" in message
    )
    assert "providers.a.api_key = file:/nowhere" in message
    assert "the file cannot be read: No such file" in message
    assert "the file is empty" in message


def test_no_secret_is_shown(config: Path) -> None:
    """Neither errors nor the printed configuration show a key or password."""
    config.write_text(
        "store: {url: 'rediss://user:hunter2@h:1/0?ssl_password=hunter2&db=1'}\n"
        "providers:\n  a: {base_url: 'https://user:hunter2@h/v1', api_key: hunter2}\n"
    )
    printed = print_config(load(config, {}))
    assert "hunter2" not in printed
    assert "url: rediss://user:********@h:1/0?ssl_password=********&db=1" in printed
    assert "base_url: https://user:********@h/v1" in printed
    config.write_text("providers:\n  a: {base_url: 'ftp://user:hunter2@h/v1', api_kye: hunter2, api_key: [hunter2]}\n")
    assert "hunter2" not in refusal(config)


def test_every_setting_is_described() -> None:
    """Each setting has a key, a default, a meaning and what it allows; defaults are what the models say."""
    rows = {row.key: row for row in describe()}
    assert rows["server.port"][:4] == (
        "server.port",
        "8000",
        "TCP port; 0 picks a free one.",
        "an integer from 0 to 65535",
    )
    assert rows["models.NAME.context"].allowed == "an integer of at least 32 or null"
    assert rows["providers.NAME.tools"].allowed == "true or false or null"
    assert rows["store.url"].secret
    assert all(row.meaning and row.allowed and row.default for row in rows.values())


def test_importing_settings_loads_no_server_and_no_client() -> None:
    """Configuration and logging need neither redis nor aiohttp."""
    code = "import sys, llmstream.config, llmstream.telemetry; print({'redis', 'aiohttp', 'openai'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def positive(least: float = 0.001, most: float = 1e9) -> st.SearchStrategy[float]:
    return st.floats(least, most)


names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,20}", fullmatch=True)
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
models = st.builds(
    ModelSettings,
    source=text,
    engine=st.sampled_from(["llamacpp", "ctransformers", "echo"]),
    slots=st.integers(1, 256),
    context=st.none() | st.integers(32),
    model_type=st.none() | text,
    system_prompt=st.none() | text,
    delay_ms=st.floats(0, 1e6),
)
providers = st.builds(
    ProviderSettings,
    base_url=st.sampled_from(["http://localhost:1/v1", "https://api.openai.com/v1"]),
    models=st.lists(text, max_size=3),
    connect_timeout_s=positive(),
    api_key=st.none(),
    continue_by=st.sampled_from(["none", "assistant_prefill"]),
)


@st.composite
def any_settings(draw: st.DrawFn) -> Settings:
    by_name = draw(st.dictionaries(names, models | providers, max_size=4))
    return Settings(
        data_dir=Path("/") / draw(text),
        server=ServerSettings(port=draw(st.integers(0, 65535)), ping_s=draw(positive())),
        store=StoreSettings(
            url=draw(st.none() | st.just(SecretStr("redis://h:1/2"))), unfinished_retention_s=draw(positive(1e6))
        ),
        scheduler=SchedulerSettings(lease_s=draw(positive(0.2, 2)), max_waiting=draw(st.integers(1))),
        deadlines=DeadlineSettings(total_s=draw(positive(0.001, 1e6))),
        models={name: entry for name, entry in by_name.items() if isinstance(entry, ModelSettings)},
        providers={name: entry for name, entry in by_name.items() if isinstance(entry, ProviderSettings)},
        logging=LoggingSettings(format=draw(st.sampled_from(["console", "json"]))),
    )


@hypothesis.settings(deadline=None)
@given(settings=any_settings())
@example(settings=Settings(models={"a": ModelSettings(system_prompt="~\x85")}))
def test_printed_settings_load_again(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Whatever settings are valid, their printed form loads to the same settings."""
    file = tmp_path_factory.getbasetemp() / "printed.yaml"
    file.write_text(print_config(settings), encoding="utf-8")
    assert load(file, {}) == settings


def test_printed_secrets_load_as_masks(config: Path) -> None:
    """Apart from the secrets a printed configuration with secrets loads to the same settings, too."""
    env = {"REDIS_URL": "redis://u:p@h/0", "PROVIDERS__A__BASE_URL": "http://a", "PROVIDERS__A__API_KEY": "k"}
    printed = print_config(load(env=env))
    config.write_text(printed)
    assert print_config(load(config, {})) == printed


ROUTE_TO_A = "providers: {a: {base_url: http://x/v1}}\nroutes:\n"


def test_routes_come_from_any_source(config: Path) -> None:
    """A list of targets may stand in the file, and as YAML in a variable; it is printed as it is read."""
    config.write_text(ROUTE_TO_A + "  gpt-*: {targets: [{provider: a, model: b, weight: 2}], strategy: weighted}\n")
    settings = load(config, {"ROUTES__FAST__TARGETS": "[{provider: a}]"})
    assert settings.routes["gpt-*"].targets[0].model == "b"
    assert settings.routes["fast"].targets[0].provider == "a"
    config.write_text(print_config(settings))
    assert load(config, {}).routes == settings.routes


@pytest.mark.parametrize(
    ("route", "message"),
    [
        ("x: {targets: [{provider: b}]}", "routes.x.targets[0]: there is no provider 'b'; known: a"),
        ("x: {targets: []}", "a list of objects; it: List should have at least 1 item"),
        ("x: {targets: [{provider: a, modl: b}]}", "a list of objects; 0.modl: Extra inputs are not permitted"),
        ("x: {targets: [{provider: a, weight: 0}]}", "0.weight: Input should be greater than 0"),
        ("x: {targets: a}", "a list of objects; it: Input should be a valid list"),
        ("x: {targets: '[{'}", "expected a list such as [{provider: openai, model: gpt-4o}, {provider: ollama}]"),
        ("x: {targets: [{provider: a}], strategy: best}", "expected one of ordered, weighted"),
        ("'x y': {targets: [{provider: a}]}", "routes: the name 'x y' is not allowed"),
    ],
)
def test_wrong_routes(config: Path, route: str, message: str) -> None:
    """What is wrong with a route is named, with its place."""
    config.write_text(f"{ROUTE_TO_A}  {route}\n")
    assert message in refusal(config)


def test_names_of_pools_are_no_models() -> None:
    """A local model cannot take the name of a pool of remote providers."""
    assert "stand for pools of remote providers" in refusal(None, {"MODELS__REMOTE:X__ENGINE": "echo"})


def test_filters(config: Path) -> None:
    """Filters are known by name, or by a pattern or an entity; variables reach them too."""
    config.write_text(
        "filters:\n  email: {}\n  phone: {action: restore}\n  code: {pattern: 'E-[0-9]{4}', direction: in}\n"
        "  who: {entity: PERSON}\n"
    )
    filters = load(config, {"FILTERS__EMAIL__DIRECTION": "out"}).filters
    assert (filters["email"].action, filters["email"].direction) == ("redact", "out")
    assert (filters["phone"].action, filters["phone"].direction) == ("restore", "both")
    assert (filters["code"].pattern, filters["who"].entity) == ("E-[0-9]{4}", "PERSON")


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        (
            "{code: {pattern: 'E-[0-9]+'}}",
            r"filters.code.pattern = 'E-\[0-9\]\+' .*:1\): .* write how often at most",
        ),
        ("{code: {pattern: '(?=a)b'}}", "filters.code.pattern .* looks ahead or behind"),
        ("{code: {}}", "filters.code.pattern is required: .* only email, phone, card, iban, ip, ssn are known"),
        ("{Code: {pattern: ab}}", "filters: the name 'Code' is not allowed"),
        ("{code: {pattern: ab, entity: PERSON}}", "filters.code: pattern and entity are two ways"),
        ("{code: {pattern: '[A-Z]{4}'}}", r"filters.code.pattern also matches \[CODE\]"),
        ("{email: {}, code: {pattern: '<E[A-Z]{2}'}}", "filters.code.pattern also matches <EMAIL_1>"),
        ("{email: {action: restore, direction: in}}", "filters.email.direction = 'in': restore works in both"),
        ("{email: {action: hide}}", "filters.email.action = 'hide' .* expected one of redact, restore"),
    ],
)
def test_filters_are_checked(config: Path, written: str, reason: str) -> None:
    """What could not be looked for, or would be looked for in vain, is refused before the server starts."""
    config.write_text(f"filters: {written}\n")
    assert re.search(reason, refusal(config)), refusal(config)
