"""A load test with Locust: questions, whole answers and streams, each of them checked.

    pip install locust
    locust -f examples/locustfile.py --host http://127.0.0.1:8000                                   # with a web page
    locust -f examples/locustfile.py --host http://127.0.0.1:8000 --headless -u 10 -r 10 -t 30s     # quick
    locust -f examples/locustfile.py --host http://127.0.0.1:8000 --headless -u 50 -r 10 -t 2m      # heavy
    locust -f examples/locustfile.py --host http://127.0.0.1:8000 --headless -u 100 -r 20 -t 5m     # stress

Streams are in the table a second time as "first token". ``LLMSTREAM_API_KEY`` is shown to the server, and
``LOADTEST_MODEL`` asked for; by default the first model that it has. A refusal (429, 503) counts as a failure.
"""

from __future__ import annotations

import json
import os
import time
from typing import Any

from locust import HttpUser, between, events, task
from locust.exception import StopUser

QUESTIONS = ["What is Python?", "Why is the sky blue?", "Tell me a long story about a lighthouse."]


class Reader(HttpUser):
    """Somebody who asks, reads the answer to its end, thinks for a moment and asks again."""

    wait_time = between(0.1, 1.0)

    def on_start(self) -> None:
        self._asked = 0
        if key := os.environ.get("LLMSTREAM_API_KEY"):
            self.client.headers["Authorization"] = f"Bearer {key}"
        self._model = os.environ.get("LOADTEST_MODEL") or self._first_model()

    @task(3)
    def question(self) -> None:
        with self.client.post("/question", json={"text": self._question()}, catch_response=True) as response:
            if response.ok and not response.json().get("text"):
                response.failure("an answer without text")

    @task(2)
    def completion(self) -> None:
        with self.client.post("/v1/chat/completions", json=self._chat(), catch_response=True) as response:
            if response.ok and not response.json()["choices"][0]["message"]["content"]:
                response.failure("an answer without content")

    @task(3)
    def stream(self) -> None:
        body, began, first, last = self._chat(stream=True), time.perf_counter(), None, b""
        with self.client.post(
            "/v1/chat/completions", json=body, stream=True, catch_response=True, name="/v1/chat/completions (stream)"
        ) as response:
            for line in response.iter_lines() if response.ok else ():
                if first is None and _says_something(line):
                    first = time.perf_counter() - began
                last = line or last
            if response.ok and last != b"data: [DONE]":
                response.failure(f"a stream that ended with {last[:100]!r}")
        if first is not None:
            events.request.fire(
                request_type="SSE", name="first token", response_time=first * 1000, response_length=0, exception=None
            )

    @task(1)
    def health(self) -> None:
        self.client.get("/health")

    def _question(self) -> str:
        self._asked += 1
        return QUESTIONS[self._asked % len(QUESTIONS)]

    def _chat(self, **more: Any) -> dict[str, Any]:
        return {"model": self._model, "messages": [{"role": "user", "content": self._question()}], **more}

    def _first_model(self) -> str:
        with self.client.get("/v1/models", catch_response=True) as response:
            if response.ok and (models := response.json()["data"]):
                return str(models[0]["id"])
            response.failure("no model is named; set LOADTEST_MODEL")
        raise StopUser


def _says_something(line: bytes) -> bool:
    if not line.startswith(b"data: {"):
        return False
    choices = json.loads(line[6:])["choices"]
    return bool(choices and choices[0]["delta"].get("content"))
