"""Results of orders, where those who posted them to a queue look for them."""

from __future__ import annotations

from llmstream.store.pipeline import Script, Sender

_PUT = Script(
    "put-result",
    """
-- KEYS result; ARGV value, ttl_ms. Whoever waits may listen on the channel of the same name.
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
redis.call('PUBLISH', KEYS[1], 'set')
return 1
""",
)


class Results:
    """Values under ``prefix:job_id``; the prefix belongs to all who share the queue."""

    def __init__(self, pipeline: Sender, prefix: str, retention_s: float) -> None:
        self._pipeline = pipeline
        self._prefix = prefix
        self.retention_s = retention_s

    async def put(self, job_id: str, value: bytes) -> None:
        """Stores a result and says so; doing it twice is fine."""
        await self._pipeline.run(_PUT, [self._key(job_id)], value, int(self.retention_s * 1000))

    async def get(self, job_id: str) -> bytes | None:
        """The result of an order; None while there is none."""
        found: bytes | None = await self._pipeline.call("GET", self._key(job_id))
        return found

    def _key(self, job_id: str) -> str:
        return f"{self._prefix}:{job_id}"
