"""An OpenAI-compatible upstream's bytes to deltas: server-sent events and completion chunks. Pure."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import Struct

from llmstream.providers.refusals import Complaint, complaint
from llmstream.types import Delta, Usage

MAX_EVENT_BYTES = 32 * 1024 * 1024
"""Largest event or whole answer; images and audio come as one event."""

END_OF_EVENT = b"\n\n"
"""Fed behind bytes that ended in good order, for the last event may lack its empty line."""

_BOM = b"\xef\xbb\xbf"
_DONE = b"[DONE]"
_NOTHING: tuple[Any, ...] = (None, "", [])


class TooLarge(ValueError):
    pass


class EventStream:
    """Takes the ``data`` of server-sent events out of bytes that are cut anywhere.

    Follows https://html.spec.whatwg.org/multipage/server-sent-events.html; event names, ids and comments carry
    nothing for us.
    """

    __slots__ = ("_after_cr", "_data", "_fresh", "_held", "_tail")

    def __init__(self) -> None:
        self._tail: list[bytes] = []
        self._data: list[bytes] = []
        self._held = 0
        self._after_cr = False
        self._fresh = True

    def feed(self, data: bytes) -> list[bytes]:
        """Returns the data of every event that ``data`` completes. Raises TooLarge."""
        if not (self._tail or self._data) and data.startswith(b"data: ") and data.endswith(b"\n\n"):
            plain = data[6:-2].split(b"\n\ndata: ")
            if data.count(b"\n") == 2 * len(plain) and b"\r" not in data:  # so nearly all data comes
                self._fresh = self._after_cr = False
                self._held = 0
                return plain
        if self._after_cr and data.startswith(b"\n"):
            data = data[1:]
        lines = data.splitlines()
        if not lines:
            return []
        self._after_cr = data.endswith(b"\r")
        whole = self._after_cr or data.endswith(b"\n")
        self._held += len(data)
        if self._held > MAX_EVENT_BYTES:
            raise TooLarge
        if not whole and len(lines) == 1:
            self._tail.append(data)
            return []
        if self._tail:
            lines[0] = b"".join((*self._tail, lines[0]))
            self._tail = []
        if not whole:
            self._tail.append(lines.pop())
        if self._fresh:
            lines[0], self._fresh = lines[0].removeprefix(_BOM), False
        return self._events(lines)

    def _events(self, lines: list[bytes]) -> list[bytes]:
        events: list[bytes] = []
        for line in lines:
            if line.startswith(b"data:"):
                self._data.append(line[6:] if line.startswith(b" ", 5) else line[5:])
            elif not line:
                self._held = 0
                if self._data:
                    events.append(b"\n".join(self._data))
                    self._data = []
            elif line == b"data":
                self._data.append(b"")
        return events


class _Choice(Struct, gc=False):
    index: int = 0
    delta: dict[str, Any] | None = None
    message: dict[str, Any] | None = None
    text: str | None = None
    finish_reason: str | None = None
    logprobs: dict[str, Any] | None = None


class _Chunk(Struct, gc=False):
    choices: list[_Choice] | None = None
    usage: dict[str, Any] | None = None
    error: Any = None


_decode_chunk = msgspec.json.Decoder(_Chunk).decode
_decode_chunks = msgspec.json.Decoder(list[_Chunk]).decode
_MALFORMED = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)


def _together(events: list[bytes]) -> list[_Chunk] | None:
    """The chunks of several events at a third of the cost of one by one; None where one of them is none."""
    try:
        chunks = _decode_chunks(b"[%b]" % b",".join(events))
    except _MALFORMED:
        return None
    return chunks if len(chunks) == len(events) else None


class Answer(ABC):
    """An answer being read: its choices, and whether each has come to its end."""

    def __init__(self, choices: int) -> None:
        self.ended = False
        """Whether there is nothing more to read."""
        self.failure: str | None = None
        """What went wrong, going on from 'The provider …'; None after a whole answer."""
        self.complaint: Complaint | None = None
        """What the upstream itself said was wrong."""
        self._choices = choices
        self._seen: set[int] = set()
        self._finished: set[int] = set()

    @abstractmethod
    def feed(self, data: bytes) -> list[Delta]:
        """Takes the next bytes."""

    @abstractmethod
    def close(self) -> list[Delta]:
        """The bytes ended in good order."""

    def cut(self, how: str) -> None:
        """The bytes ended in the middle; an answer that was whole by then stays whole."""
        self.ended = True
        if self.failure is None and not self._complete:
            self.failure = how

    @property
    def _complete(self) -> bool:
        return len(self._finished) >= self._choices and self._seen == self._finished

    def _fail(self, failure: str) -> list[Delta]:
        self.failure, self.ended = failure, True
        return []

    def _parse(self, payload: bytes, deltas: list[Delta]) -> None:
        """Adds what one chunk, or a whole answer, says."""
        try:
            chunk = _decode_chunk(payload)
        except _MALFORMED as error:
            self._fail(f"sent something malformed: {error}")
        else:
            self._read((chunk,), deltas)

    def _read(self, chunks: Sequence[_Chunk], deltas: list[Delta]) -> None:
        """Adds what chunks say."""
        for chunk in chunks:
            if self.ended:
                return
            if chunk.error:
                self.complaint = complaint(chunk.error)
                self._fail(f"reported an error instead of an answer: {self.complaint.message}")
                return
            added = len(deltas)
            for choice in chunk.choices or ():
                members = choice.delta
                if members and len(members) == 1 and not (choice.finish_reason or choice.logprobs):
                    text = members.get("content")
                    if text and type(text) is str:  # nearly all chunks are so plain
                        self._seen.add(choice.index)
                        deltas.append(Delta(text, choice.index))
                        continue
                if delta := self._delta(choice):
                    deltas.append(delta)
            if chunk.usage:
                last = deltas.pop() if len(deltas) > added else Delta()
                deltas.append(msgspec.structs.replace(last, usage=usage_of(chunk.usage)))

    def _delta(self, choice: _Choice) -> Delta | None:
        self._seen.add(choice.index)
        if choice.finish_reason == "error":
            self._fail("gave up in the middle of the answer")
            return None
        if choice.finish_reason:
            self._finished.add(choice.index)
        members = choice.delta if choice.delta is not None else choice.message or {}
        text = members.pop("content", choice.text)
        if not isinstance(text, str):
            members, text = ({**members, "content": text} if text else members), ""
        members.pop("role", None)
        fields = {key: value for key, value in members.items() if value not in _NOTHING} if members else members
        if choice.message and isinstance(calls := fields.get("tool_calls"), list):
            fields["tool_calls"] = [{"index": i, **call} for i, call in enumerate(calls) if isinstance(call, dict)]
        logprobs = choice.logprobs if choice.logprobs and any(choice.logprobs.values()) else None
        if not (text or fields or logprobs or choice.finish_reason):
            return None
        return Delta(
            text=text,
            index=choice.index,
            fields=fields or None,
            logprobs=logprobs,
            finish_reason=choice.finish_reason or None,
        )


class ChunkStream(Answer):
    """An answer that comes as server-sent completion chunks."""

    def __init__(self, choices: int) -> None:
        super().__init__(choices)
        self._events = EventStream()

    def feed(self, data: bytes) -> list[Delta]:
        try:
            events = self._events.feed(data)
        except TooLarge:
            return self._fail(f"sent an event of more than {MAX_EVENT_BYTES} bytes")
        deltas: list[Delta] = []
        # What comes last may be no chunk.
        if len(events) > 2 and (chunks := _together(events[:-1])) is not None:
            self._read(chunks, deltas)
            events = events[-1:]
        for event in events:
            if self.ended:
                break
            if event.startswith(_DONE):
                self.cut("said [DONE] before the answer was whole: a finish reason is missing")
            elif event:
                self._parse(event, deltas)
        return deltas

    def close(self) -> list[Delta]:
        deltas = self.feed(END_OF_EVENT)
        self.cut("ended the stream before the answer was whole: a finish reason is missing")
        return deltas


class WholeAnswer(Answer):
    """An answer that comes as one JSON object, as from an upstream that does not stream."""

    def __init__(self, choices: int) -> None:
        super().__init__(choices)
        self._body = bytearray()

    def feed(self, data: bytes) -> list[Delta]:
        self._body += data
        if len(self._body) > MAX_EVENT_BYTES:
            return self._fail(f"sent an answer of more than {MAX_EVENT_BYTES} bytes")
        return []

    def close(self) -> list[Delta]:
        deltas: list[Delta] = []
        self._parse(bytes(self._body), deltas)
        self.cut("sent an answer without a finish reason")
        return deltas


def usage_of(usage: dict[str, Any]) -> Usage:
    prompt, completion = usage.pop("prompt_tokens", None), usage.pop("completion_tokens", None)
    usage.pop("total_tokens", None)
    return Usage(
        prompt_tokens=prompt if isinstance(prompt, int) else 0,
        completion_tokens=completion if isinstance(completion, int) else 0,
        details=usage or None,
    )
