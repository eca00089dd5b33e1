"""Embedding models that run here, each in a process of its own."""

from __future__ import annotations

from collections.abc import Sequence

from llmstream.errors import BadRequest, UpstreamUnknown
from llmstream.providers.base import Sink
from llmstream.providers.fields import check_fields
from llmstream.providers.gathering import Gathered
from llmstream.providers.local import LocalProvider
from llmstream.transcript import Transcript
from llmstream.types import BEGINNING, GenerateRequest, ModelInfo
from llmstream.vectors import Slices, made_by, vectors


class LocalEmbeddings(LocalProvider):
    """Makes the vectors of a request slice by slice: those of several jobs take turns, and each slice is logged."""

    engine = "llamacpp-embeddings"

    @property
    def models(self) -> Sequence[ModelInfo]:
        info = self._device.info
        told = {"dimensions": info.details.get("dimensions")}
        return [
            ModelInfo(
                name=self._name, provider=self._name, context=info.context or None, kinds=("embedding",), extra=told
            )
        ]

    async def check(self, request: GenerateRequest) -> None:
        self._check_kind(request, BadRequest)
        check_fields(request)
        size, wanted = self._device.info.details.get("dimensions"), request.body.get("dimensions")
        if wanted is not None and wanted != size:
            raise BadRequest(
                f"The vectors of {self._name!r} have {size} dimensions, and their beginnings mean nothing by "
                "themselves; leave dimensions out.",
                param="dimensions",
            )
        await self._device.count(request)

    def can_continue(self, request: GenerateRequest, so_far: Transcript) -> bool:
        """Vectors that another model made cannot stand beside ours."""
        return request.kind == "embedding" and made_by(so_far, self._name)

    async def generate(self, request: GenerateRequest, so_far: Transcript | None, sink: Sink) -> None:
        self._check_kind(request, UpstreamUnknown)
        inputs = request.inputs
        parts = Slices(inputs, self._name, so_far)
        for part in parts:
            asked = GenerateRequest.of("embedding", self._name, {"input": inputs[part.start : part.stop]})
            deltas = parts.deltas(part, *await self._slice(asked))
            if not sink.put(deltas):
                await sink.drained()

    def _check_kind(self, request: GenerateRequest, error: type[BadRequest | UpstreamUnknown]) -> None:
        if request.kind != "embedding":
            raise error(
                f"The model {self._name!r} makes embeddings and cannot chat; POST /v1/embeddings asks it for them.",
                param="model",
                code="model_cannot_chat",
                status=400,
            )

    async def _slice(self, asked: GenerateRequest) -> tuple[list[str], int]:
        """The vectors of a slice, and the tokens of its inputs."""
        made = Gathered()
        stream = await self._device.start(asked, made)
        try:
            await stream.ended()
        finally:
            await self._device.stop(stream)
        self._check_whole(stream, asked)
        transcript = Transcript()
        transcript.extend(made.deltas, BEGINNING)
        return vectors(transcript), transcript.usage.prompt_tokens if transcript.usage else 0
