"""The seam between the scheduler and whatever generates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from llmstream.errors import UpstreamBroken
from llmstream.transcript import Transcript
from llmstream.types import Delta, GenerateRequest, ModelInfo


class CannotContinue(UpstreamBroken):
    """Going on from what was logged turned out to be impossible. Nothing was put; starting over may do."""

    code = "cannot_continue"


class Sink(Protocol):
    """Where a provider puts what it generates."""

    def put(self, deltas: Sequence[Delta]) -> bool:
        """Takes one or more new deltas; False: wait for ``drained`` before putting more.

        Never raises, and may be called from any callback of the event loop.
        """

    async def drained(self) -> None:
        """Returns when there is room again; what it raises ends the generation."""


class Provider(Protocol):
    """Something that generates: a remote API or a local engine."""

    @property
    def name(self) -> str:
        """The name in the configuration."""

    @property
    def pool(self) -> str:
        """Whose jobs these are: ``remote``, which any replica can run, or the name of a local model."""

    @property
    def slots(self) -> int:
        """How many generations can run at once."""

    @property
    def models(self) -> Sequence[ModelInfo]:
        """What can be asked for by name now."""

    async def open(self) -> None:
        """Gets ready to generate; called once. Raises ProviderError or ConfigError that says what to do."""

    async def close(self) -> None:
        """Stops whatever runs and gives everything back; safe to call twice and without ``open``."""

    async def check(self, request: GenerateRequest) -> None:
        """Refuses what can never run, before it is accepted: raises BadRequest, for a prompt that does not fit the
        context ContextLengthExceeded with the number of tokens too many."""

    def can_continue(self, request: GenerateRequest, so_far: Transcript) -> bool:
        """Whether ``generate`` can go on from the last logged token of ``so_far``."""

    async def generate(self, request: GenerateRequest, so_far: Transcript | None, sink: Sink) -> None:
        """Generates into ``sink``, or continues ``so_far`` (None: from the start), until the answer is whole.

        Puts only what is new. The last deltas carry ``finish_reason`` per choice and ``usage`` (of the whole answer,
        what ``so_far`` holds included). Ending without a finish reason is an error of the provider, which raises
        UpstreamBroken instead. Cancelling stops the model at once. Raises ProviderError, and CannotContinue where
        ``so_far`` turns out to be of no use.
        """

    async def health(self) -> dict[str, object]:
        """A quick look: ``{"status": "ok" | "error", …details}``; never raises."""


@runtime_checkable
class Lasting(Protocol):
    """A provider whose generations may outlive the request for them."""

    async def stop(self, job_id: str) -> None:
        """Ends what still runs for a job that is over; returns soon and never raises."""
