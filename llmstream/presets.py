"""What is known about each API: where it is, where its key is found, and what it can do.

Adding a provider is adding one entry. Everything here is a default that ``providers.NAME`` can override.
"""

from __future__ import annotations

from typing import Final, Literal
from urllib.parse import urlsplit

from msgspec import Struct

ContinueBy = Literal["none", "assistant_prefill", "prefix", "prefix_repeated", "continue_final_message", "replay"]
"""How a cut answer goes on.

``assistant_prefill``: what was logged is sent as the last message; only safe where *every* model behind the API goes on
from there. ``prefix``: that message says ``"prefix": true``; ``prefix_repeated``: the answer then begins with it again.
``continue_final_message``: a flag of the request asks for it. ``replay``: the API keeps its answers under our name for
them and gives this one again from its beginning.
"""

StreamUsage = Literal["asked", "always", "never"]
"""When a stream tells its tokens: if ``stream_options`` ask for it, always (and refuses to be asked), or never."""


class Capabilities(Struct, frozen=True):
    """What an API can do."""

    continue_by: ContinueBy = "none"
    continue_path: str = ""
    """Where continuations are asked for, if not under the base URL: a path on the same host."""
    tools: bool = True
    json_schema: bool = True
    logprobs: bool = True
    choices: bool = True
    """More than one for a request (``n``)."""
    embeddings: bool = True
    stream_usage: StreamUsage = "asked"
    max_parallel: int | None = None
    """Requests at once that it takes from one replica; None: any number."""
    rename: tuple[str, ...] = ()
    """Members of a chat request that the API calls otherwise, as ``seed=random_seed``."""


class Preset(Struct, frozen=True):
    """One API."""

    name: str
    title: str
    base_url: str | None
    can: Capabilities
    key_variables: tuple[str, ...] = ()
    """Variables of the environment that hold its key, the first one first."""
    url_variable: str | None = None
    hosts: tuple[str, ...] = ()
    """By what it is recognised in a base URL: a host, also as the end of one, or ``host:port``."""


_MAX_TOKENS = "max_completion_tokens=max_tokens"
OTHER: Final = Preset("other", "any other", None, Capabilities())
PRESETS: Final[dict[str, Preset]] = {
    preset.name: preset
    for preset in (
        Preset(
            "openai",
            "OpenAI",
            "https://api.openai.com/v1",
            Capabilities(rename=("max_tokens=max_completion_tokens",)),
            key_variables=("OPENAI_API_KEY",),
            url_variable="OPENAI_BASE_URL",
            hosts=("api.openai.com",),
        ),
        Preset(
            "openrouter",
            "OpenRouter",
            "https://openrouter.ai/api/v1",
            Capabilities(choices=False),
            key_variables=("OPENROUTER_API_KEY",),
            hosts=("openrouter.ai",),
        ),
        Preset(
            "ollama",
            "Ollama",
            "http://localhost:11434/v1",
            Capabilities(choices=False, rename=(_MAX_TOKENS,)),
            hosts=("localhost:11434", "127.0.0.1:11434", "[::1]:11434"),
        ),
        Preset(
            "mistral",
            "Mistral",
            "https://api.mistral.ai/v1",
            Capabilities(
                continue_by="prefix_repeated",
                logprobs=False,
                stream_usage="always",
                rename=(_MAX_TOKENS, "seed=random_seed"),
            ),
            key_variables=("MISTRAL_API_KEY",),
            hosts=("api.mistral.ai",),
        ),
        Preset(
            "groq",
            "Groq",
            "https://api.groq.com/openai/v1",
            Capabilities(logprobs=False, choices=False, embeddings=False),
            key_variables=("GROQ_API_KEY",),
            hosts=("api.groq.com",),
        ),
        Preset(
            "localai",
            "LocalAI",
            "http://localhost:8080/v1",
            Capabilities(rename=(_MAX_TOKENS,)),
            key_variables=("LOCALAI_API_KEY",),
        ),
        Preset(
            "gemini",
            "Google Gemini",
            "https://generativelanguage.googleapis.com/v1beta/openai",
            Capabilities(logprobs=False),
            key_variables=("GEMINI_API_KEY",),
            hosts=("generativelanguage.googleapis.com",),
        ),
        Preset(
            "anthropic",
            "Anthropic",
            "https://api.anthropic.com/v1",
            Capabilities(json_schema=False, logprobs=False, choices=False, embeddings=False),
            key_variables=("ANTHROPIC_API_KEY",),
            hosts=("api.anthropic.com",),
        ),
        Preset(
            "vllm",
            "vLLM",
            "http://localhost:8000/v1",
            Capabilities(continue_by="continue_final_message"),
            key_variables=("VLLM_API_KEY",),
        ),
        Preset(
            "llama-server",
            "llama-server",
            "http://localhost:8080/v1",
            Capabilities(continue_by="assistant_prefill"),
            key_variables=("LLAMA_API_KEY",),
        ),
        Preset(
            "lmstudio",
            "LM Studio",
            "http://localhost:1234/v1",
            Capabilities(logprobs=False, choices=False, rename=(_MAX_TOKENS,)),
            hosts=("localhost:1234", "127.0.0.1:1234", "[::1]:1234"),
        ),
        Preset(
            "deepseek",
            "DeepSeek",
            "https://api.deepseek.com",
            Capabilities(
                continue_by="prefix",
                continue_path="/beta",
                json_schema=False,
                choices=False,
                embeddings=False,
                rename=(_MAX_TOKENS,),
            ),
            key_variables=("DEEPSEEK_API_KEY",),
            hosts=("api.deepseek.com",),
        ),
        Preset(
            "together",
            "Together",
            "https://api.together.xyz/v1",
            Capabilities(logprobs=False, rename=(_MAX_TOKENS,)),
            key_variables=("TOGETHER_API_KEY",),
            hosts=("api.together.xyz", "api.together.ai"),
        ),
        Preset(
            "llmstream",
            "llmstream",
            "http://localhost:8000/v1",
            Capabilities(continue_by="replay"),
        ),
        OTHER,
    )
}


def recognised(base_url: str) -> Preset | None:
    """The API at a base URL, when its host tells."""
    try:
        netloc = urlsplit(base_url).netloc.rpartition("@")[2].lower()
    except ValueError:
        return None
    host = netloc if netloc.endswith("]") else netloc.rpartition(":")[0] or netloc
    for preset in PRESETS.values():
        if any(netloc == known or host == known or host.endswith(f".{known}") for known in preset.hosts):
            return preset
    return None


def preset_of(name: str, preset: str | None, base_url: str | None) -> Preset:
    """What is known about the provider ``name``: the preset it asks for, else that of its name, else of its host."""
    known = PRESETS.get(preset or name)
    if known is None and base_url is not None:
        known = recognised(base_url)
    return known or OTHER
