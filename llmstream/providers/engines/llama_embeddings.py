"""Embeddings of any current GGUF model that makes them, through llama.cpp."""

from __future__ import annotations

import threading
from typing import Any

from llmstream.providers.engines.base import Emit, EngineInfo, EngineSpec, Generation
from llmstream.providers.engines.gate import Gate, Ticket
from llmstream.providers.engines.llama_chunks import failure_of
from llmstream.providers.engines.llama_control import Control
from llmstream.providers.engines.llama_parameters import make_embedding_parameters
from llmstream.types import Delta, Failure, GenerateRequest
from llmstream.vectors import Slices, dimensions


class InputTooLong(ValueError):
    param, code = "input", "context_length_exceeded"


class LlamaCppEmbeddings:
    """Implements :class:`~llmstream.providers.engines.base.Engine`; a generation is one slice of a request.

    llama.cpp cannot be stopped inside a slice. A cancelled one is over for its caller at once, and keeps its place at
    the gate until its vectors are there.
    """

    def __init__(self) -> None:
        self._server: Any = None
        self._control: Control
        self._gate: Gate
        self._context = 0
        self._lock = threading.Lock()
        self._runs: dict[int, tuple[Ticket, Emit]] = {}

    def load(self, spec: EngineSpec) -> EngineInfo:
        import xllamacpp

        control = Control()
        parameters = make_embedding_parameters(xllamacpp, spec, control.path)
        try:
            self._server = xllamacpp.Server(parameters)
        except RuntimeError as error:
            control.close()
            raise ValueError(f"llama.cpp cannot load {spec.path}") from error
        # Slices that compute side by side share the cores; one more than there are threads would only wait inside.
        self._control, self._gate = control, Gate(spec.slots, 0)
        self._context = control.slot_context()
        details = {"threads": parameters.cpuparams.n_threads, "dimensions": dimensions(self._embed(["a"])[0][0])}
        return EngineInfo(context=self._context, slots=spec.slots, details=details)

    def prompt_tokens(self, request: GenerateRequest) -> int:
        """Counts the tokens of the longest input that may be too long; 0 where none can be."""
        longest = 0
        for at, value in enumerate(request.inputs):
            tokens = self._tokens(value)
            longest = max(longest, tokens)
            if tokens > self._context:
                raise InputTooLong(
                    f"input[{at}] has {tokens} tokens and this model reads at most {self._context}; shorten or split it"
                )
        return longest

    def start(self, generation: Generation, emit: Emit) -> None:
        ticket = Ticket()
        self._runs[generation.id] = ticket, emit
        name = f"embeddings-{generation.id}"
        threading.Thread(target=self._work, args=(generation, ticket), name=name, daemon=True).start()

    def cancel(self, generation_id: int) -> None:
        if run := self._runs.get(generation_id):
            self._gate.cancel(run[0])
            self._end(generation_id, [], None)

    def close(self) -> None:
        for generation_id in list(self._runs):
            self.cancel(generation_id)
        if self._server is not None:
            self._server = None
            self._control.close()

    def _tokens(self, value: str | list[int]) -> int:
        """The tokens of an input. A text with fewer bytes than there is room for surely fits and is not looked at."""
        if not isinstance(value, str):
            return len(value)
        if len(value.encode(errors="replace")) + 2 <= self._context:
            return 0
        return len(self._control.tokenize(value, prompt=True))

    def _work(self, generation: Generation, ticket: Ticket) -> None:
        """The thread of one slice."""
        deltas: list[Delta] = []
        failure: Failure | None = None
        if not self._gate.enter(ticket, 0):
            return
        try:
            vectors, tokens = self._embed(generation.request.inputs)
            part = Slices(generation.request.inputs, generation.request.model, None)
            deltas = part.deltas(range(len(vectors)), vectors, tokens)
        except InputRefused as refused:
            failure = refused.failure
        except Exception as error:
            failure = Failure(f"llama.cpp failed: {error!r}", code="engine_failed", status=502)
        self._gate.leave(ticket)
        self._end(generation.id, deltas, failure)

    def _end(self, generation_id: int, deltas: list[Delta], failure: Failure | None) -> None:
        """Says the one last word about a slice, whoever comes first."""
        with self._lock:
            run = self._runs.pop(generation_id, None)
        if run is not None:
            run[1](generation_id, deltas, failure, True)

    def _embed(self, inputs: list[str | list[int]] | list[str]) -> tuple[list[str], int]:
        """The vectors of some inputs, and the tokens that these have together."""
        said = self._server.handle_embeddings({"input": inputs, "encoding_format": "base64"})
        if not isinstance(said, dict) or "data" not in said:
            raise InputRefused(failure_of(said))
        found = sorted(said["data"], key=lambda each: int(each["index"]))
        return [each["embedding"] for each in found], int(said["usage"]["prompt_tokens"])


class InputRefused(Exception):
    """llama.cpp has something against an input."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure
