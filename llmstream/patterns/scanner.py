"""Finds patterns in a text that may go on. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from llmstream.patterns.expression import Expression, read

MAX_MEMORY = 32 * 1024 * 1024
"""Bytes that one compiled expression may take."""

WINDOW = 2048
"""Characters that are looked at together; more than the longest match, so that there is always something settled."""

Check = Callable[[str], int]
"""How many characters at the start of a candidate are what the pattern looks for; 0: none."""


class Pattern:
    """One thing to look for, by its name."""

    def __init__(self, name: str, source: str, check: Check = len) -> None:
        """Raises ValueError that says what is wrong with ``source``, which is in Python's syntax."""
        self.name = name
        self.expression: Expression = read(source)
        self.check = check
        self.whole = _compile(self.expression.whole, longest=True)
        _compile(_open_end([self.expression]))


class Found(NamedTuple):
    """Where a pattern was found."""

    name: str
    start: int
    end: int


class Scans(Protocol):
    """Looks for several things at once, in a text that may go on."""

    def scan(self, text: str, start: int = 0, *, over: bool = True) -> tuple[list[Found], int]:
        """All matches at ``start`` or behind that no further text can change, and the position up to which that holds:
        behind it a match may begin whose end is not there. ``over``: there is no further text."""


class Scanner:
    """Looks for several patterns at once: the leftmost match counts, of those the longest, of those the first."""

    def __init__(self, patterns: Sequence[Pattern]) -> None:
        self._patterns = tuple(patterns)
        self._any = _compile("|".join(f"(?:{pattern.expression.whole})" for pattern in patterns))
        self._open_end = _compile(_open_end([pattern.expression for pattern in patterns]))

    def find(self, text: str, start: int = 0) -> Found | None:
        """The first match at ``start`` or behind; what stands before ``start`` is only looked at by ``\\b``. Takes time
        proportional to the text."""
        while (candidate := self._any.search(text, start)) is not None:
            start = candidate.start()
            best: Found | None = None
            for pattern in self._patterns:
                if (match := pattern.whole.match(text, start)) is not None:
                    size = pattern.check(text[start : match.end()])
                    if size and (best is None or start + size > best.end):
                        best = Found(pattern.name, start, start + size)
            if best is not None:
                return best
            start += 1
        return None

    def scan(self, text: str, start: int = 0, *, over: bool = True) -> tuple[list[Found], int]:
        """See :class:`Scans`. Looks through a window, as each search has to take its whole text into its hands."""
        found: list[Found] = []
        while len(text) - start > WINDOW:
            base = max(start - 1, 0)
            part, settled = self._scan(text[base : start + WINDOW], start - base, over=False)
            found += [Found(each.name, each.start + base, each.end + base) for each in part]
            start = base + settled
        base = max(start - 1, 0)
        part, settled = self._scan(text[base:], start - base, over=over)
        found += [Found(each.name, each.start + base, each.end + base) for each in part]
        return found, base + settled

    def _scan(self, text: str, start: int, *, over: bool) -> tuple[list[Found], int]:
        found: list[Found] = []
        while True:
            settled = len(text) if over else self._open_end.search(text, start).start()
            while (match := self.find(text, start)) is not None and match.start < settled:
                found.append(match)
                start = match.end
                if start > settled:
                    break
            else:
                return found, settled


def _open_end(expressions: Sequence[Expression]) -> str:
    return rf"(?:{'|'.join(expression.begun for expression in expressions)})\z"


def _compile(source: str, *, longest: bool = False) -> Any:
    import re2  # native, and few need it

    options = re2.Options()
    options.log_errors = False
    options.never_capture = True
    options.longest_match = longest
    options.max_mem = MAX_MEMORY
    try:
        return re2.compile(source, options)
    except re2.error as error:
        said = error.args[0] if error.args else b""
        reason = said.decode(errors="replace") if isinstance(said, bytes) else said
        raise ValueError(f"a smaller regular expression; RE2 refuses this one: {reason}") from None
