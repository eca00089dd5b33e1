"""Expressions and their beginnings, against another engine that knows partial matches."""

from __future__ import annotations

import pytest
import re2
import regex
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llmstream.patterns.expression import LONGEST, read
from llmstream.patterns.scanner import WINDOW, Pattern, Scanner

characters = st.sampled_from(["a", "b", "[ab]", "[^a]", r"\d", ".", "é", r"\.", "(?i:A)", "[a-c1]"])


def compound(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    bounds = st.tuples(st.integers(0, 2), st.integers(0, 2)).map(lambda pair: f"{{{pair[0]},{sum(pair)}}}")
    return st.one_of(
        st.lists(inner, min_size=1, max_size=3).map("".join),
        st.lists(inner, min_size=1, max_size=3).map(lambda each: f"(?:{'|'.join(each)})"),
        st.tuples(inner, bounds).map(lambda pair: f"(?:{pair[0]}){pair[1]}"),
        inner.map(lambda each: f"({each})?"),
    )


patterns = st.recursive(characters, compound, max_leaves=6).map(lambda source: f"(?:{source})a")
texts = st.text("ab1.éA \n", max_size=8)


@given(patterns, texts)
@settings(max_examples=400)
@example("(?:(?:ab|a){0,2}b)a", "aba")
@example(r"(?:\.é)a", ".")
def test_an_expression_and_its_beginning_match_what_they_should(source: str, text: str) -> None:
    """The written expression matches what the source matches; its beginning exactly what can still become a match."""
    expression, partial = read(source), regex.fullmatch(source, text, partial=True)
    assert (re2.fullmatch(expression.whole, text) is not None) == (partial is not None and not partial.partial)
    assert (re2.fullmatch(expression.begun, text) is not None) == (partial is not None)


@given(patterns, texts, st.data())
@settings(max_examples=300)
def test_what_may_become_a_match_is_held_and_nothing_else(source: str, text: str, data: st.DataObject) -> None:
    """A text is settled up to the first place from which it could go on as a match."""
    pattern = Pattern("x", source)
    found, settled = Scanner([pattern]).scan(text, over=False)
    begin = max((each.end for each in found), default=0)
    held = [at for at in range(begin, len(text)) if regex.fullmatch(source, text[at:], partial=True)]
    assert settled == min(held, default=max(len(text), begin))
    assert len(text) - settled <= pattern.expression.longest


def test_word_boundaries_look_at_both_sides() -> None:
    """``\\b`` sees the character before the place that is looked at, and waits for the one behind."""
    scanner = Scanner([Pattern("x", r"\bab{2,3}\b")])
    assert scanner.scan("xabb ", 1, over=False) == ([], 5)
    assert [each.start for each in scanner.scan("xabb abb ", 1, over=False)[0]] == [5]
    assert scanner.scan(" abb", 1, over=False) == ([], 1)
    assert len(scanner.scan(" abb", 1, over=True)[0]) == 1
    assert scanner.scan(" abbx", 1, over=False) == ([], 5)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("a+", "write how often at most"),
        ("a*b", "write how often at most"),
        ("a{2,}", "write how often at most"),
        (f"a{{1,{LONGEST + 1}}}", f"this one {LONGEST + 1}"),
        ("(a{1,40}){1,40}", "this one 1600"),
        ("a?", "does not match the empty text"),
        ("", "does not match the empty text"),
        ("(?=a)b", "looks ahead or behind"),
        ("(?<!a)b", "looks ahead or behind"),
        (r"(a)\1", "refers back"),
        ("^a", "where a text begins or ends"),
        (r"a\Z", "where a text begins or ends"),
        ("(?>a)b", "atomic"),
        ("(?m)a", "flags"),
        ("(", "cannot be read"),
        ("(" * 5000, "cannot be read"),
        (r"(?:(?:\b){1000}a){2}", "RE2 refuses"),
    ],
)
def test_what_cannot_be_looked_for_in_a_stream_is_refused(source: str, reason: str) -> None:
    """What has no bound, or needs more than the text so far, is refused with the reason."""
    with pytest.raises(ValueError, match=reason.replace("{", r"\{")):
        Pattern("x", source)


def test_long_texts_are_looked_at_in_parts() -> None:
    """Matches are found wherever they lie to the edges of the parts, and in time that grows with the text alone."""
    scanner = Scanner([Pattern("x", r"\bab{2,300}\b")])
    for offset in range(WINDOW - 310, WINDOW + 3, 3):
        text = "-" * offset + "a" + "b" * 300 + " ab"
        for over in (False, True):
            found, settled = scanner.scan(text, over=over)
            assert [(each.start, each.end) for each in found] == [(offset, offset + 301)]
            assert settled == (len(text) if over else len(text) - 2)
    assert scanner.scan("x" * WINDOW + "abb ") == ([], WINDOW + 4)
    found, _ = scanner.scan("abb " * 20_000)
    assert len(found) == 20_000


def test_no_expression_takes_long() -> None:
    """What makes backtracking engines take years is found, or not, at once."""
    scanner = Scanner([Pattern("x", r"(?:a|aa|a?a){1,100}b")])
    text = "a" * 20_000
    assert len(scanner.scan(text + "b")[0]) == 1
    assert scanner.scan(text) == ([], len(text))
