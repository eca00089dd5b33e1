"""Any current GGUF model through llama.cpp, several generations in one batch."""

from __future__ import annotations

import threading
from typing import Any

from llmstream.providers.engines.base import Emit, EngineInfo, EngineSpec, Generation
from llmstream.providers.engines.gate import Gate, Ticket
from llmstream.providers.engines.llama_chunks import ChoiceReader, failure_of, too_long
from llmstream.providers.engines.llama_control import Control
from llmstream.providers.engines.llama_parameters import make_parameters
from llmstream.providers.engines.llama_request import (
    chat_body,
    conversation,
    is_bound,
    raw_body,
    top_logprobs,
)
from llmstream.providers.engines.llama_run import Run
from llmstream.providers.engines.llama_tools import required_tools, uses_tools
from llmstream.providers.engines.text_request import Refused
from llmstream.types import Failure, GenerateRequest


class LlamaCppEngine:
    """Implements :class:`~llmstream.providers.engines.base.Engine` on ``xllamacpp``."""

    def __init__(self) -> None:
        self._server: Any = None
        self._control: Control
        self._gate: Gate
        self._context = 0
        self._system_prompt: str | None = None
        self._reasons = self._calls_tools = False
        self._runs: dict[int, Run] = {}

    def load(self, spec: EngineSpec) -> EngineInfo:
        import xllamacpp

        control = Control()
        parameters = make_parameters(xllamacpp, spec, control.path)
        try:
            self._server = xllamacpp.Server(parameters)
        except RuntimeError as error:
            control.close()
            raise ValueError(f"llama.cpp cannot load {spec.path}") from error
        self._control, self._gate = control, Gate(spec.slots, parameters.n_batch)
        self._context, self._system_prompt = control.slot_context(), spec.system_prompt
        template, traits = control.template_traits()
        self._calls_tools = bool(traits.get("supports_tools") or traits.get("supports_tool_calls"))
        # Only the chat route tells thoughts from the answer.
        self._reasons = "<think>" in template
        details = {
            "threads": parameters.cpuparams.n_threads,
            "batch": parameters.n_batch,
            "tools": self._calls_tools,
            "continues_chat": not self._reasons,
        }
        return EngineInfo(context=self._context, slots=spec.slots, details=details)

    def prompt_tokens(self, request: GenerateRequest) -> int:
        if uses_tools(request) and not self._calls_tools:
            raise Refused("this model's chat template knows no tools", "tools")
        try:
            if self._is_raw(request):
                return len(self._prompt(request))
            return self._control.chat_tokens(self._chat_body(request, 0, 1))
        except ValueError as error:
            field = "tools" if uses_tools(request) else "response_format" if is_bound(request) else "messages"
            raise Refused(str(error), "prompt" if request.kind == "completion" else field) from error

    def start(self, generation: Generation, emit: Emit) -> None:
        run = self._runs[generation.id] = Run(generation, emit)
        for index in range(len(run.tickets)):
            name = f"generation-{generation.id}-{index}"
            threading.Thread(target=self._work, args=(run, index), name=name, daemon=True).start()

    def cancel(self, generation_id: int) -> None:
        if run := self._runs.get(generation_id):
            for ticket in run.tickets:
                self._gate.cancel(ticket)

    def close(self) -> None:
        for generation_id in list(self._runs):
            self.cancel(generation_id)
        if self._server is not None:
            self._server = None
            self._control.close()

    def _is_raw(self, request: GenerateRequest) -> bool:
        """Whether the answer is plain text and nothing has to be parsed out of it."""
        if request.kind == "completion":
            return True
        return not (uses_tools(request) or is_bound(request) or self._reasons)

    def _prompt(self, request: GenerateRequest) -> list[int]:
        prompt = request.body.get("prompt")
        if request.kind == "chat":
            prompt = self._control.render(conversation(request, self._system_prompt))
        elif isinstance(prompt, list) and isinstance(prompt[0], str | list):
            prompt = prompt[0]
        return list(prompt) if isinstance(prompt, list) else self._control.tokenize(str(prompt), prompt=True)

    def _chat_body(self, request: GenerateRequest, index: int, limit: int) -> dict[str, Any]:
        return chat_body(request, conversation(request, self._system_prompt), index, limit)

    def _so_far(self, generation: Generation) -> tuple[int, ...]:
        """The tokens of what was generated before: those logged, if they still say the same."""
        if not generation.text:
            return ()
        if generation.tokens and self._control.detokenize(generation.tokens) == generation.text:
            return generation.tokens
        tokens = self._control.tokenize_behind(generation.text)
        return tokens or tuple(self._control.tokenize(generation.text, prompt=False))

    def _work(self, run: Run, index: int) -> None:
        """The thread of one choice."""
        reason, tokens, cached = None, 0, 0
        try:
            reason, tokens, cached = self._generate(run, index)
        except ValueError as error:
            run.failure = Failure(str(error), type="invalid_request_error", status=400)
        except Exception as error:
            run.failure = Failure(f"llama.cpp failed: {error!r}", code="engine_failed", status=502)
        self._gate.leave(run.tickets[index])
        if run.failure:
            self.cancel(run.generation.id)
        if run.finish(index, reason, tokens, cached):
            del self._runs[run.generation.id]

    def _generate(self, run: Run, index: int) -> tuple[str | None, int, int]:
        """Runs one choice; gives its finish reason (None: cut), its tokens, and the cached ones of its prompt."""
        request = run.generation.request
        raw = self._is_raw(request)
        prompt = self._prompt(request) if raw else []
        so_far = self._so_far(run.generation) if raw else ()
        run.prompt_tokens = len(prompt) if raw else self.prompt_tokens(request)
        if run.prompt_tokens >= self._context:
            run.failure = too_long(run.prompt_tokens, self._context)
            return None, 0, 0
        limit = min(request.max_tokens or self._context, self._context - run.prompt_tokens) - len(so_far)
        if limit <= 0:
            return "length", len(so_far), 0
        reader = ChoiceReader(index, top_logprobs(request), self._control.tokenize_behind if raw else None)
        reader.one_call = bool(required_tools(request))
        if raw:
            call = self._server.handle_completions
            body = raw_body(request, [*prompt, *so_far], index, len(so_far), limit)
        else:
            call, body = self._server.handle_chat_completions, self._chat_body(request, index, limit)
        if not self._gate.enter(run.tickets[index], run.prompt_tokens + len(so_far)):
            return None, 0, 0
        self._stream(run, run.tickets[index], reader, call, body)
        if reader.failure:
            run.failure = reader.failure
        return reader.finish_reason, len(so_far) + reader.completion_tokens, reader.cached_tokens

    def _stream(self, run: Run, ticket: Ticket, reader: ChoiceReader, call: Any, body: dict[str, Any]) -> None:
        """Blocks until llama.cpp is through with one choice; a true answer of the callback stops it."""

        def take(chunk: Any) -> bool:
            try:
                delta = reader.read(chunk) if isinstance(chunk, dict) else None
                if reader.prefilled:
                    self._gate.prefilled(ticket)
                if delta and not ticket.cancelled:
                    run.emit(delta)
            except Exception as error:  # the library would swallow it
                reader.failure = Failure(f"reading llama.cpp's stream failed: {error!r}", status=502)
            return ticket.cancelled or reader.failure is not None

        said = call(body, take)
        if (delta := reader.rest()) and not ticket.cancelled:
            run.emit(delta)
        if said is not None and not isinstance(said, str | bytes) and reader.finish_reason is None:
            reader.failure = reader.failure or failure_of(said)
