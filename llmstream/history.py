"""What becomes of messages in a conversation: merged, trimmed. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from llmstream.transcript import Transcript
from llmstream.types import Status

Message = dict[str, Any]
_SYSTEM = frozenset({"system", "developer"})


def outcome(said: Sequence[Message], status: Status | None, transcript: Transcript) -> list[Message]:
    """What a turn leaves: nothing when it failed or was lost, what was said so far when it was cut off."""
    if status is None or status == "failed":
        return []
    if status == "cancelled" and not transcript.text:
        return list(said)
    return [*said, answer(transcript)]


def answer(transcript: Transcript) -> Message:
    """The message that a job has given, with the tools that it calls."""
    choice = transcript.choices.get(0)
    message = choice.message if choice is not None else {"role": "assistant", "content": ""}
    return {name: value for name, value in message.items() if value is not None or name == "content"}


def merge(earlier: Sequence[Message], said: Sequence[Message]) -> list[Message]:
    """The conversation with the new messages behind it.

    System messages stand first, and new ones replace the old. A user who goes on before there was an answer goes on in
    the same message: many models refuse two in a row.
    """
    instructed = [message for message in said if message["role"] in _SYSTEM]
    if not instructed:
        instructed = [message for message in earlier if message["role"] in _SYSTEM]
    before = [message for message in earlier if message["role"] not in _SYSTEM]
    new = [message for message in said if message["role"] not in _SYSTEM]
    if before and new and _goes_on(before[-1], new[0]):
        joined = {**new[0], "content": f"{before[-1]['content']}\n\n{new[0]['content']}"}
        before, new = before[:-1], [joined, *new[1:]]
    return [*instructed, *before, *new]


def _goes_on(last: Message, first: Message) -> bool:
    texts = isinstance(last.get("content"), str) and isinstance(first.get("content"), str)
    return last["role"] == first["role"] == "user" and texts


def starts(messages: Sequence[Message]) -> list[int]:
    """Where turns begin: at each message of a user that follows another one's."""
    roles = [message["role"] for message in messages]
    return [at for at, role in enumerate(roles) if role == "user" and (at == 0 or roles[at - 1] != "user")]


def without_oldest(messages: Sequence[Message], turns: int) -> list[Message]:
    """The conversation without its oldest turns; system messages stay."""
    system = [message for message in messages if message["role"] in _SYSTEM]
    rest = [message for message in messages if message["role"] not in _SYSTEM]
    begin = starts(rest)
    return [*system, *rest[begin[turns] :]] if turns < len(begin) else system


def bounded(messages: Sequence[Message], max_bytes: int) -> list[Message]:
    """The conversation without the oldest turns that do not fit into so many bytes."""
    kept = list(messages)
    sizes = [len(msgspec.json.encode(message)) for message in messages]
    over, dropped = sum(sizes) - max_bytes, 0
    while over > 0 and dropped < len(starts(messages)):
        dropped += 1
        kept = without_oldest(messages, dropped)
        over = sum(len(msgspec.json.encode(message)) for message in kept) - max_bytes
    return kept
