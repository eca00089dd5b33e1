"""Variables of the environment that other programs use too, and what they configure here: providers and their keys.

``LLM_BASE_URL``, ``LLM_API_KEY`` and ``LLM_MODEL`` make a provider. A key under the name that its API gave it (such as
``OPENAI_API_KEY``) is taken by the provider of that API, and makes one where nothing else is configured.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec

from llmstream.config_sources import Found, Values
from llmstream.presets import PRESETS, preset_of, recognised

BASE_URL, API_KEY, MODEL = "LLM_BASE_URL", "LLM_API_KEY", "LLM_MODEL"
UNNAMED = "llm"
"""The provider at ``LLM_BASE_URL`` where its host is none that we know."""


def from_known_variables(values: Values, env: Mapping[str, str]) -> Values:
    """What the environment says about providers, given what is configured already."""
    found = _the_one(env)
    if not found and not any(key[0] in ("models", "providers") for key in values):
        found = _ambient(env)
    return found | _keys(values | found, env)


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


def _text(values: Values, name: str, field: str) -> str | None:
    found = values.get(("providers", name, field))
    return None if found is None or found.value is None else str(found.value)
