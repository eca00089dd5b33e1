"""``/jobs`` and ``/sessions``."""

from __future__ import annotations

from llmstream.api import jobs, sessions
from llmstream.api.answers import DeadJobs, Forgotten, Jobs, Requeued, SessionMessages, Sessions
from llmstream.api.docs.common import JOB, LIMIT, STORED, SUBMITS
from llmstream.api.docs.examples import ACCEPTED, QUESTION, ROW, SAID
from llmstream.api.docs.operation import Answer, describe

FAILED = {
    **ROW,
    "task_id": "order-18",
    "status": "failed",
    "attempt": 3,
    "error": {"message": "The answer broke off.", "type": "upstream_error", "param": None, "code": "upstream_broken"},
}

describe(
    jobs.jobs,
    "Jobs",
    parameters=[LIMIT],
    answers={200: Answer("The jobs.", Jobs, {"object": "list", "data": [ROW]})},
    errors=STORED,
)
describe(
    jobs.dead,
    "Jobs",
    parameters=[LIMIT],
    answers={200: Answer("The failed jobs.", DeadJobs, {"object": "list", "data": [FAILED]})},
    errors=STORED,
)
describe(
    jobs.requeue,
    "Jobs",
    path={"task_id": "order-18"},
    answers={
        202: Answer("The new job.", Requeued, {**ACCEPTED, "task_id": "01m7q", "continues": "order-18"}, headers=JOB)
    },
    errors=SUBMITS,
)
describe(
    sessions.sessions,
    "Sessions",
    parameters=[LIMIT],
    answers={
        200: Answer(
            "The sessions.", Sessions, {"object": "list", "data": [{"session_id": "demo", "used_at": 1790000000.0}]}
        )
    },
    errors=STORED,
)
describe(
    sessions.session,
    "Sessions",
    answers={
        200: Answer(
            "The conversation.",
            SessionMessages,
            {
                "session_id": "demo",
                "messages": [QUESTION, {"role": "assistant", "content": SAID}],
                "running": None,
                "expires_in_s": 7200.0,
            },
        )
    },
    errors=STORED,
)
describe(
    sessions.forget,
    "Sessions",
    answers={200: Answer("It is gone.", Forgotten, {"session_id": "demo", "deleted": True})},
    errors=STORED,
)
