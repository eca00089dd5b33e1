"""Health, statistics and metrics."""

from __future__ import annotations

from llmstream.api import health, metrics, proxy
from llmstream.api.answers import FullHealth, ProxyHealth, Ready, ServiceHealth, Stats
from llmstream.api.docs.common import STORED
from llmstream.api.docs.operation import Answer, describe

TAG = "Monitoring"
WAITING = {"high": 0, "default": 2, "low": 0}
QUEUE = {
    "waiting": WAITING,
    "scheduled": 0,
    "paused": 0,
    "running": 4,
    "slots": 4,
    "replicas": {"host-4711-1f2e3d": {"slots": 4, "running": 4}},
    "served": 120,
    "service_s": 2.5,
    "rate_per_s": 1.6,
    "eta_s": 1.25,
}
FULL = {
    "status": "ok",
    "replica": "host-4711-1f2e3d",
    "store": {"status": "ok", "seconds": 0.0004},
    "providers": {"smollm2": {"status": "ok", "seconds": 0.0001}},
    "queue": {"model.smollm2": QUEUE},
}

describe(
    health.health,
    TAG,
    answers={
        200: Answer(
            "The process answers.",
            ServiceHealth,
            {"status": "healthy", "model_loaded": True, "model_name": "smollm2"},
        )
    },
)
describe(
    health.ready,
    TAG,
    answers={200: Answer("It takes work.", Ready, {"status": "ready"})},
    errors=STORED,
)
describe(
    health.health_full,
    TAG,
    answers={
        200: Answer("Everything is well.", FullHealth, FULL),
        503: Answer(
            "Something is missing.",
            FullHealth,
            {**FULL, "status": "degraded", "store": {"status": "unavailable"}},
        ),
    },
)
describe(
    health.stats,
    TAG,
    answers={
        200: Answer(
            "The queues.",
            Stats,
            {
                "lanes": WAITING,
                "waiting": 2,
                "scheduled": 0,
                "paused": 0,
                "rules": [],
                "running": 4,
                "replicas": ["host-4711-1f2e3d"],
                "pools": {"model.smollm2": QUEUE},
            },
        )
    },
    errors=STORED,
)
describe(
    metrics.metrics,
    TAG,
    answers={
        200: [
            Answer("The metrics as Prometheus text.", str, "http_requests_total 17.0\n", "text/plain"),
            Answer("OpenMetrics, where `Accept` asks for it.", str, "# EOF\n", "application/openmetrics-text"),
        ]
    },
)
describe(
    proxy.health,
    TAG,
    answers={200: Answer("The providers.", ProxyHealth, {"status": "healthy", "providers": ["ollama", "openrouter"]})},
)
