"""``/v1/embeddings`` and ``/embeddings``."""

from __future__ import annotations

from llmstream.api import embeddings
from llmstream.api.answers import EmbeddingJob, Embeddings, EmbeddingsAccepted
from llmstream.api.docs.common import CACHING, JOB, REPEATABLE, RUNS, STORED
from llmstream.api.docs.operation import Answer, Json, describe
from llmstream.api.embedding_schemas import EmbeddingBody, NamedEmbeddingBody, TextsBody

TAG = "Embeddings"
USAGE = {"prompt_tokens": 8, "total_tokens": 8}
VECTOR = {"object": "embedding", "index": 0, "embedding": [0.6, 0.0, -0.8]}
VECTORS = Answer(
    "The vectors, in the order of the inputs.",
    Embeddings,
    {"object": "list", "data": [VECTOR], "model": "smollm2", "usage": USAGE},
    headers=JOB,
)
EXAMPLES: dict[str, Json] = {
    "One text": {"model": "smollm2", "input": "The cat sat."},
    "Several, as base64": {"model": "smollm2", "input": ["The cat sat.", "Shares fell."], "encoding_format": "base64"},
}
RESULT = {"embeddings": [[0.6, 0.0, -0.8]], "model": "smollm2", "count": 1, "dimensions": 3, "usage": USAGE}

describe(
    embeddings.create_embeddings,
    TAG,
    body=NamedEmbeddingBody,
    examples=EXAMPLES,
    parameters=[REPEATABLE, CACHING],
    answers={200: VECTORS},
    errors=RUNS,
)
describe(
    embeddings.submit_embeddings,
    TAG,
    body=EmbeddingBody | TextsBody,
    examples={**EXAMPLES, "A batch whose answer is fetched later": {"texts": ["The cat sat.", "Shares fell."]}},
    parameters=[REPEATABLE, CACHING],
    answers={
        200: VECTORS,
        202: Answer(
            "The batch is accepted.",
            EmbeddingsAccepted,
            {"status": "queued", "task_id": "order-20", "status_url": "/embeddings/order-20"},
            headers=JOB,
        ),
    },
    errors=RUNS,
)
describe(
    embeddings.embeddings_status,
    TAG,
    path={"task_id": "order-20"},
    answers={
        200: Answer(
            "The batch.",
            EmbeddingJob,
            {"task_id": "order-20", "status": "completed", "ready": True, "done": 1, "count": 1, "result": RESULT},
            headers=JOB,
        )
    },
    errors=STORED,
)
