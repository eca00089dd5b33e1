"""``/v1/chat/completions``, ``/v1/chat/stream`` and ``/v1/models``."""

from __future__ import annotations

from typing import Literal

from llmstream.api import openai, proxy
from llmstream.api.answers import ChatCompletion, ChatCompletionChunk, ErrorAnswer, Model, Models
from llmstream.api.docs.common import CACHING, JOB, REPEATABLE, RESUME, RUNS, STORED
from llmstream.api.docs.examples import CHUNKS, COMPLETION, QUESTION
from llmstream.api.docs.operation import EVENT_STREAM, Answer, Parameter, describe
from llmstream.api.schemas import ChatCompletionBody

TAG = "OpenAI"
LOCATED = (*JOB, "Location")
Flag = Literal["true", "false", "1", "0"]
Chunk = ChatCompletionChunk | ErrorAnswer | Literal["[DONE]"]
WHOLE = Answer("The whole answer.", ChatCompletion, COMPLETION, headers=LOCATED)
STREAM = Answer("With `stream`, its events.", Chunk, CHUNKS, EVENT_STREAM, LOCATED)
MODEL = {"id": "smollm2", "object": "model", "created": 1790000000, "owned_by": "smollm2", "context_length": 2048}

describe(
    openai.create_chat_completion,
    TAG,
    body=ChatCompletionBody,
    examples={
        "The whole answer": {"model": "smollm2", "messages": [QUESTION]},
        "A stream that ends with the usage": {
            "model": "smollm2",
            "messages": [{"role": "system", "content": "Be brief."}, QUESTION],
            "max_tokens": 100,
            "temperature": 0.2,
            "stream": True,
            "stream_options": {"include_usage": True},
        },
    },
    parameters=[REPEATABLE, CACHING],
    answers={200: [WHOLE, STREAM]},
    errors=RUNS,
)
describe(
    openai.get_chat_completion,
    TAG,
    parameters=[
        Parameter("stream", Flag, "The stream instead of the whole answer.", example="true", default="false"),
        Parameter("include_usage", Flag, "A stream ends with the usage.", default="false"),
        *RESUME,
    ],
    answers={200: [WHOLE, STREAM], 204: Answer("There are no more events.", headers=LOCATED)},
    errors=RUNS,
)
describe(openai.list_models, TAG, answers={200: Answer("The models.", Models, {"object": "list", "data": [MODEL]})})
describe(openai.get_model, TAG, answers={200: Answer("The model.", Model, MODEL)}, errors=STORED)
describe(
    proxy.stream,
    "Proxy",
    body=ChatCompletionBody,
    examples={"From a provider by name": {"model": "smollm2", "provider": "smollm2", "messages": [QUESTION]}},
    parameters=[REPEATABLE, CACHING],
    answers={200: STREAM._replace(meaning="The events of the answer.")},
    errors=RUNS,
)
