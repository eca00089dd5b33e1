from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import SecretStr

from llmstream import config_variables
from llmstream.config import ProviderSettings, Settings, load, print_config
from llmstream.errors import ConfigError
from llmstream.presets import PRESETS, Capabilities, preset_of, recognised

KEYS = {variable: f"secret-of-{name}" for name, preset in PRESETS.items() for variable in preset.key_variables}


@pytest.fixture(params=[True, False], ids=["with engine", "without engine"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the default local model could run here."""
    monkeypatch.setattr(config_variables, "find_spec", lambda name: object() if request.param else None)
    return bool(request.param)


@pytest.mark.parametrize(
    ("name", "preset", "base_url", "found"),
    [
        ("groq", None, None, "groq"),
        ("mine", "groq", None, "groq"),
        ("openai", "vllm", None, "vllm"),
        ("mine", None, "https://api.groq.com/openai/v1", "groq"),
        ("mine", None, "https://eu.api.openai.com/v1", "openai"),
        ("mine", None, "http://user:word@LOCALHOST:11434/v1", "ollama"),
        ("mine", None, "http://[::1]:1234/v1", "lmstudio"),
        ("mine", None, "http://localhost:8000/v1", "other"),
        ("mine", None, "https://not-api.groq.com.evil.example/v1", "other"),
        ("mine", None, "https://evilapi.openai.com/v1", "other"),
        ("mine", None, "https://[broken/v1", "other"),
        ("openai", None, "https://proxy.example/v1", "openai"),
        ("mine", None, None, "other"),
    ],
)
def test_what_a_provider_is_known_as(name: str, preset: str | None, base_url: str | None, found: str) -> None:
    """The preset goes before the name, the name before the host, and a host counts only as a whole."""
    assert preset_of(name, preset, base_url).name == found


def test_every_entry_is_whole() -> None:
    """Each preset has its own name, is recognised by each of its hosts, and knows where its API is."""
    for name, preset in PRESETS.items():
        assert preset.name == name
        for host in preset.hosts:
            assert recognised(f"http://{host}/v1") is preset
        assert preset.base_url is not None or name == "other"
        Settings(providers={name: ProviderSettings(base_url="http://x/v1" if name == "other" else None)})


def test_capabilities_can_be_overridden(tmp_path: Path) -> None:
    """What a file, a variable or a flag says goes before what the preset says, field by field."""
    file = tmp_path / "llmstream.yaml"
    file.write_text("providers: {mistral: {logprobs: true, rename: [a=b], continue_by: none}}")
    env = {"PROVIDERS__MISTRAL__TOOLS": "false", "PROVIDERS__MISTRAL__RENAME": "c=d,e=f"}
    can = load(file, env, {"providers.mistral.max_parallel": "3"}).providers["mistral"].capabilities("mistral")
    assert can == Capabilities(tools=False, stream_usage="always", max_parallel=3, rename=("c=d", "e=f"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{a: {preset: gorq}}", "providers.a.preset = 'gorq' ({file}:1): expected one of openai, openrouter, ollama"),
        ("{a: {}}", "providers.a.base_url is required: Root of an OpenAI-compatible API, for example"),
        ("{groq: {rename: [ab]}}", "providers.groq.rename = ['ab']"),
        ("{groq: {continue_by: magic}}", "expected one of none, assistant_prefill, prefix"),
        ("{groq: {tools: 5}}", "providers.groq.tools = 5 ({file}:1): expected true or false"),
    ],
)
def test_wrong_entries_are_refused(tmp_path: Path, text: str, message: str) -> None:
    """A wrong preset or capability names what is allowed."""
    file = tmp_path / "llmstream.yaml"
    file.write_text(f"providers: {text}\n")
    with pytest.raises(ConfigError) as refused:
        load(file, {})
    assert message.replace("{file}", str(file)) in str(refused.value)


@pytest.mark.parametrize(
    ("env", "name", "url", "models"),
    [
        (
            {"LLM_BASE_URL": "https://api.mistral.ai/v1", "LLM_MODEL": "mistral-small-latest"},
            "mistral",
            "https://api.mistral.ai/v1",
            ["mistral-small-latest"],
        ),
        ({"LLM_BASE_URL": "http://localhost:11434/v1"}, "ollama", "http://localhost:11434/v1", ["*"]),
        ({"LLM_BASE_URL": "http://gpu:8000/v1", "LLM_MODEL": "a, b"}, "llm", "http://gpu:8000/v1", ["a", "b"]),
        ({"LLM_MODEL": "gpt-4o-mini"}, "openai", "https://api.openai.com/v1", ["gpt-4o-mini"]),
    ],
)
def test_the_variables_of_one_provider(
    engine: bool, env: dict[str, str], name: str, url: str, models: list[str]
) -> None:
    """LLM_BASE_URL, LLM_API_KEY and LLM_MODEL make one provider, named after its API, and no local model."""
    settings = load(env={**env, "LLM_API_KEY": "key"})
    (provider,) = settings.providers.values()
    assert (provider.url(name), provider.models, provider.api_key) == (url, models, SecretStr("key"))
    assert (list(settings.providers), settings.models) == ([name], {})


def test_rates_for_all_providers(tmp_path: Path) -> None:
    """LLM_RPM and LLM_TPM limit what every provider is asked, unless it says something else; bad ones are refused."""
    file = tmp_path / "llmstream.yaml"
    file.write_text("providers:\n  groq: {rpm: 7}\n  ollama:\n")
    rates = {"LLM_RPM": "500", "LLM_TPM": "100000"}
    providers = load(file, {**rates, "PROVIDERS__OLLAMA__TPM": "9"}).providers
    assert {name: (each.rpm, each.tpm) for name, each in providers.items()} == {
        "groq": (7, 100_000),
        "ollama": (500, 9),
    }
    (provider,) = load(env={**rates, "OPENAI_API_KEY": "key", "LLM_MODEL": "m"}).providers.values()
    assert (provider.rpm, provider.tpm) == (500, 100_000)
    assert load(env=rates).providers == {}
    with pytest.raises(ConfigError, match=r"providers\.groq\.tpm = 'many' \(environment variable LLM_TPM\)"):
        load(file, {"LLM_TPM": "many"})


def test_a_longer_spelling_goes_before_the_variables_of_one_provider(tmp_path: Path) -> None:
    """PROVIDERS__… wins over LLM_…, which wins over the file; other providers of the file stay."""
    file = tmp_path / "llmstream.yaml"
    file.write_text("providers:\n  groq: {models: [file], api_key: file-key}\n  ollama:\n")
    env = {
        "LLM_BASE_URL": "https://api.groq.com/openai/v1",
        "LLM_MODEL": "from-llm",
        "LLM_API_KEY": "llm-key",
        "PROVIDERS__GROQ__API_KEY": "own-key",
    }
    providers = load(file, env).providers
    assert (providers["groq"].models, providers["groq"].api_key) == (["from-llm"], SecretStr("own-key"))
    assert "ollama" in providers


def test_a_key_alone_makes_a_provider_beside_the_local_model(engine: bool) -> None:
    """Where nothing is configured a known key variable makes its provider; the default local model stays if it can."""
    settings = load(env={"OPENAI_API_KEY": "k1", "ANTHROPIC_API_KEY": "k2", "LLM_MODEL": ""})
    assert {name: provider.api_key for name, provider in settings.providers.items()} == {
        "openai": SecretStr("k1"),
        "anthropic": SecretStr("k2"),
    }
    assert list(settings.models) == (["smollm2"] if engine else [])
    assert load(env={"OPENAI_API_KEY": "k1", "LLM_MODEL": "gpt-4o-mini"}).models == {}
    assert load(env={"OPENAI_API_KEY": "k1", "MODELS__E__ENGINE": "echo"}).providers == {}


def test_keys_go_only_where_they_belong(tmp_path: Path) -> None:
    """A provider without a key takes that of its API from the environment, for the API's own host only."""
    file = tmp_path / "llmstream.yaml"
    file.write_text(
        "providers:\n"
        "  groq:\n"
        "  fast: {base_url: https://api.groq.com/openai/v1}\n"
        "  openai: {base_url: https://proxy.example/v1}\n"
        "  mistral: {api_key: my-own}\n"
        "  anthropic: {api_key: }\n"
        "  gateway: {preset: gemini, base_url: https://proxy.example/v1}\n"
        "  deepseek: {api_key: 'env:ANOTHER'}\n"
    )
    providers = load(file, {**KEYS, "ANOTHER": "another"}).providers
    assert {name: key.get_secret_value() for name, p in providers.items() if (key := p.api_key)} == {
        "groq": "secret-of-groq",
        "fast": "secret-of-groq",
        "mistral": "my-own",
        "deepseek": "another",
    }


def test_keys_may_be_references(tmp_path: Path) -> None:
    """A variable may name the file that holds the key."""
    (tmp_path / "key").write_text("from-file\n")
    env = {"LLM_BASE_URL": "http://gpu/v1", "LLM_API_KEY": f"file:{tmp_path / 'key'}"}
    assert load(env=env).providers["llm"].api_key == SecretStr("from-file")
    other = load(env={"OPENAI_API_KEY": f"file:{tmp_path / 'key'}", "OPENAI_BASE_URL": "https://proxy.example/v1"})
    assert other.providers["openai"].api_key == SecretStr("from-file")
    assert other.providers["openai"].url("openai") == "https://proxy.example/v1"


def test_keys_from_the_environment_are_not_printed() -> None:
    """The printed configuration names the providers that keys made, and masks the keys."""
    printed = print_config(load(env=KEYS))
    assert all(f"{name}:" in printed for name, preset in PRESETS.items() if preset.key_variables)
    assert "secret-of" not in printed


def test_a_wrong_variable_is_named() -> None:
    """A base URL that is none is refused under the name of its variable, and a key is not shown."""
    with pytest.raises(ConfigError) as refused:
        load(env={"LLM_BASE_URL": "gpu:8000", "LLM_API_KEY": "geheim"})
    assert "providers.llm.base_url = 'gpu:8000' (environment variable LLM_BASE_URL)" in str(refused.value)
    assert "geheim" not in str(refused.value)
