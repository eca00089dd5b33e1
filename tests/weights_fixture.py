"""The real small model, fetched once for all runs of the suite on this machine."""

from __future__ import annotations

import asyncio
import functools
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from llmstream.providers import weights


@functools.cache
def smollm2_weights() -> Path:
    """Returns SmolLM2-135M-Instruct, its hash checked; kept in ``$LLMSTREAM_TEST_CACHE``, by default a folder of the
    user's cache."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "llmstream-tests"
    folder = Path(os.environ.get("LLMSTREAM_TEST_CACHE") or default)
    with ThreadPoolExecutor(1) as apart:  # also called where an event loop runs
        return apart.submit(lambda: asyncio.run(weights.pull("smollm2", folder))).result()
