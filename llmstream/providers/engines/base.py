"""What the child process asks of an engine. Native libraries are imported only inside an engine's functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from msgspec import Struct

from llmstream.types import Delta, Failure, GenerateRequest


class EngineSpec(Struct, frozen=True, omit_defaults=True):
    """What to load and how."""

    engine: str
    path: str
    slots: int = 4
    context: int | None = None
    threads: int | None = None
    gpu_layers: int | None = None
    model_type: str | None = None
    system_prompt: str | None = None


class EngineInfo(Struct, frozen=True, omit_defaults=True):
    """What was loaded."""

    context: int
    """Tokens of prompt and answer together, for each slot."""
    slots: int
    details: dict[str, Any] = {}


class Generation(Struct, frozen=True):
    """One generation handed to an engine."""

    id: int
    request: GenerateRequest
    text: str = ""
    """What was generated and logged by earlier attempts; the engine goes on right behind it."""
    tokens: tuple[int, ...] = ()
    """The ids behind ``text``, where they are known."""


Emit = Callable[[int, list[Delta], Failure | None, bool], None]
"""``emit(id, deltas, failure, done)``, callable from any thread; nothing is emitted for an id after ``done``."""


class Engine(Protocol):
    """One loaded model. All methods are called from the child's main thread; none but ``load`` may block for long."""

    def load(self, spec: EngineSpec) -> EngineInfo:
        """Loads the weights; blocks. Raises ValueError that says what is wrong with the file."""

    def prompt_tokens(self, request: GenerateRequest) -> int:
        """Counts the tokens of the prompt after the chat template. Raises ValueError for a request it cannot run."""

    def start(self, generation: Generation, emit: Emit) -> None:
        """Begins generating and returns at once; ``emit`` gets the deltas, the last with finish reason and usage."""

    def cancel(self, generation_id: int) -> None:
        """Stops a generation, also in the middle of its prompt; it emits ``done`` once the slot is free."""

    def close(self) -> None:
        """Gives everything back."""
