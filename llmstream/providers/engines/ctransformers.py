"""Older GGML and GGUF models through ctransformers.

One model object and one thread for all generations, the others wait in line: the library's objects crash when two
threads share one, its older evaluators share static memory even between objects, and more objects would cost the
weights again without being faster, since one generation already uses all cores.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from queue import SimpleQueue
from typing import Any

from llmstream.providers.engines.base import Emit, EngineInfo, EngineSpec, Generation
from llmstream.providers.engines.chat_template import JinjaTemplate, PlainTemplate
from llmstream.providers.engines.ctransformers_model import Model
from llmstream.providers.engines.outflow import Outflow
from llmstream.providers.engines.text_request import (
    Refused,
    Sampling,
    check_fields,
    read_messages,
    read_prompt,
    read_sampling,
)
from llmstream.types import Delta, Failure, GenerateRequest, Usage


class Run:
    """One generation on its way: what is fed, how it goes on, and whether somebody still wants it."""

    def __init__(self, generation: Generation, emit: Emit, prompt: list[int], so_far: list[int]) -> None:
        self.id = generation.id
        self.emit = emit
        self.prompt = prompt
        self.so_far = so_far
        self.chat = generation.request.kind == "chat"
        self.room = generation.request.max_tokens
        self.sampling: Sampling = read_sampling(generation.request)
        self.cancelled = threading.Event()


class CTransformersEngine:
    """Implements :class:`~llmstream.providers.engines.base.Engine`; always has one slot."""

    def __init__(self) -> None:
        self._model: Model
        self._template: JinjaTemplate | PlainTemplate
        self._system_prompt: str | None = None
        self._runs: dict[int, Run] = {}
        self._line: SimpleQueue[Run | None] = SimpleQueue()
        self._worker: threading.Thread | None = None

    def load(self, spec: EngineSpec) -> EngineInfo:
        model = Model(spec)
        names = {f"{key}_token": model.text_of(key) for key in ("bos", "eos")}
        self._template = JinjaTemplate(model.template, names) if model.template else PlainTemplate()
        self._model, self._system_prompt = model, spec.system_prompt
        self._worker = threading.Thread(target=self._work, name="ctransformers", daemon=True)
        self._worker.start()
        details: dict[str, Any] = {
            "chat_template": "file" if model.template else "plain",
            "vocabulary": model.vocabulary,
        }
        return EngineInfo(context=model.context, slots=1, details=details)

    def prompt_tokens(self, request: GenerateRequest) -> int:
        check_fields(request)
        read_sampling(request)
        return len(self._prompt(request))

    def start(self, generation: Generation, emit: Emit) -> None:
        check_fields(generation.request)
        prompt = self._prompt(generation.request)
        so_far = list(generation.tokens)
        if generation.text and not so_far:
            so_far = self._prompt(generation.request, generation.text)[len(prompt) :]
        self._model.check_tokens(so_far)
        if len(prompt) >= self._model.context:
            raise Refused(
                f"the prompt has {len(prompt)} tokens and must leave room for an answer in {self._model.context}",
                "messages",
            )
        run = Run(generation, emit, prompt, so_far)
        self._runs[run.id] = run
        self._line.put(run)

    def cancel(self, generation_id: int) -> None:
        if run := self._runs.get(generation_id):
            run.cancelled.set()

    def close(self) -> None:
        for run in list(self._runs.values()):
            run.cancelled.set()
        self._line.put(None)
        if self._worker:
            self._worker.join()
            self._worker = None

    def _prompt(self, request: GenerateRequest, behind: str = "") -> list[int]:
        """Tokens of the prompt with the text ``behind`` it."""
        prompt: str | list[int]
        if request.kind == "chat":
            prompt = self._template.render(read_messages(request, self._system_prompt))
        else:
            prompt = read_prompt(request)
        if isinstance(prompt, str):
            return self._model.tokenize(prompt + behind)
        self._model.check_tokens(prompt)
        return [*prompt, *self._model.tokenize(behind)] if behind else prompt

    def _work(self) -> None:
        while run := self._line.get():
            try:
                deltas, failure = self._generate(run), None
            except Exception as error:
                deltas, failure = [], Failure(f"ctransformers failed: {error}", code="engine_failed", status=502)
            self._runs.pop(run.id, None)
            run.emit(run.id, deltas, failure, True)

    def _generate(self, run: Run) -> list[Delta]:
        """Generates to the end, emitting on the way; returns the last deltas, none when cancelled."""
        model, tokens = self._model, [*run.prompt, *run.so_far]
        limit = model.context - len(run.prompt)
        if run.room is not None:
            limit = min(limit, run.room)
        made = len(run.so_far)
        if made >= limit:
            return [self._last("length", run, made)]
        stops = run.sampling.stop + tuple(self._template.stops if run.chat else ())
        outflow = Outflow(stops)
        to_feed: Sequence[int] = model.rewind(tokens)
        while self._feed(run, to_feed):
            token = model.sample(run.sampling, made)
            if model.ends(token):
                return [*filter(None, [outflow.rest()]), self._last("stop", run, made)]
            made += 1
            delta = outflow.add(token, model.piece(token))
            if outflow.stopped:
                return [*filter(None, [delta]), self._last("stop", run, made)]
            if made >= limit:
                return [*filter(None, [delta, outflow.rest()]), self._last("length", run, made)]
            if delta:
                run.emit(run.id, [delta], None, False)
            to_feed = [token]
        return []

    def _feed(self, run: Run, tokens: Sequence[int]) -> bool:
        """Evaluates ``tokens`` in slices, between which a cancellation is seen: False."""
        for at in range(0, len(tokens), self._model.slice):
            if run.cancelled.is_set():
                return False
            self._model.feed(tokens[at : at + self._model.slice])
        return not run.cancelled.is_set()

    def _last(self, reason: str, run: Run, made: int) -> Delta:
        return Delta(finish_reason=reason, usage=Usage(prompt_tokens=len(run.prompt), completion_tokens=made))
