"""``/webhooks``."""

from __future__ import annotations

from llmstream.api import webhooks
from llmstream.api.answers import Deliveries, Resent, WebhookSecret
from llmstream.api.docs.common import LIMIT, STORED
from llmstream.api.docs.operation import Answer, Parameter, describe

WAITING = {
    "id": "evt_33999c5fdaf5980b0c2fb77cd8e49fca",
    "task_id": "order-29",
    "receiver": "request",
    "status": "waiting",
    "attempts": 2,
    "last_attempt_at": 1790000010.0,
    "last_status": 503,
    "error": "the receiver answered 503",
    "next_attempt_at": 1790000019.0,
    "given_up_at": None,
}
SECRET = "whsec_bWFkZS1mb3ItdGhpcy1leGFtcGxlLW9ubHkuLi4="  # noqa: S105 - an example

describe(
    webhooks.deliveries,
    "Webhooks",
    parameters=[
        Parameter("status", webhooks.Kind, "Those that wait, or those that were given up.", default="waiting"),
        LIMIT,
    ],
    answers={200: Answer("The events.", Deliveries, {"object": "list", "data": [WAITING]})},
    errors=STORED,
)
describe(
    webhooks.retry,
    "Webhooks",
    path={"task_id": "order-29"},
    answers={202: Answer("It is sent.", Resent, {"task_id": "order-29", "receivers": ["request"]})},
    errors=(404, 409, *STORED),
)
describe(
    webhooks.secret,
    "Webhooks",
    answers={200: Answer("The secrets.", WebhookSecret, {"key": SECRET, "keys": [SECRET]})},
    errors=(404,),
)
