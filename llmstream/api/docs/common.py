"""Parameters, headers and errors that many operations share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from llmstream import errors
from llmstream.api.answers import ErrorAnswer
from llmstream.api.docs.operation import Answer, Parameter
from llmstream.api.duplicates import KEY_HEADER, MAX_KEY
from llmstream.api.jobs import DEFAULT_LIMIT, MAX_LIMIT

EventId = Annotated[str, Field(pattern=r"^[0-9]{1,9}-[0-9]{1,15}$")]

PATH = {
    "task_id": Parameter("task_id", str, "A job: its id, or the caller's own `job_id`.", "path", "order-17"),
    "session_id": Parameter("session_id", str, "The session, or the id of a job that belongs to none.", "path", "demo"),
    "completion_id": Parameter(
        "completion_id", str, "The `id` of a completion, or that of its job.", "path", "chatcmpl-order-17"
    ),
    "model": Parameter("model", str, "The name of a model.", "path", "smollm2"),
}  # fmt: skip
"""Parts of paths, by name."""

Limit = Annotated[int, Field(ge=1, le=MAX_LIMIT)]
LIMIT = Parameter("limit", Limit, "How many at most.", example=10, default=DEFAULT_LIMIT)
REPEATABLE = Parameter(
    KEY_HEADER,
    Annotated[str, Field(min_length=1, max_length=MAX_KEY)],
    "Requests with the same key are the same job. With a different body: 422.",
    "header",
)
CACHING = Parameter(
    "Cache-Control",
    str,
    "`no-cache` asks for a new answer, `no-store` for one that is not kept; `X-Cache: hit` marks an old one.",
    "header",
)
BEHIND = "The stream goes on behind this event, the last one that was seen."
RESUME = (
    Parameter("Last-Event-ID", EventId, BEHIND, "header", "1-0"),
    Parameter("last_event_id", EventId, "The same for clients that cannot send headers."),
    Parameter("starting_after", EventId, "The same under the name that OpenAI's clients use."),
)

HEADERS = {
    "x-request-id": "The request's id, as it stands in the log; the client's own, if it sent one.",
    "X-Process-Time": "Seconds until the answer began.",
    "x-job-id": "The job that gives the answer.",
    "Location": "Where the answer can be read again.",
    "Retry-After": "Seconds to wait before trying again.",
    "retry-after-ms": "The same in milliseconds.",
    "WWW-Authenticate": "How to show an API key.",
}
EVERYWHERE = ("x-request-id", "X-Process-Time")
"""What every answer bears."""
JOB = ("x-job-id",)

RUNS = (404, 409, 422, 429, 502, 503, 504)
"""What may become of a request for an answer."""
SUBMITS = (404, 409, 422, 429, 503)
"""What may become of a job before it runs."""
STORED = (503,)
"""What may become of a look into the store."""

MEANINGS = {
    400: "Something in the request is wrong; `param` names it.",
    401: "There is no API key, or none that is valid.",
    403: "The API key may not do this.",
    404: "There is no such thing, or it belongs to somebody else.",
    408: "The request arrived too slowly.",
    409: "It contradicts what is there: the id is another request's, the session is busy, the job was cancelled.",
    413: "The request body is too large.",
    415: "The request body's `Content-Encoding` is not supported.",
    422: "The `Idempotency-Key` was used for a different request.",
    429: "There is too much to do, or too much was asked for; try again after a while.",
    500: "Something else went wrong; the message says what.",
    502: "The model's side failed.",
    503: "The store or the broker cannot be reached, or this replica takes no new work; try again after a while.",
    504: "The model's side took too long, or the job ran out of its time.",
}
BESIDE = {401: ("WWW-Authenticate",), 429: ("Retry-After", "retry-after-ms"), 503: ("Retry-After",)}


def error_answer(status: int) -> Answer:
    """The answer of an error status, with the codes that the tree of errors has for it."""
    kinds = [error for error in _tree(errors.LLMStreamError) if error.status == status]
    found = list(dict.fromkeys(kind.code for kind in kinds if kind.code))
    codes = f" Codes: {', '.join(f'`{code}`' for code in found)}." if found else ""
    type_ = kinds[0].type if kinds else errors.BadRequest.type
    example = {"message": MEANINGS[status], "type": type_, "param": None, "code": found[0] if found else None}
    return Answer(MEANINGS[status] + codes, ErrorAnswer, {"error": example}, headers=BESIDE.get(status, ()))


def _tree(base: type[errors.LLMStreamError]) -> Iterator[type[errors.LLMStreamError]]:
    if base is not errors.Fenced:  # never shown to a client
        yield base
    for each in base.__subclasses__():
        yield from _tree(each)
