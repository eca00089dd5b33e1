"""What flows out of a model, token by token, held back until it may be shown."""

from __future__ import annotations

from collections.abc import Sequence

from llmstream.types import Delta


class Outflow:
    """Turns tokens into deltas of whole characters, ending before the first stop string.

    A token leaves only together with all of its text, so the ids in the log always stand for the text in the log.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held: list[tuple[int, bytes]] = []
        self.stopped = False
        """True once a stop string came."""

    def add(self, token: int, piece: bytes) -> Delta | None:
        """Takes the next token and its bytes; gives what may be shown now."""
        self._held.append((token, piece))
        data = b"".join(piece for _, piece in self._held)
        text = _decode(data[: whole(data)])
        found = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.stopped = True
            return self._release(min(found), cut=text[: min(found)])
        return self._release(len(text) - longest_beginning(text, self._stops))

    def rest(self) -> Delta | None:
        """Gives what is held at the end; bytes of a character that never became whole are dropped."""
        data = b"".join(piece for _, piece in self._held)
        tokens = tuple(token for token, _ in self._held)
        self._held.clear()
        return Delta(text=_decode(data[: whole(data)]), tokens=tokens) if tokens else None

    def _release(self, limit: int, cut: str | None = None) -> Delta | None:
        """Lets the tokens go whose text ends within ``limit`` characters; ``cut`` is the last text there will be."""
        data, text, count = b"", "", 0
        for number, (_, piece) in enumerate(self._held, start=1):
            data += piece
            if whole(data) == len(data) and len(_decode(data)) <= limit:
                text, count = _decode(data), number
        tokens = tuple(token for token, _ in self._held[:count])
        del self._held[:count]
        if cut is not None:
            text = cut
            self._held.clear()
        return Delta(text=text, tokens=tokens) if text or tokens else None


def whole(data: bytes) -> int:
    """The length of ``data`` without an unfinished UTF-8 character at its end."""
    for back in range(1, min(3, len(data)) + 1):
        byte = data[-back]
        if byte & 0xC0 != 0x80:
            needed = 2 if byte >> 5 == 0b110 else 3 if byte >> 4 == 0b1110 else 4 if byte >> 3 == 0b11110 else 1
            return len(data) - back if needed > back else len(data)
    return len(data)


def longest_beginning(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end of ``text`` may be the beginning of a stop string."""
    for length in range(min(len(text), max(map(len, stops), default=0)), 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stops):
            return length
    return 0


def _decode(data: bytes) -> str:
    return data.decode("utf-8", "replace")
