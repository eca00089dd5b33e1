"""Regular expressions as RE2 takes them: one for a whole match, one for the beginning of a match. Pure.

RE2 takes time proportional to the text whatever the expression is, but cannot say whether a text could still become a
match. So Python's own parser reads the expression, and from its tree both are written.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from re import _constants as op  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any, NamedTuple

LONGEST = 512
"""Characters that an expression may match at most: so much of a stream may have to wait for what follows."""
MOST_REPEATS = 1000
"""RE2's own limit."""

_FLAGS = re.IGNORECASE | re.DOTALL | re.VERBOSE | re.UNICODE
_CLASSES = {
    op.CATEGORY_DIGIT: r"\d",
    op.CATEGORY_NOT_DIGIT: r"\D",
    op.CATEGORY_SPACE: r"\s",
    op.CATEGORY_NOT_SPACE: r"\S",
    op.CATEGORY_WORD: r"\w",
    op.CATEGORY_NOT_WORD: r"\W",
}
_BOUNDARIES = {op.AT_BOUNDARY: r"\b", op.AT_NON_BOUNDARY: r"\B"}
_REFUSED = {
    op.ASSERT: "looks ahead or behind",
    op.ASSERT_NOT: "looks ahead or behind",
    op.GROUPREF: "refers back to a group",
    op.GROUPREF_EXISTS: "refers back to a group",
    op.ATOMIC_GROUP: "has an atomic group",
    op.POSSESSIVE_REPEAT: "repeats possessively",
}

Node = tuple[Any, Any]


class Expression(NamedTuple):
    """An expression in RE2's syntax."""

    whole: str
    begun: str
    """Matches every text that a match can begin with, the empty one and whole matches included."""
    longest: int
    """Characters."""


def read(source: str) -> Expression:
    """Reads an expression in Python's syntax; ``\\d``, ``\\w``, ``\\s`` and ``\\b`` know ASCII. Raises ValueError that
    says what is wrong with it."""
    try:
        tree = parser.parse(source)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"a regular expression; this one cannot be read: {error}") from None
    flags = tree.state.flags
    if flags & ~_FLAGS:
        raise ValueError("a regular expression without flags other than i, s and x")
    shortest, longest = tree.getwidth()
    if not shortest:
        raise ValueError("a regular expression that does not match the empty text")
    writer = _Writer(dot_all=bool(flags & re.DOTALL))
    found = writer.sequence(list(tree))
    if longest > LONGEST:
        raise ValueError(f"a regular expression that matches {LONGEST} characters at most; this one {longest}")
    if flags & re.IGNORECASE:
        found = _Part(f"(?i:{found.whole})", f"(?i:{found.begun})")
    return Expression(found.whole, found.begun, longest)


class _Part(NamedTuple):
    whole: str
    begun: str
    atom: bool = False
    """Whether nothing lies between the empty text and a whole match."""


class _Writer:
    def __init__(self, *, dot_all: bool) -> None:
        self._any = "(?s:.)" if dot_all else r"[^\n]"

    def sequence(self, nodes: Iterable[Node]) -> _Part:
        parts = [self._part(kind, value) for kind, value in nodes]
        begun = ""
        for part in reversed(parts):
            if part.atom:
                begun = f"(?:{part.whole}{begun})?"
            else:
                begun = f"(?:{part.begun}|{part.whole}{begun})" if begun else part.begun
        return _Part("".join(part.whole for part in parts), begun)

    def _part(self, kind: Any, value: Any) -> _Part:
        if kind is op.LITERAL:
            return _atom(_character(value))
        if kind is op.NOT_LITERAL:
            return _atom(f"[^{_character(value)}]")
        if kind is op.ANY:
            return _atom(self._any)
        if kind is op.IN:
            return _atom(_set(value))
        if kind is op.AT and value in _BOUNDARIES:
            return _atom(_BOUNDARIES[value])
        if kind in (op.MAX_REPEAT, op.MIN_REPEAT):
            return self._repeat(*value)
        if kind is op.BRANCH:
            return _either([self.sequence(branch) for branch in value[1]])
        if kind is op.SUBPATTERN:
            return self._group(*value)
        what = _REFUSED.get(kind, "says where a text begins or ends")
        raise ValueError(f"a regular expression that can be matched while a text is being written; this one {what}")

    def _repeat(self, least: int, most: int, nodes: Iterable[Node]) -> _Part:
        if most is op.MAXREPEAT or most > MOST_REPEATS:
            raise ValueError(
                "a regular expression with a bound: instead of '*', '+' or '{2,}' write how often at most, for "
                f"example {{1,64}}, and at most {MOST_REPEATS}"
            )
        inner = self.sequence(nodes)
        if most == 0:
            return _Part("", "")
        again = f"(?:{inner.whole}){{0,{most - 1}}}" if most > 1 else ""
        return _Part(f"(?:{inner.whole}){{{least},{most}}}", f"{again}(?:{inner.begun})")

    def _group(self, number: Any, added: int, removed: int, nodes: Iterable[Node]) -> _Part:
        if (added | removed) & ~re.IGNORECASE:
            raise ValueError("a regular expression without flags of groups other than i")
        inner = self.sequence(nodes)
        flags = ("i" if added else "") + ("-i" if removed else "")
        return _Part(f"(?{flags}:{inner.whole})", f"(?{flags}:{inner.begun})")


def _atom(source: str) -> _Part:
    return _Part(source, f"(?:{source})?", atom=True)


def _either(parts: Sequence[_Part]) -> _Part:
    return _Part(f"(?:{'|'.join(part.whole for part in parts)})", f"(?:{'|'.join(part.begun for part in parts)})")


def _character(code: int) -> str:
    return f"\\x{{{code:x}}}"


def _set(items: Sequence[Node]) -> str:
    written = ""
    for kind, value in items:
        if kind is op.NEGATE:
            written += "^"
        elif kind is op.RANGE:
            written += f"{_character(value[0])}-{_character(value[1])}"
        else:
            written += _CLASSES[value] if kind is op.CATEGORY else _character(value)
    return f"[{written}]"
