"""``/queues``, and cancelling jobs by filter."""

from __future__ import annotations

from llmstream.api import jobs, queues
from llmstream.api.answers import CancelledJobs, QueueRules, Queues
from llmstream.api.control_schemas import CancelBody, Part, Resumed
from llmstream.api.docs.common import STORED
from llmstream.api.docs.operation import Answer, describe

TAG = "Queues"
RULE = {"mode": "paused", "lane": "low", "model": "smollm2", "since": 1790000000.0}
RULES = Answer("The rules that hold now.", QueueRules, {"object": "queue.rules", "rules": [RULE]})
POOL = {"waiting": {"high": 0, "default": 2, "low": 0}, "scheduled": 0, "paused": 0, "running": 4}
PART = {"A lane of a model": {"lane": "low", "model": "smollm2"}}

describe(
    queues.queues,
    TAG,
    answers={
        200: Answer(
            "The pools and the rules.",
            Queues,
            {
                "object": "queues",
                "rules": [{**RULE, "by": "admin", "waiting": 3, "running": 1}],
                "pools": {"smollm2": POOL},
            },
        )
    },
    errors=STORED,
)
describe(queues.pause, TAG, body=Part, examples=PART, answers={200: RULES}, errors=STORED)
describe(queues.drain, TAG, body=Part, examples=PART, answers={200: RULES}, errors=STORED)
describe(
    queues.resume,
    TAG,
    body=Resumed,
    examples={**PART, "Everything": {"all": True}},
    answers={200: RULES},
    errors=STORED,
)
describe(
    jobs.cancel,
    "Jobs",
    body=CancelBody,
    examples={"What waits in a lane": {"status": "queued", "lane": "low", "created_before": "2030-01-31T09:00:00Z"}},
    answers={
        200: Answer(
            "The jobs that were cancelled.",
            CancelledJobs,
            {"object": "jobs.cancelled", "cancelled": 1, "task_ids": ["order-17"], "more": False},
        )
    },
    errors=STORED,
)
