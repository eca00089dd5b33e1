"""``python -m tests.bench.cases.engine_direct WEIGHTS``: the engine without a server; prints tokens per second."""

from __future__ import annotations

import sys
import threading
import time

from llmstream.providers.engines.base import EngineSpec, Generation
from llmstream.providers.engines.llamacpp import LlamaCppEngine
from llmstream.types import Delta, Failure, GenerateRequest
from tests.bench.cases.local_engine import MODEL, QUESTIONS, STREAMS, TOKENS

WAIT_S = 300


class _Run:
    """One round of all questions at once."""

    def __init__(self) -> None:
        self.tokens = 0
        self._left = len(QUESTIONS)
        self._lock = threading.Lock()
        self._over = threading.Event()

    def emit(self, generation: int, deltas: list[Delta], failure: Failure | None, done: bool) -> None:
        with self._lock:
            self.tokens += sum(delta.usage.completion_tokens for delta in deltas if delta.usage)
            self._left -= done
            if not self._left:
                self._over.set()

    def measure(self, engine: LlamaCppEngine, first_id: int) -> float:
        start = time.perf_counter()
        for number, question in enumerate(QUESTIONS):
            body = {"messages": [{"role": "user", "content": question}], "max_tokens": TOKENS, "temperature": 0}
            request = GenerateRequest.of(kind="chat", model=MODEL, body=body)
            engine.start(Generation(first_id + number, request), self.emit)
        if not self._over.wait(WAIT_S):
            sys.exit("the engine did not end in time")
        return self.tokens / (time.perf_counter() - start)


def main() -> None:
    engine = LlamaCppEngine()
    engine.load(EngineSpec("llamacpp", sys.argv[1], slots=STREAMS, system_prompt="You are a helpful assistant."))
    _Run().measure(engine, 0)
    sys.stdout.write(f"{_Run().measure(engine, STREAMS)}\n")
    engine.close()


if __name__ == "__main__":
    main()
