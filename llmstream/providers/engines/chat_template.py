"""Chat templates: from messages to the text a model was trained to continue."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

Message = dict[str, str]

_NAMES = {"system": "System", "user": "User", "assistant": "Assistant"}


class PlainTemplate:
    """For files without a template: ``User: …``, ``Assistant: …``, one turn a line, the system message first."""

    stops: Sequence[str] = ("\nUser:",)

    def render(self, messages: Sequence[Message]) -> str:
        turns = [f"{_NAMES.get(message['role'], message['role'])}: {message['content']}" for message in messages]
        return "\n".join([*turns, "Assistant:"])


class JinjaTemplate:
    """The template a model file carries, run in a sandbox: the file is data of strangers."""

    stops: Sequence[str] = ()

    def __init__(self, source: str, tokens: dict[str, str]) -> None:
        """``tokens`` holds the texts of ``bos_token`` and the like. Raises ValueError, ImportError without jinja2."""
        try:
            import jinja2
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError as error:
            raise ImportError(
                "this model file has a chat template, which needs jinja2: pip install 'llmstream[ctransformers]'"
            ) from error
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals.update(tokens, raise_exception=_refuse)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ValueError(f"the model file's chat template does not parse: {error}") from error

    def render(self, messages: Sequence[Message]) -> str:
        try:
            return self._template.render(messages=messages, add_generation_prompt=True)
        except Exception as error:  # whatever a stranger's template raises, these messages do not fit it
            raise ValueError(f"the model's chat template refuses these messages: {error}") from error


def _refuse(reason: Any) -> NoReturn:
    raise ValueError(str(reason))
