"""Steps that a job needs: while the store is away they are tried again."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from llmstream.errors import StoreError, StoreUnavailable
from llmstream.store.recent import RETRY_S

T = TypeVar("T")


async def insist(step: Callable[[], Awaitable[T]], outage_s: float) -> T:
    """Does a step that may be repeated, again and again for up to ``outage_s``. Raises StoreUnavailable."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + outage_s
    while True:
        try:
            return await step()
        except StoreUnavailable as error:
            if isinstance(error, StoreError) or loop.time() >= deadline:
                raise
        await asyncio.sleep(RETRY_S)
