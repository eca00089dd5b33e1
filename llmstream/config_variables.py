"""Variables of the environment that other programs use too, and what they configure here: providers and their keys.

``LLM_BASE_URL``, ``LLM_API_KEY`` and ``LLM_MODEL`` make a provider. So does a key under the name that its API gave it
(such as ``OPENAI_API_KEY``) where nothing else is configured; else it is taken by the provider of that API.
``INNER_LLM_URL`` is the core that this service stands in front of. ``LLM_RPM`` and ``LLM_TPM`` limit what each provider
is asked.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec

from llmstream.config_routes import name_of
from llmstream.config_sources import Found, Values
from llmstream.presets import PRESETS, preset_of, recognised

BASE_URL, API_KEY, MODEL = "LLM_BASE_URL", "LLM_API_KEY", "LLM_MODEL"
RATES = {"rpm": "LLM_RPM", "tpm": "LLM_TPM"}
UNNAMED = "llm"
"""The provider at ``LLM_BASE_URL`` where its host is none that we know."""
CORE_URL, CORE = "INNER_LLM_URL", "core"
"""Where the core listens that this service stands in front of, and its name as a provider."""

LAYERS = {"cpu": 0, "cuda": 10_000}
"""How many layers of a model go to the GPU at most; no model has so many."""


def from_known_variables(values: Values, env: Mapping[str, str]) -> Values:
    """What the environment says about providers, and the section ``model`` about a local one."""
    found = _the_one(env) | _core(values, env) | _local(values)
    if not found and not any(key[0] in ("models", "providers") for key in values):
        found = _ambient(env)
    return found | _keys(values | found, env) | _rates(values | found, env)


def _the_one(env: Mapping[str, str]) -> Values:
    """The provider of ``LLM_…``; without a base URL it is OpenAI's, which is what a key alone stands for."""
    url = env.get(BASE_URL)
    if not url and not env.get(API_KEY):
        return {}
    preset = recognised(url) if url else PRESETS["openai"]
    name = preset.name if preset else UNNAMED
    found: Values = {
        ("providers", name, field): Found(env[variable], f"environment variable {variable}")
        for field, variable in (("base_url", BASE_URL), ("api_key", API_KEY), ("models", MODEL))
        if env.get(variable)
    }
    return found if preset is None else {("providers", name, "preset"): Found(name, "default"), **found}


def _local(values: Values) -> Values:
    """The model of a service around one model."""
    name, source, device = (values.get(("model", field)) for field in ("name", "source", "device"))
    if source is None or source.value not in ("hub", "local") or name is None or not isinstance(name.value, str):
        return {}
    key = ("models", name_of(source.value, name.value) or "")
    found = {(*key, "source"): name}
    if device is not None and device.value in LAYERS:
        found[*key, "gpu_layers"] = device._replace(value=LAYERS[device.value])
    return {key: value for key, value in found.items() if key not in values}


def _core(values: Values, env: Mapping[str, str]) -> Values:
    """Another core, which runs the orders of its queue itself. With a queue's name RabbitMQ leads to it."""
    if not env.get(CORE_URL):
        return {}
    scheme, _, rest = env[CORE_URL].rpartition("://")
    url = f"{scheme or 'http'}://{rest.rstrip('/')}"
    origin = f"environment variable {CORE_URL}"
    found: Values = {
        ("providers", CORE, "base_url"): Found(url if "/" in rest.rstrip("/") else f"{url}/v1", origin),
        ("broker", "consume"): Found(False, origin),
    }
    if ("broker", "queue") in values:
        found["broker", "kind"] = Found("rabbitmq", origin)
    return {key: value for key, value in found.items() if key not in values}


def _ambient(env: Mapping[str, str]) -> Values:
    """A provider for each key that is there, beside the local model of a server without configuration."""
    found: Values = {}
    for preset in PRESETS.values():
        for variable in preset.key_variables:
            if env.get(variable):
                found["providers", preset.name, "preset"] = Found(preset.name, f"environment variable {variable}")
                if env.get(MODEL):
                    found["providers", preset.name, "models"] = Found(env[MODEL], f"environment variable {MODEL}")
    if found and not env.get(MODEL) and find_spec("xllamacpp"):
        found["models", "smollm2", "source"] = Found("smollm2", "default")
    return found


def _keys(values: Values, env: Mapping[str, str]) -> Values:
    """Keys for the providers that name none, each only for the host that it was made for."""
    found: Values = {}
    for name in {key[1] for key in values if key[0] == "providers" and len(key) > 1}:
        url = _text(values, name, "base_url")
        preset = preset_of(name, _text(values, name, "preset"), url)
        if url is None and preset.url_variable and env.get(preset.url_variable):
            origin = f"environment variable {preset.url_variable}"
            found["providers", name, "base_url"] = Found(env[preset.url_variable], origin)
        elif url is not None and recognised(url) is not preset:
            continue
        for variable in reversed(preset.key_variables):
            if ("providers", name, "api_key") not in values and env.get(variable):
                found["providers", name, "api_key"] = Found(env[variable], f"environment variable {variable}")
    return found


def _rates(values: Values, env: Mapping[str, str]) -> Values:
    """What each model of a provider may be asked in a minute, for the providers that say nothing else."""
    return {
        ("providers", key[1], field): Found(env[variable], f"environment variable {variable}")
        for field, variable in RATES.items()
        for key in values
        if key[0] == "providers" and len(key) > 1 and env.get(variable)
        if ("providers", key[1], field) not in values
    }


def _text(values: Values, name: str, field: str) -> str | None:
    found = values.get(("providers", name, field))
    return None if found is None or found.value is None else str(found.value)
