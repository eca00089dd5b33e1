"""What becomes of messages in a conversation."""

from __future__ import annotations

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from llmstream.history import Message, bounded, merge, outcome, starts, without_oldest
from llmstream.transcript import Transcript
from llmstream.types import Delta, Event, EventId, Status

texts = st.text(max_size=20)
roles = st.sampled_from(["system", "developer", "user", "assistant", "tool"])
messages = st.lists(st.builds(lambda role, content: {"role": role, "content": content}, roles, texts), max_size=12)


def transcript(*deltas: Delta) -> Transcript:
    return Transcript([Event(EventId(1, at), delta) for at, delta in enumerate(deltas, 1)])


def test_what_a_turn_leaves() -> None:
    """Everything when it was answered, what was said so far when it was cut off, nothing when it failed."""
    said: list[Message] = [{"role": "user", "content": "q"}]
    answered = transcript(Delta(text="a"))
    whole = [*said, {"role": "assistant", "content": "a"}]
    expected: dict[Status | None, list[Message]] = {
        "completed": whole,
        "incomplete": whole,
        "cancelled": whole,
        "failed": [],
        None: [],
    }
    for status, left in expected.items():
        assert outcome(said, status, answered) == left, status
    assert outcome(said, "cancelled", transcript()) == said


def test_tool_calls_stay() -> None:
    """An answer that calls a tool is kept with the call."""
    call = {"index": 0, "id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    (answer,) = outcome([], "completed", transcript(Delta(fields={"tool_calls": [call]})))
    assert answer["content"] is None
    assert answer["tool_calls"][0]["function"]["name"] == "f"


def test_new_instructions_replace_old_ones() -> None:
    """System messages stand first, and the latest ones count."""
    earlier = [
        {"role": "system", "content": "old"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
    ]
    new = [{"role": "developer", "content": "new"}, {"role": "user", "content": "r"}]
    assert [message["content"] for message in merge(earlier, new)] == ["new", "q", "a", "r"]
    assert [message["content"] for message in merge(earlier, new[1:])] == ["old", "q", "a", "r"]


@given(earlier=messages, said=messages)
def test_merging_loses_no_word(earlier: list[Message], said: list[Message]) -> None:
    """All that users and models said is there, in order; nothing but the system messages is replaced."""
    plain = [m["content"] for m in [*earlier, *said] if m["role"] not in {"system", "developer"}]
    merged = [m["content"] for m in merge(earlier, said) if m["role"] not in {"system", "developer"}]
    assert "".join(merged).replace("\n\n", "") == "".join(plain).replace("\n\n", "")


@given(conversation=messages, turns=st.integers(0, 12))
def test_turns_go_as_a_whole(conversation: list[Message], turns: int) -> None:
    """Without its oldest turns, what is left of a conversation begins with a user or is nothing but instructions."""
    if turns == 0:
        return
    kept = without_oldest(conversation, turns)
    spoken = [message for message in kept if message["role"] not in {"system", "developer"}]
    assert not spoken or spoken[0]["role"] == "user"
    system = [message for message in conversation if message["role"] in {"system", "developer"}]
    assert [message for message in kept if message["role"] in {"system", "developer"}] == system
    assert len(starts(spoken)) == max(0, len(starts([m for m in conversation if m not in system])) - turns)


@given(conversation=messages, limit=st.integers(1, 500))
def test_bounds_hold(conversation: list[Message], limit: int) -> None:
    """What is kept fits, or there is no turn left that could go."""
    kept = bounded(conversation, limit)
    size = sum(len(msgspec.json.encode(message)) for message in kept)
    assert (
        size <= limit or not starts([m for m in kept if m["role"] not in {"system", "developer"}]) or not starts(kept)
    )
