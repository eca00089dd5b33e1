"""What the pools of a replica hold, for whoever looks at its metrics."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from llmstream.errors import StoreUnavailable
from llmstream.routing.targets import REMOTE
from llmstream.scheduler.control import QueueControl
from llmstream.scheduler.scheduler import Pool
from llmstream.store.store import Store
from llmstream.telemetry.metrics import Labels
from llmstream.telemetry.observer import Observer
from llmstream.types import MODES

CENSUS_S = 2.0
"""What the store gets to answer a scrape; without it there are no numbers of waiting jobs."""


def watch_pools(observer: Observer, store: Store, pools: Mapping[str, Pool], control: QueueControl) -> None:
    """Lets the metrics show running and waiting jobs of ``pools``, and what is paused."""
    metrics = observer.metrics
    waiting: dict[Labels, float] = {}
    scheduled: dict[Labels, float] = {}
    paused: dict[Labels, float] = {}

    async def refresh() -> None:
        for each in (waiting, scheduled, paused):
            each.clear()
        try:
            async with asyncio.timeout(CENSUS_S):
                for name, pool in pools.items():
                    census = await pool.lanes.census()
                    waiting.update({(name, lane): count for lane, count in census.waiting.items()})
                    scheduled[(name,)], paused[(name,)] = census.scheduled, census.paused
        except (StoreUnavailable, TimeoutError):
            for each in (waiting, scheduled, paused):
                each.clear()

    def rules() -> dict[Labels, float]:
        return {(mode,): sum(rule.mode == mode for rule in control.rules.rules) for mode in MODES}

    def all_waiting() -> dict[Labels, float]:
        return {(): sum(waiting.values()) + sum(len(pool.line) for pool in pools.values())} if waiting else {}

    def cache_usage() -> dict[Labels, float]:
        local = [pool for name, pool in pools.items() if name != REMOTE]
        slots = sum(pool.slots for pool in local)
        return {(): sum(len(pool.running) for pool in local) / slots if slots else 0.0}

    observer.before_scrape.append(refresh)
    metrics.running.source = lambda: {(name,): len(pool.running) for name, pool in pools.items()}
    metrics.slots.source = lambda: {(name,): pool.slots for name, pool in pools.items()}
    metrics.waiting.source = lambda: waiting
    metrics.scheduled.source = lambda: scheduled
    metrics.paused.source = lambda: paused
    metrics.queue_rules.source = rules
    metrics.memory_waiting.source = lambda: {(name,): len(pool.line) for name, pool in pools.items()}
    metrics.store_up.source = lambda: {(): float(store.presence.trouble is None)}
    metrics.vllm_running.source = lambda: {(): sum(len(pool.running) for pool in pools.values())}
    metrics.vllm_waiting.source = all_waiting
    metrics.vllm_cache.source = cache_usage
