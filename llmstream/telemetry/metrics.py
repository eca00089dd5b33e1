"""Every metric, declared once. Counting is plain arithmetic; names and help are only needed when somebody looks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from typing import Literal

from llmstream.telemetry.snapshot import Family, Series

Labels = tuple[str, ...]
Kind = Literal["counter", "gauge", "histogram"]
Together = Literal["sum", "max", "mean"]

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
SHORT_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
GAP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)


class Metric(ABC):
    """What one metric is called and says."""

    kind: Kind
    together: Together = "sum"
    """How the values of several processes behind one port make one."""

    def __init__(self, name: str, meaning: str, labels: Labels = ()) -> None:
        self.name = name
        self.meaning = meaning
        self.labels = labels

    @property
    def samples(self) -> list[str]:
        """Names under which its values are scraped."""
        if self.kind == "histogram":
            return [f"{self.name}_bucket", f"{self.name}_count", f"{self.name}_sum"]
        return [self.name]

    @abstractmethod
    def read(self) -> Iterator[Series]:
        """Its values now."""


class Counter(Metric):
    """Only grows."""

    kind = "counter"

    def __init__(self, name: str, meaning: str, labels: Labels = ()) -> None:
        super().__init__(name, meaning, labels)
        self._values: dict[Labels, float] = {} if labels else {(): 0}

    def add(self, *labels: str, by: float = 1) -> None:
        values = self._values
        values[labels] = values.get(labels, 0) + by

    def read(self) -> Iterator[Series]:
        return (Series(labels, value) for labels, value in self._values.items())


class Gauge(Metric):
    """Goes up and down: asked for when somebody looks, not kept."""

    kind = "gauge"

    def __init__(self, name: str, meaning: str, labels: Labels = (), together: Together = "sum") -> None:
        super().__init__(name, meaning, labels)
        self.together = together
        self.source: Callable[[], Mapping[Labels, float]] = dict
        """Gives the values now."""

    def read(self) -> Iterator[Series]:
        return (Series(labels, value) for labels, value in self.source().items())


class Buckets:
    """How often values of which size came."""

    __slots__ = ("_bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(self._bounds, value)] += 1
        self.sum += value


class Histogram(Metric):
    """Sizes of things."""

    kind = "histogram"

    def __init__(self, name: str, meaning: str, labels: Labels = (), bounds: tuple[float, ...] = SECONDS) -> None:
        super().__init__(name, meaning, labels)
        self.bounds = bounds
        self._buckets: dict[Labels, Buckets] = {}
        if not labels:
            self.of()

    def of(self, *labels: str) -> Buckets:
        """Where the values with these labels are counted."""
        found = self._buckets.get(labels)
        if found is None:
            found = self._buckets[labels] = Buckets(self.bounds)
        return found

    def read(self) -> Iterator[Series]:
        return (Series(labels, each.sum, list(each.counts)) for labels, each in self._buckets.items())


class Metrics:
    """All that one process counts."""

    def __init__(self) -> None:
        self.http_requests = Counter(
            "http_requests_total",
            "HTTP requests by method, route and status. A stream counts when it ends.",
            ("method", "endpoint", "status"),
        )
        self.http_seconds = Histogram(
            "http_request_duration_seconds",
            "Time from a request's first byte to the end of its answer, streams to their end.",
            ("method", "endpoint"),
        )
        self.tokens = Counter(
            "tokens_generated_total",
            "Tokens generated, as the provider counts them; of an attempt that was cut, its chunks.",
            ("model",),
        )
        self.prompt_tokens = Counter(
            "llmstream_prompt_tokens_total", "Prompt tokens of finished jobs, as the provider counts them.", ("model",)
        )
        self.jobs = Counter("llmstream_jobs_total", "Jobs accepted by this replica.", ("pool", "lane"))
        self.rate_limited = Counter(
            "llmstream_rate_limited_total",
            "Requests refused because of a limit of their caller: requests, tokens, too_large (more tokens than a "
            "minute ever allows), queued_jobs, durability (a memory job cannot be counted).",
            ("reason",),
        )
        self.attempts = Counter(
            "llmstream_attempts_total",
            "Attempts by how they ended: completed, incomplete, failed, cancelled, retried (another follows here), "
            "handed_over, superseded, interrupted (the store stayed away).",
            ("model", "provider", "outcome"),
        )
        self.queue_wait = Histogram(
            "llmstream_queue_wait_seconds",
            "From acceptance, or from not_before, to the start of the first attempt.",
            ("pool", "lane"),
        )
        self.first_token = Histogram(
            "llmstream_time_to_first_token_seconds",
            "From acceptance, or from not_before, to the first token, waiting included.",
            ("model",),
        )
        self.gaps = Histogram(
            "llmstream_inter_token_seconds",
            "Between two arrivals of tokens from the provider; every 8th gap of an answer is measured.",
            ("model",),
            GAP_SECONDS,
        )
        self.overhead = Histogram(
            "llmstream_overhead_seconds",
            "Request time minus the time its job's provider took, for requests whose job ran in the same process.",
            bounds=SHORT_SECONDS,
        )
        self.loop_lag = Histogram(
            "llmstream_event_loop_lag_seconds",
            "How much later than asked the event loop woke a heartbeat.",
            bounds=SHORT_SECONDS,
        )
        self.takeovers = Counter(
            "llmstream_takeovers_total", "Jobs that this replica went on with after another one had begun.", ("pool",)
        )
        self.fenced = Counter("llmstream_fenced_writes_total", "Writes that the store refused to a superseded attempt.")
        self.resumes = Counter(
            "llmstream_resumes_total", "Requests to read a stream on from behind an event.", ("protocol",)
        )
        self.filtered = Counter(
            "llmstream_filtered_total",
            "Matches of filters: in requests (direction in) and answers (out), redacted or, restored later, masked. "
            "An attempt that repeats an answer counts again.",
            ("filter", "direction", "action"),
        )
        self.subscribers = Gauge("llmstream_subscribers", "Open streams.")
        self.running = Gauge("llmstream_jobs_running", "Jobs that run in this process.", ("pool",))
        self.slots = Gauge("llmstream_slots", "Jobs that can run in this process at once.", ("pool",))
        self.waiting = Gauge(
            "llmstream_jobs_waiting",
            "Jobs that wait in the store's queue: the same number on every replica.",
            ("pool", "lane"),
            "max",
        )
        self.scheduled = Gauge(
            "llmstream_jobs_scheduled",
            "Jobs whose time to begin (not_before) is still to come: the same number on every replica.",
            ("pool",),
            "max",
        )
        self.paused = Gauge(
            "llmstream_jobs_paused",
            "Jobs that wait aside until a pause ends, and are not among the waiting: the same number on every replica.",
            ("pool",),
            "max",
        )
        self.queue_rules = Gauge(
            "llmstream_queue_rules", "Pauses and drains that hold, by mode: paused, draining.", ("mode",), "max"
        )
        self.memory_waiting = Gauge(
            "llmstream_memory_jobs_waiting", "Jobs of durability memory that wait in this process.", ("pool",)
        )
        self.webhook_deliveries = Counter(
            "llmstream_webhook_deliveries_total",
            "Tries to deliver a webhook by what came of them: delivered, failed (tried again later), gone (the answer "
            "was 410), dead (given up). The receiver is its name in the configuration, or request.",
            ("receiver", "outcome"),
        )
        self.webhooks_waiting = Gauge(
            "llmstream_webhooks_waiting",
            "Webhooks that are to be delivered: the same number on every replica.",
            (),
            "max",
        )
        self.store_up = Gauge("llmstream_store_up", "1 while the store answers, 0 while it is away.", together="max")
        self.processes = Gauge("llmstream_processes", "Replica processes behind this port.")
        self.cpu = Counter("process_cpu_seconds_total", "CPU time of the replica processes.")
        self.memory = Gauge("process_resident_memory_bytes", "Resident memory of the replica processes.")
        self.vllm_running = Gauge("vllm:num_requests_running", "Jobs that run here, for inference gateways.")
        self.vllm_waiting = Gauge(
            "vllm:num_requests_waiting",
            "Jobs that wait for a slot of any replica, for inference gateways.",
            (),
            "max",
        )
        self.vllm_cache = Gauge(
            "vllm:kv_cache_usage_perc",
            "Part of the local models' slots, each with its share of the KV cache, in use; 1 is all of them.",
            (),
            "mean",
        )

    def __iter__(self) -> Iterator[Metric]:
        return (each for each in vars(self).values() if isinstance(each, Metric))

    def snapshot(self) -> list[Family]:
        """All values now."""
        return [Family(metric.name, list(metric.read())) for metric in self]
