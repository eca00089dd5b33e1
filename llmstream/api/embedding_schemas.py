"""What clients may send to get embeddings."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StrictInt, StrictStr, WithJsonSchema, field_validator

from llmstream.api.native_schemas import JobFields, ModelName
from llmstream.api.schemas import SessionId

MAX_INPUTS = 2048
"""Inputs of one request, as at OpenAI."""
MAX_TOKEN_ID = 2**31 - 1
_TEXT = {"type": "string", "minLength": 1}
_TOKENS = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0, "maximum": MAX_TOKEN_ID}}
INPUT = {
    "anyOf": [
        _TEXT,
        _TOKENS,
        *({"type": "array", "minItems": 1, "maxItems": MAX_INPUTS, "items": each} for each in (_TEXT, _TOKENS)),
    ]
}
"""What :func:`check_inputs` checks, for the document."""


class EmbeddingFields(JobFields):
    """What both ways to ask for embeddings have in common."""

    model: ModelName | None = None
    """The server's default model answers where there is none."""
    dimensions: Annotated[StrictInt, Field(ge=1, le=2**16)] | None = None
    session_id: SessionId | None = None


class EmbeddingBody(EmbeddingFields):
    """``POST /v1/embeddings``"""

    input: Annotated[Any, WithJsonSchema(INPUT)]
    """A text, a list of token ids, or a list of one or the other."""
    encoding_format: Literal["float", "base64"] | None = None
    user: StrictStr | None = None

    @field_validator("input")
    @classmethod
    def _one_or_many(cls, given: Any) -> Any:
        check_inputs(given)
        return given


class NamedEmbeddingBody(EmbeddingBody):
    """The same, where nothing stands for a model that is not named."""

    model: ModelName


class TextsBody(EmbeddingFields):
    """``POST /embeddings``"""

    texts: list[StrictStr]
    user_id: StrictStr | None = None

    @field_validator("texts")
    @classmethod
    def _some(cls, texts: list[str]) -> list[str]:
        check_inputs(texts)
        return texts


def check_inputs(given: Any) -> None:
    """Raises ValueError that says which input is wrong."""
    if isinstance(given, str):
        given = [given]
    if not isinstance(given, list) or not given:
        raise ValueError("expected a text, a list of token ids, or a list of one or the other")
    if isinstance(given[0], int):
        _check_tokens(given, "it")
        return
    if len(given) > MAX_INPUTS:
        raise ValueError(f"{len(given)} inputs are more than the {MAX_INPUTS} that one request may have; send several")
    kind = str if isinstance(given[0], str) else list
    for at, value in enumerate(given):
        if not isinstance(value, kind):
            raise ValueError(f"number {at} is of another kind; expected only texts, or only lists of token ids")
        if not value:
            raise ValueError(f"number {at} is empty")
        if isinstance(value, list):
            _check_tokens(value, f"number {at}")


def _check_tokens(tokens: list[Any], where: str) -> None:
    if not all(type(token) is int and 0 <= token <= MAX_TOKEN_ID for token in tokens):
        raise ValueError(f"{where} holds what is no token id; these are whole numbers from 0 on")
