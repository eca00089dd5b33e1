"""Pieces of examples that several families show."""

from __future__ import annotations

from llmstream.api.docs.operation import Json

QUESTION: Json = {"role": "user", "content": "Why is the sky blue?"}
SAID = "Air scatters blue light more than red."
USAGE: Json = {"prompt_tokens": 12, "completion_tokens": 9, "total_tokens": 21}
EVENTS = """\
retry: 1000

id: 1-0
data: {"type":"started","attempt":1}

id: 1-1
data: {"type":"chunk","content":"Air scatters"}

id: 1-2
data: {"type":"chunk","content":" blue light more than red."}

data: {"type":"usage","prompt_tokens":12,"completion_tokens":9,"total_tokens":21}

id: 1-3
data: {"type":"complete"}

"""
HEAD = '{"id":"chatcmpl-order-17","object":"chat.completion.chunk","created":1790000000,"model":"smollm2"'


def _chunk(event_id: str, delta: str, finish_reason: str = "null") -> str:
    choice = f'{{"index":0,"delta":{delta},"logprobs":null,"finish_reason":{finish_reason}}}'
    return f'id: {event_id}\ndata: {HEAD},"choices":[{choice}]}}\n\n'


CHUNKS = (
    _chunk("1-0", '{"role":"assistant","content":""}')
    + _chunk("1-1", '{"content":"Air scatters"}')
    + _chunk("1-2", '{"content":" blue light more than red."}')
    + _chunk("1-3", "{}", '"stop"')
    + "id: 1-4\ndata: [DONE]\n\n"
)
COMPLETION: Json = {
    "id": "chatcmpl-order-17",
    "object": "chat.completion",
    "created": 1790000000,
    "model": "smollm2",
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": SAID},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ],
    "usage": USAGE,
}
ROW: Json = {
    "task_id": "order-17",
    "session_id": "demo",
    "status": "completed",
    "model": "smollm2",
    "priority": 0,
    "lane": "default",
    "attempt": 1,
    "replica": "host-4711-1f2e3d",
    "continues": None,
    "created_at": 1790000000.0,
    "started_at": 1790000000.2,
    "finished_at": 1790000003.1,
    "not_before": None,
}
ACCEPTED: Json = {
    "status": "queued",
    "task_id": "order-17",
    "session_id": "demo",
    "stream_url": "/stream/demo?task_id=order-17",
}
