"""Models that run here, each in a process of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llmstream.config import ModelSettings
from llmstream.errors import BadRequest, ContextLengthExceeded, UpstreamBroken, UpstreamUnknown
from llmstream.providers.base import Sink
from llmstream.providers.device import Device
from llmstream.providers.engines.base import EngineSpec
from llmstream.providers.fields import check_fields
from llmstream.providers.stream import Stream
from llmstream.transcript import Transcript
from llmstream.types import GenerateRequest, ModelInfo


class LocalProvider:
    """Implements :class:`~llmstream.providers.base.Provider` with one engine process."""

    engine: str | None = None
    """What runs the model where the settings do not say it exactly."""

    def __init__(self, name: str, settings: ModelSettings, weights: Path) -> None:
        self._name, self._settings = name, settings
        self._device = Device(
            name,
            EngineSpec(
                engine=self.engine or settings.engine,
                path=str(weights),
                slots=settings.slots,
                context=settings.context,
                threads=settings.threads,
                gpu_layers=settings.gpu_layers,
                model_type=settings.model_type,
                system_prompt=settings.system_prompt,
            ),
        )

    @property
    def name(self) -> str:
        return self._name

    @property
    def pool(self) -> str:
        return self._name

    @property
    def slots(self) -> int:
        return self._device.info.slots

    @property
    def models(self) -> Sequence[ModelInfo]:
        context = self._device.info.context or None
        return [ModelInfo(name=self._name, provider=self._name, context=context, kinds=("chat", "completion"))]

    @property
    def pid(self) -> int | None:
        """The engine's process, while it runs."""
        return self._device.pid

    async def open(self) -> None:
        await self._device.open()

    async def close(self) -> None:
        await self._device.close()

    async def check(self, request: GenerateRequest) -> None:
        self._check_kind(request, BadRequest)
        check_fields(request)
        if request.choices > self.slots:
            raise BadRequest(
                f"n={request.choices} asks for more choices than the {self.slots} slots of {self._name!r}.", param="n"
            )
        field = "messages" if request.kind == "chat" else "prompt"
        prompt, context = await self._device.count(request), self._device.info.context
        excess = prompt + (request.max_tokens or 1) - context
        if excess > 0:
            answer = f" and {request.max_tokens} tokens are asked for" if request.max_tokens else ""
            raise ContextLengthExceeded(
                f"The prompt has {prompt} tokens{answer}, which exceeds the context of {context} tokens by {excess} "
                f"tokens; shorten the {field}" + (" or lower max_tokens." if answer else "."),
                param=field,
            )

    def can_continue(self, request: GenerateRequest, so_far: Transcript) -> bool:
        """Text of one choice only: the state of a grammar or of a half-written tool call is not in the log."""
        details, body = self._device.info.details, request.body
        bound = (body.get("response_format") or {}).get("type", "text") != "text"
        tools = bool(body.get("tools")) and body.get("tool_choice") != "none"
        plain = request.kind == "completion" or details.get("continues_chat", True)
        return request.choices == 1 and not bound and not tools and bool(plain) and so_far.continuable

    async def generate(self, request: GenerateRequest, so_far: Transcript | None, sink: Sink) -> None:
        self._check_kind(request, UpstreamUnknown)
        text, tokens = (so_far.text, tuple(so_far.tokens)) if so_far else ("", ())
        stream = await self._device.start(request, sink, text, tokens)
        try:
            await stream.ended()
        finally:
            await self._device.stop(stream)
        self._check_whole(stream, request)

    def _check_whole(self, stream: Stream, request: GenerateRequest) -> None:
        if len(stream.finished) < request.choices:
            raise UpstreamBroken(f"The engine of {self._name!r} stopped in the middle of an answer.")

    def _check_kind(self, request: GenerateRequest, error: type[BadRequest | UpstreamUnknown]) -> None:
        """Raises ``error`` for a request of a kind that is not for this model; routes may lead there all the same."""
        if request.kind == "embedding":
            raise error(
                f"The model {self._name!r} makes no embeddings; ask one that does. GET /v1/models lists what each can.",
                param="model",
                code="model_cannot_embed",
                status=400,
            )

    async def health(self) -> dict[str, object]:
        """Status ``loading``, ``ok``, ``restarting`` or ``closed``, with pid, context, slots and restarts."""
        device = self._device
        return {
            "status": device.state,
            "engine": self._settings.engine,
            "pid": device.pid,
            "context": device.info.context,
            "slots": device.info.slots,
            "restarts": device.restarts,
            "details": device.info.details,
            **({"error": device.last_error} if device.last_error and device.state != "ok" else {}),
        }
