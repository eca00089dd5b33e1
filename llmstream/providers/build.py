"""Settings to providers. The only place that knows which class serves which kind of entry."""

from __future__ import annotations

from llmstream.config import ModelSettings, Settings
from llmstream.providers.base import Provider
from llmstream.providers.echo import EchoProvider

DEFAULT_MODEL = "smollm2"


async def build_providers(settings: Settings) -> list[Provider]:
    """Makes every configured provider, not yet open; weights that are missing are pulled first.

    Raises ConfigError when weights cannot be had.
    """
    models = settings.models
    if not models and not settings.providers:
        models = {DEFAULT_MODEL: ModelSettings()}
    providers = [await _local(name, model, settings) for name, model in models.items()]
    for name, remote in settings.providers.items():
        from llmstream.providers.openai import OpenAIProvider

        providers.append(OpenAIProvider(name, remote, slots=settings.scheduler.remote_slots))
    return providers


async def _local(name: str, model: ModelSettings, settings: Settings) -> Provider:
    if model.engine == "echo":
        return EchoProvider(name, model)
    from llmstream.providers.local import LocalProvider
    from llmstream.providers.weights import pull

    return LocalProvider(name, model, await pull(model.source, settings.data_dir))
