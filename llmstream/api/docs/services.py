"""The families around one model: ``/v1/generate``, ``/v1/chat``, ``/generate``, ``/chat_completion``, ``/question``."""

from __future__ import annotations

from llmstream.api import core, question, service
from llmstream.api.answers import Content, Generated, Replied, ServiceStatus, StreamEvent, Text
from llmstream.api.docs.common import CACHING, JOB, REPEATABLE, RUNS, STORED
from llmstream.api.docs.examples import EVENTS, QUESTION, SAID
from llmstream.api.docs.operation import EVENT_STREAM, Answer, describe
from llmstream.api.native_schemas import CoreChatBody, CoreGenerateBody, PromptBody, QuestionBody, ServiceChatBody

SERVICE, CORE = "Model service", "LLM core"
ABOUT = {"model": "smollm2", "tokens_generated": 9, "cached": False}
META = {"temperature": 0.2, "tokens_limit": 256, "stop_words": ["STOP"]}
CONTENT = Answer("The answer.", Content, {"content": SAID}, headers=JOB)

describe(
    service.status,
    SERVICE,
    answers={
        200: Answer(
            "The service.",
            ServiceStatus,
            {
                "service": "llmstream",
                "status": "healthy",
                "model_loaded": True,
                "model_name": "smollm2",
                "cache": {
                    "enabled": True,
                    "max_size": 100,
                    "ttl_seconds": 3600.0,
                    "size": 17,
                    "hits": 5,
                    "misses": 20,
                    "shared": 0,
                    "hit_rate": 0.2,
                },
            },
        )
    },
    errors=STORED,
)
describe(
    service.generate,
    SERVICE,
    body=PromptBody,
    examples={"A prompt": {"prompt": "Why is the sky blue?", "max_tokens": 100, "temperature": 0.7}},
    parameters=[REPEATABLE, CACHING],
    answers={
        200: Answer(
            "The answer.", Generated, {"generated_text": SAID, "prompt": "Why is the sky blue?", **ABOUT}, headers=JOB
        )
    },
    errors=RUNS,
)
describe(
    service.converse,
    SERVICE,
    body=ServiceChatBody,
    examples={
        "The next message of a session": {"session_id": "demo", "messages": [QUESTION]},
        "A stream": {"messages": [QUESTION], "max_tokens": 100, "stream": True},
    },
    parameters=[REPEATABLE, CACHING],
    answers={
        200: [
            Answer("The answer.", Replied, {"message": {"role": "assistant", "content": SAID}, **ABOUT}, headers=JOB),
            Answer("With `stream`, its events.", StreamEvent, EVENTS, EVENT_STREAM, JOB),
        ]
    },
    errors=RUNS,
)
describe(
    core.generate,
    CORE,
    body=CoreGenerateBody,
    examples={"One message, known by an id": {"job_id": "order-19", "content": "Why is the sky blue?", "meta": META}},
    parameters=[REPEATABLE, CACHING],
    answers={200: CONTENT},
    errors=RUNS,
)
describe(
    core.chat_completion,
    CORE,
    body=CoreChatBody,
    examples={"A conversation": {"messages": [QUESTION], "meta": META}},
    parameters=[REPEATABLE, CACHING],
    answers={200: CONTENT},
    errors=RUNS,
)
describe(
    question.question,
    "Question answering",
    body=QuestionBody,
    examples={"A question": {"text": "Why is the sky blue?"}},
    parameters=[REPEATABLE, CACHING],
    answers={200: Answer("The answer.", Text, {"text": SAID}, headers=JOB)},
    errors=RUNS,
)
