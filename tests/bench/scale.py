"""``python -m tests.bench.scale``: what N open streams take, worked out from measured constants.

The constants are the only numbers here, each with the case of ``python -m tests.bench`` that measures it; everything
else follows. SCALE.md shows the table; a test keeps the two equal.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass

GB = 1e9


@dataclass(frozen=True)
class Constants:
    """Measured on one core of a shared 2-core machine; put in your own."""

    chunk_us: float = 74.0
    """open-streams: CPU of a replica for a chunk that comes alone, µs."""
    stored_chunk_us: float = 26.0
    """paced, in the store: CPU of the store for the same chunk, µs."""
    request_us: float = 480.0
    """replicas: CPU of a replica for a job of 16 tokens, whole, µs: what opening and ending one costs at most."""
    stored_request_us: float = 150.0
    """whole-64, in the store: the same there, µs."""
    stream_kb: float = 40.0
    """open-streams: memory of a replica for an open stream, KB."""
    job_kb: float = 5.5
    """Memory of the store for a finished job with a prompt of 250 bytes: 200 jobs, used_memory before and after, KB."""
    logged_chunk_kb: float = 0.035
    """The same for each chunk in its log: jobs of 128 chunks beside jobs of 8, KB."""
    wire_bytes: float = 236.0
    """A chat chunk as a client gets it: an answer's length over its chunks, bytes."""
    append_bytes: float = 142.0
    """A chunk in the store's file, and about as much on the way to it: jobs of 64 chunks beside 8, bytes."""
    idle_mb: float = 80.0
    """idle-memory: an empty replica, MB; the target's limit."""
    files: int = 20_000
    """ulimit -Hn of a process here; a stream takes two sockets."""


@dataclass(frozen=True)
class Plan:
    """How much of everything one load needs."""

    streams: int
    chunks_per_s: float
    """Of one stream."""
    answer_chunks: int = 500
    headroom: float = 0.6
    """Share of a core that is planned with; the rest is for bursts and for the jobs of a replica that died."""
    retention_s: float = 3600.0
    constants: Constants = Constants()

    @property
    def chunks(self) -> float:
        """A second, of all streams."""
        return self.streams * self.chunks_per_s

    @property
    def requests(self) -> float:
        """New ones a second: those that end are replaced."""
        return self.chunks / self.answer_chunks

    @property
    def replica_cores(self) -> float:
        return (self.chunks * self.constants.chunk_us + self.requests * self.constants.request_us) / 1e6

    @property
    def store_cores(self) -> float:
        constants = self.constants
        return (self.chunks * constants.stored_chunk_us + self.requests * constants.stored_request_us) / 1e6

    @property
    def replicas(self) -> int:
        """Processes with a core each: for the work, and for the files that they may open."""
        by_files = self.streams * 2 / (self.constants.files - 200)
        return math.ceil(max(self.replica_cores / self.headroom, by_files))

    @property
    def shards(self) -> int:
        """Primaries of a Redis Cluster; one is a single server."""
        return math.ceil(self.store_cores / self.headroom)

    @property
    def replica_gb(self) -> float:
        """Memory of all replicas."""
        return (self.streams * self.constants.stream_kb * 1e3 + self.replicas * self.constants.idle_mb * 1e6) / GB

    @property
    def store_gb(self) -> float:
        """Memory of all shards with every log kept for the retention time."""
        job_kb = self.constants.job_kb + self.answer_chunks * self.constants.logged_chunk_kb
        return self.requests * self.retention_s * job_kb * 1e3 / GB

    @property
    def client_gbit(self) -> float:
        """Towards the clients; as much comes from the models."""
        return self.chunks * self.constants.wire_bytes * 8 / GB

    @property
    def store_gbit(self) -> float:
        """Into the shards."""
        return self.chunks * self.constants.append_bytes * 8 / GB

    @property
    def first_limit(self) -> str:
        """What a single process or a single store meets first."""
        loads = {
            "one replica's core": self.replica_cores,
            "one replica's files": self.streams * 2 / self.constants.files,
            "one store's core": self.store_cores,
        }
        name, load = max(loads.items(), key=lambda item: item[1])
        return name if load > 1 else "nothing"


PLANS = tuple(Plan(streams, rate) for streams in (1_000, 10_000, 100_000, 1_000_000) for rate in (1.0, 20.0))
HEADS = (
    "streams",
    "chunks/s each",
    "replicas",
    "shards",
    "replicas, GB",
    "logs of an hour, GB",
    "to clients, Gbit/s",
    "to the store, Gbit/s",
    "what one process or store lacks first",
)


def table() -> str:
    """The plans as a Markdown table."""
    rows = [HEADS, ("---",) * len(HEADS), *map(_row, PLANS)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _row(plan: Plan) -> tuple[str, ...]:
    return (
        f"{plan.streams:,}",
        f"{plan.chunks_per_s:g}",
        f"{plan.replicas:,}",
        f"{plan.shards:,}",
        _short(plan.replica_gb),
        _short(plan.store_gb),
        _short(plan.client_gbit),
        _short(plan.store_gbit),
        plan.first_limit,
    )


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


if __name__ == "__main__":
    sys.stdout.write(f"{table()}\n")
