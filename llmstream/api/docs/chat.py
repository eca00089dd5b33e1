"""``/chat`` and ``/stream``."""

from __future__ import annotations

from llmstream.api import chat
from llmstream.api.answers import Accepted, JobAnswer, StreamEvent
from llmstream.api.docs.common import JOB, REPEATABLE, RESUME, RUNS, STORED, SUBMITS
from llmstream.api.docs.examples import ACCEPTED, EVENTS, ROW, SAID, USAGE
from llmstream.api.docs.operation import EVENT_STREAM, Answer, Json, Parameter, describe
from llmstream.api.schemas import ChatBody

TAG = "Chat"
STREAM = Answer("The events of the answer, from the first one on.", StreamEvent, EVENTS, EVENT_STREAM, JOB)
EXAMPLES: dict[str, Json] = {
    "One message": {"message": "Why is the sky blue?"},
    "A conversation that can wait": {
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why is the sky blue?"}],
        "priority": -5,
        "max_tokens": 100,
    },
}
TIMES = ("created_at", "started_at", "finished_at")
JOB_BODY = {
    **{name: value for name, value in ROW.items() if name not in {*TIMES, "replica", "not_before"}},
    "text": SAID,
    "finish_reason": "stop",
    "usage": USAGE,
    "error": None,
    "last_event_id": "1-3",
    "timings": {
        **{name: ROW[name] for name in TIMES},
        "queue_s": 0.2,
        "run_s": 2.9,
    },
}
JOB_ANSWER = Answer("The job.", JobAnswer, JOB_BODY, headers=JOB)

describe(
    chat.submit_chat,
    TAG,
    body=ChatBody,
    examples={
        **EXAMPLES,
        "Urgent, with an id of the caller's own": {"message": "Why?", "job_id": "order-4711", "priority": 10},
    },
    parameters=[REPEATABLE],
    answers={202: Answer("The job is accepted and will end, whatever happens.", Accepted, ACCEPTED, headers=JOB)},
    errors=SUBMITS,
)
describe(
    chat.chat,
    TAG,
    body=ChatBody,
    examples=EXAMPLES,
    parameters=[REPEATABLE],
    answers={200: STREAM._replace(headers=(*JOB, "Location"))},
    errors=RUNS,
)
describe(
    chat.stream,
    TAG,
    parameters=[*RESUME, Parameter("task_id", str, "The job, where the session has several.", example="order-17")],
    answers={
        200: STREAM._replace(meaning="The events behind the position."),
        204: Answer("There are no more events; an EventSource stops.", headers=JOB),
    },
    errors=STORED,
)
describe(chat.status, TAG, answers={200: JOB_ANSWER}, errors=STORED)
describe(chat.cancel, TAG, answers={200: JOB_ANSWER}, errors=(409, *STORED))
