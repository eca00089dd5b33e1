"""An answer with its matches replaced, while it is being generated.

What is not settled yet, because a match may begin there, waits here; it is not logged. So an attempt that ends early
loses nothing that was seen, and the next one generates it again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from msgspec.structs import replace

from llmstream.config_filters import redacted
from llmstream.filters.texts import Count, Part, Path, at_path, escaped, leaves, replaced, with_leaves
from llmstream.patterns.scanner import Found, Pattern, Scans
from llmstream.types import Delta

PLACEHOLDER = "<>"
"""Name of the pattern that finds what is to be put back; no filter can have it."""


def placeholders() -> Pattern:
    """Finds everything that looks like a placeholder."""
    return Pattern(PLACEHOLDER, r"<[A-Z][A-Z0-9_]{0,31}_[1-9][0-9]{0,5}>")


class Replacing:
    """What is put in the place of matches in an answer."""

    def __init__(self, names: Mapping[str, str], redacting: Count, restoring: Count) -> None:
        self._names = names
        self._redacting = redacting
        self._restoring = restoring

    def part(self, found: Found, text: str, path: Path) -> Part | None:
        """None for a match that stays: it only looks like a placeholder."""
        if found.name != PLACEHOLDER:
            return Part(found.start, found.end, redacted(found.name), lost=True)
        original = self._names.get(text[found.start : found.end])
        return None if original is None else Part(found.start, found.end, escaped(path, original), lost=False)

    def count(self, part: Part, text: str) -> None:
        """A match has been replaced for good."""
        if part.lost:
            self._redacting(part.text[1:-1].lower())
        else:
            self._restoring(text[part.start + 1 : part.end - 1].rpartition("_")[0].lower())


class Growing:
    """One text of a choice. It is cut where a match may begin, but never within a piece that has token ids or
    probabilities: these belong to the whole of it."""

    def __init__(self, scanner: Scans, replacing: Replacing, path: Path = (), before: str = "") -> None:
        self.path = path
        self._scanner = scanner
        self._replacing = replacing
        self._before = before[-1:]
        """The last character that has gone on, which decides whether a word begins behind it."""
        self._waiting: list[Delta] = []

    @property
    def waits(self) -> bool:
        return bool(self._waiting)

    def take(self, piece: Delta | None, *, over: bool = False) -> list[Delta]:
        """Takes the next piece and returns what is settled; ``over``: nothing follows."""
        if piece is not None:
            self._waiting.append(piece)
        if not self._waiting:
            return []
        text, begin = self._before + "".join(each.text for each in self._waiting), len(self._before)
        matches, settled = self._scanner.scan(text, begin, over=over)
        parts = [part for match in matches if (part := self._replacing.part(match, text, self.path)) is not None]
        cut = settled if over else self._cut(text, begin, settled, parts)
        ready = [self._made(text, *group) for group in self._groups(begin, cut, parts)]
        if cut > begin:
            self._before = text[cut - 1]
        return ready

    def _cut(self, text: str, begin: int, settled: int, parts: Sequence[Part]) -> int:
        """How far the text can go on, at ``settled`` or before."""
        cut, start = settled, begin
        for piece in self._waiting:
            end = start + len(piece.text)
            if start < cut < end:
                cut = start if _whole(piece) else _before_space(text, start, cut, parts)
                break
            start = end
        for part in reversed(parts):  # a match goes on in one piece, or not yet
            if part.start < cut < part.end:
                return self._cut(text, begin, part.start, parts)
        return cut

    def _groups(self, start: int, cut: int, parts: Sequence[Part]) -> Iterator[tuple[int, list[Delta], list[Part]]]:
        """The pieces up to ``cut``, those that share a match together: where they start, what was replaced in them."""
        left, group, own, begin = list(parts), list[Delta](), list[Part](), start
        while self._waiting and (start < cut or start + len(self._waiting[0].text) <= cut):
            piece = self._waiting.pop(0)
            end = start + len(piece.text)
            if end > cut:
                self._waiting.insert(0, replace(piece, text=piece.text[cut - start :]))
                piece, end = replace(piece, text=piece.text[: cut - start]), cut
            group.append(piece)
            while left and left[0].start < end:
                own.append(left.pop(0))
            if not own or own[-1].end <= end:
                yield begin, group, own
                group, own, begin = [], [], end
            start = end

    def _made(self, text: str, start: int, pieces: list[Delta], parts: list[Part]) -> Delta:
        if not parts:
            (piece,) = pieces
            return piece
        end = start + sum(len(piece.text) for piece in pieces)
        for part in parts:
            self._replacing.count(part, text)
        shown = replaced(text, parts, start, end)
        if any(part.lost for part in parts):
            return Delta(shown, pieces[0].index, said="")
        tokens = tuple(token for piece in pieces for token in piece.tokens)
        return Delta(shown, pieces[0].index, tokens, logprobs=_joined(pieces), said=text[start:end])


class AnswerFilter:
    """All texts of an answer. Each choice and each of its members is looked at by itself; a member that the next delta
    does not go on with is over."""

    def __init__(self, scanner: Scans, replacing: Replacing, *, slow: bool = False) -> None:
        """``slow``: :meth:`put` is to be called from a thread."""
        self.slow = slow
        self.faithful = True
        """Whether the log says all that the model said."""
        self._scanner = scanner
        self._replacing = replacing
        self._growing: dict[int, dict[Path, Growing]] = {}

    def begin(self, said: str = "") -> None:
        """An answer begins, or goes on behind what its first choice said."""
        self.faithful = True
        self._growing = {0: {(): Growing(self._scanner, self._replacing, before=said)}}

    def put(self, deltas: Sequence[Delta]) -> list[Delta]:
        """What can go on of the answer after the next deltas."""
        ready = [each for delta in deltas for each in self._put(delta)]
        self.faithful = self.faithful and all(each.said != "" for each in ready)
        return ready

    def _put(self, delta: Delta) -> Iterator[Delta]:
        members = self._growing.setdefault(delta.index, {})
        texts = dict(leaves(delta.fields)) if delta.fields else {}
        ends = delta.finish_reason is not None
        if ends or texts or delta.text:
            going_on = {*texts, ()} if delta.text else set(texts)
            for path, growing in members.items():
                if path not in going_on:
                    yield from self._end(growing, delta.index)
        if delta.text:
            piece = Delta(delta.text, delta.index)
            if not self.slow:  # sentences do not end where tokens do
                piece = replace(piece, tokens=delta.tokens, logprobs=delta.logprobs)
            yield from self._member(members, ()).take(piece, over=ends)
        fields = self._fields(members, delta, texts, over=ends) if delta.fields else None
        if fields or ends or delta.usage is not None:
            yield Delta(index=delta.index, fields=fields, finish_reason=delta.finish_reason, usage=delta.usage)

    def _fields(
        self, members: dict[Path, Growing], delta: Delta, texts: Mapping[Path, str], *, over: bool
    ) -> dict[str, Any] | None:
        settled = {}
        for path, text in texts.items():
            growing = self._member(members, path)
            settled[path] = "".join(each.text for each in growing.take(Delta(text, delta.index), over=over))
        fields: dict[str, Any] = with_leaves(delta.fields, settled)
        return fields if _says_more(fields) else None

    def _end(self, growing: Growing, index: int) -> Iterator[Delta]:
        if not growing.waits:
            return
        rest = growing.take(None, over=True)
        if not growing.path:
            yield from rest
        elif text := "".join(each.text for each in rest):
            yield Delta(index=index, fields=at_path(growing.path, text))

    def _member(self, members: dict[Path, Growing], path: Path) -> Growing:
        if path not in members:
            members[path] = Growing(self._scanner, self._replacing, path)
        return members[path]


def _whole(piece: Delta) -> bool:
    return bool(piece.tokens) or piece.logprobs is not None


def _before_space(text: str, start: int, cut: int, parts: Sequence[Part]) -> int:
    """White space stays with the word behind it, as in tokens: some APIs refuse to go on behind it."""
    start = max([start, *(part.end for part in parts if part.end <= cut)])
    while cut > start and text[cut - 1].isspace():
        cut -= 1
    return cut


def _says_more(fields: Any) -> bool:
    """Whether there is more in a delta than the places of texts."""
    if isinstance(fields, dict):
        return any(_says_more(value) for key, value in fields.items() if key != "index")
    return any(map(_says_more, fields)) if isinstance(fields, list) else True


def _joined(pieces: Sequence[Delta]) -> dict[str, Any] | None:
    joined: dict[str, Any] = {}
    for piece in pieces:
        for key, values in (piece.logprobs or {}).items():
            joined.setdefault(key, []).extend(values or [])
    return joined or None
