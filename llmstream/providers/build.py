"""Settings to providers. The only place that knows which class serves which kind of entry."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path

from llmstream.config import ModelSettings, Settings
from llmstream.providers.base import Provider
from llmstream.providers.downloads import Progress
from llmstream.providers.echo import EchoProvider

DEFAULT_MODEL = "smollm2"

PullProgress = Callable[[str], Progress]
"""Makes what hears how far the pull of a source is."""


def local_models(settings: Settings) -> Mapping[str, ModelSettings]:
    """The models that run here: those configured, or the default one when nothing is."""
    if settings.models or settings.providers:
        return settings.models
    return {DEFAULT_MODEL: ModelSettings()}


async def pull_weights(settings: Settings, progress: PullProgress | None = None) -> None:
    """Gets the weights that are missing for the models that run here. Raises ConfigError when they cannot be had."""
    for model in local_models(settings).values():
        if model.engine != "echo":
            await _weights(model, settings, progress)


async def build_providers(settings: Settings, progress: PullProgress | None = None) -> list[Provider]:
    """Makes every configured provider, not yet open; weights that are missing are pulled first.

    Raises ConfigError when weights cannot be had.
    """
    providers = [await _local(name, model, settings, progress) for name, model in local_models(settings).items()]
    for name, remote in settings.providers.items():
        from llmstream.providers.openai import OpenAIProvider

        providers.append(OpenAIProvider(name, remote, slots=settings.scheduler.remote_slots))
    return providers


async def _local(name: str, model: ModelSettings, settings: Settings, progress: PullProgress | None) -> Provider:
    if model.engine == "echo":
        return EchoProvider(name, model)
    from llmstream.providers.local import LocalProvider
    from llmstream.providers.local_embeddings import LocalEmbeddings

    weights = await _weights(model, settings, progress)
    if model.engine == "llamacpp" and await asyncio.to_thread(_embeds, weights):
        return LocalEmbeddings(name, model, weights)
    return LocalProvider(name, model, weights)


def _embeds(weights: Path) -> bool:
    from llmstream.providers.engines.llama_parameters import pools

    try:
        return pools(weights)
    except (ValueError, OSError):  # the engine says what is wrong when it loads the file
        return False


async def _weights(model: ModelSettings, settings: Settings, progress: PullProgress | None) -> Path:
    from llmstream.providers.weights import pull

    return await pull(model.source, settings.data_dir, progress(model.source) if progress else None)
