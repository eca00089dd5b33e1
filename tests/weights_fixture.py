"""The real small models, fetched once for all runs of the suite on this machine."""

from __future__ import annotations

import asyncio
import functools
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from llmstream.providers import weights


def smollm2_weights() -> Path:
    """SmolLM2-135M-Instruct."""
    return cached_weights("smollm2")


def minilm_weights() -> Path:
    """all-MiniLM-L6-v2."""
    return cached_weights("all-minilm-l6-v2")


@functools.cache
def cached_weights(source: str) -> Path:
    """Returns a model of the catalogue, its hash checked; kept in ``$LLMSTREAM_TEST_CACHE``, by default a folder of
    the user's cache."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "llmstream-tests"
    folder = Path(os.environ.get("LLMSTREAM_TEST_CACHE") or default)
    with ThreadPoolExecutor(1) as apart:  # also called where an event loop runs
        return apart.submit(lambda: asyncio.run(weights.pull(source, folder))).result()
