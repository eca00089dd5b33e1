"""Shared fixtures: a real model file, and providers that run it in a real process."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from llmstream.config import ModelSettings
from llmstream.providers.local import LocalProvider
from tests.tiny_gguf import write_tiny_gguf

TINY_CONTEXT = 512


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with random weights and a context of 512 tokens."""
    return write_tiny_gguf(tmp_path_factory.mktemp("weights") / "tiny.gguf", context=TINY_CONTEXT)


@pytest.fixture
async def provider(tiny_gguf: Path) -> AsyncIterator[LocalProvider]:
    """The tiny model in two slots, loaded."""
    provider = LocalProvider("tiny", ModelSettings(slots=2), tiny_gguf)
    await provider.open()
    yield provider
    await provider.close()
