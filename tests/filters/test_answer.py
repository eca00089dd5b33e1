"""Answers in pieces: what is found does not depend on where they were cut, and nothing waits longer than it must."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmstream.config_filters import FilterSettings, PresidioSettings, redacted
from llmstream.filters.answer import AnswerFilter
from llmstream.filters.filters import Filters
from llmstream.filters.texts import Part, replaced
from llmstream.patterns.known import known
from llmstream.patterns.scanner import Scanner
from llmstream.transcript import Transcript
from llmstream.types import Delta, Event, EventId, GenerateRequest, Usage
from tests.patterns.test_known import FOUND

ALL: Any = {name: FilterSettings() for name in FOUND}
CODE = FilterSettings(pattern=r"\bEMP-[0-9]{4,6}\b")
PLANTED = [text for texts in FOUND.values() for text in texts]
NAMES = {"<EMAIL_1>": "bob@example.com", "<EMAIL_12>": "eve@example.org", "<QUOTE_1>": 'a "b"'}

words = st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "Zs", "S"]), max_size=12)
plain = st.sampled_from(
    ["Hello, ", " and then ", "\n", "see (", ") ", " – ", "🙂 ", "<b>", "x", " <EMAIL ", " 7 of 9 "]
)


def screen(names: dict[str, str] | None = None, **filters: FilterSettings) -> AnswerFilter:
    request = GenerateRequest(kind="chat", model="m", raw=GenerateRequest.of("chat", "m", {}).raw, names=names)
    found = Filters(filters, PresidioSettings()).outward(request)
    assert found is not None
    found.begin()
    return found


def pieces(text: str, cuts: Sequence[int]) -> list[str]:
    places = sorted({0, len(text), *(cut for cut in cuts if cut <= len(text))})
    return [text[start:end] for start, end in pairwise(places)]


def folded(deltas: Sequence[Delta], *, said: bool = False) -> Transcript:
    return Transcript([Event(EventId(1, at), delta) for at, delta in enumerate(deltas, 1)], said=said)


def run(found: AnswerFilter, texts: Sequence[str]) -> list[Delta]:
    ready = [each for text in texts for each in found.put([Delta(text)])]
    return ready + found.put([Delta(finish_reason="stop")])


@pytest.mark.parametrize("planted", [*PLANTED, "<EMAIL_12>"])
def test_a_match_is_found_wherever_it_is_cut(planted: str) -> None:
    """Cut at any place, at any two places, or into characters, an answer with a match comes out the same."""
    text = f"it is {planted}, as I said"
    whole = folded(run(screen(NAMES, **ALL), [text])).text
    assert planted not in whole
    cuts = [[first, second] for first in range(len(text)) for second in range(first, len(text), 5)]
    for places in (*cuts, range(len(text))):
        deltas = run(screen(NAMES, **ALL), pieces(text, list(places)))
        assert folded(deltas).text == whole


@given(st.lists(st.one_of(words, plain, st.sampled_from([*PLANTED, *NAMES])), max_size=8), st.data())
@settings(max_examples=200)
def test_what_comes_out_does_not_depend_on_the_pieces(parts: list[str], data: st.DataObject) -> None:
    """Whatever is said in whatever pieces, with or without token ids: the same comes out as of the whole text; what
    the model said can be read from the log up to the first redaction."""
    text = "".join(parts)
    whole = folded(run(screen(NAMES, **ALL), [text])).text
    cut = pieces(text, data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    numbered = data.draw(st.booleans())
    found = screen(NAMES, **ALL)
    given = [Delta(piece, tokens=(at,) if numbered else ()) for at, piece in enumerate(cut)]
    deltas = [each for delta in given for each in found.put([delta])]
    deltas += found.put([Delta(finish_reason="stop")])
    assert folded(deltas).text == whole
    faithful = folded(deltas, said=True)
    assert found.faithful == faithful.choices[0].continuable
    if found.faithful:
        assert faithful.text == text
        assert faithful.tokens == [each for delta in given for each in delta.tokens]


@given(st.lists(st.one_of(words, plain, st.sampled_from(PLANTED)), max_size=8), st.data())
@settings(max_examples=150)
def test_nothing_waits_without_need(parts: list[str], data: st.DataObject) -> None:
    """After every piece only what may still become a match is held back, with the white space before it. What has gone
    on is never taken back."""
    text = "".join(parts)
    scanner, found, shown, said = Scanner([known(name) for name in ALL]), screen(**ALL), "", ""
    for piece in pieces(text, data.draw(st.lists(st.integers(0, len(text)), max_size=12))):
        shown += folded(found.put([Delta(piece)])).text
        said += piece
        matches, settled = scanner.scan(said, over=False)
        parts_ = [Part(each.start, each.end, redacted(each.name), lost=True) for each in matches]
        expected = replaced(said, parts_, 0, settled)
        assert shown == expected or (expected.startswith(shown) and expected[len(shown) :].isspace())


def test_words_pass_at_once() -> None:
    """What cannot become a match does not wait; white space waits with the word behind it, as some APIs refuse to go on
    behind it."""
    found = screen(code=CODE)
    assert [
        folded(found.put([Delta(text)])).text for text in ("Hello", " there", " EM", "PTY", " now EMP-1", "23 ")
    ] == [
        "Hello",
        " there",
        "",
        " EMPTY",
        " now",
        " EMP-123 ",
    ]


def test_token_ids_stay_with_their_text() -> None:
    """A piece with token ids or probabilities goes on whole; what was redacted takes both along, what was restored
    keeps the ids, for going on with."""
    found = screen({"<EMAIL_1>": "bob@example.com"}, card=FilterSettings())
    said = [" ask", " <", "EMAIL", "_1>", " or", " 4111", "1111", "1111", "1111", " ok"]
    probabilities = {"content": [{"token": "x", "logprob": -0.1}]}
    deltas = [
        each for at, text in enumerate(said) for each in found.put([Delta(text, tokens=(at,), logprobs=probabilities)])
    ]
    deltas += found.put([Delta(finish_reason="stop", usage=Usage(3, 10))])
    shown = [(each.text, each.said, each.tokens) for each in deltas[:-1]]
    assert shown == [
        (" ask", None, (0,)),
        (" bob@example.com", " <EMAIL_1>", (1, 2, 3)),
        (" or", None, (4,)),
        (" [CARD]", "", ()),
        (" ok", None, (9,)),
    ]
    assert [len((each.logprobs or {}).get("content", ())) for each in deltas] == [1, 3, 1, 0, 1, 0]
    assert deltas[-1] == Delta(finish_reason="stop", usage=Usage(3, 10))


def test_choices_are_apart() -> None:
    """Choices that come in turns do not disturb each other, and each ends by itself."""
    found = screen(email=FilterSettings())
    deltas = []
    for one, two in (("bob@", "eve"), ("example", " is"), (".com", " here")):
        deltas += found.put([Delta(one, 0), Delta(two, 1)])
    assert folded(deltas).choices[1].text == "eve is"
    deltas += found.put([Delta(index=0, finish_reason="stop")])
    assert folded(deltas).choices[0].text == "[EMAIL]"
    deltas += found.put([Delta(index=1, finish_reason="stop")])
    assert folded(deltas).choices[1].text == "eve is here"


def call(arguments: str, index: int = 0, **more: Any) -> Delta:
    return Delta(fields={"tool_calls": [{"index": index, "function": {"arguments": arguments}, **more}]})


def test_calls_and_thoughts_are_looked_at_too() -> None:
    """Arguments of tools, thoughts and refusals are texts like others: cut anywhere, each by itself. What is put back
    into JSON stays JSON."""
    found = screen(NAMES, email=FilterSettings())
    deltas = found.put([Delta(fields={"role": "assistant"}), Delta(fields={"reasoning_content": "is it bo"})])
    deltas += found.put([Delta(fields={"reasoning_content": "b@x.org"}), Delta("Let me")])
    deltas += found.put(
        [call("", id="bob@x.org", type="function"), call('{"to": "<EMA'), call('IL_1>", "say": "<QUOTE')]
    )
    deltas += found.put([call('_1>", "cc": "al'), call('ice@x.org"}'), call('{"to": "carl@', 1), call('x.org"}', 1)])
    deltas += found.put([Delta(finish_reason="tool_calls")])
    choice = folded(deltas).choices[0]
    assert choice.message == {
        "role": "assistant",
        "content": "Let me",
        "reasoning_content": "is it [EMAIL]",
        "refusal": None,
        "tool_calls": [
            {
                "id": "bob@x.org",
                "type": "function",
                "function": {"arguments": '{"to": "bob@example.com", "say": "a \\"b\\"", "cc": "[EMAIL]"}'},
            },
            {"function": {"arguments": '{"to": "[EMAIL]"}'}},
        ],
    }


def test_what_waits_comes_before_what_follows() -> None:
    """Text that waits goes on before a call of a tool and before the end."""
    found = screen(email=FilterSettings())
    kinds = [found.put([Delta(text)]) for text in ("Let", " me")]
    assert [folded(each).text for each in kinds] == ["", "Let"]
    first, second = found.put([call("{")])
    assert (first.text, second.fields is not None) == (" me", True)
    found = screen(email=FilterSettings())
    found.put([Delta("so")])
    assert found.put([Delta(" it is", finish_reason="stop")]) == [
        Delta("so"),
        Delta(" it is"),
        Delta(finish_reason="stop"),
    ]


def test_an_answer_that_goes_on() -> None:
    """Behind what an earlier attempt logged, words begin and end where they did in one go."""
    going_on = screen(code=CODE)
    going_on.begin("xx")
    assert folded(run(going_on, ["EMP-1234 "])).text == "EMP-1234 "
    assert folded(run(screen(code=CODE), ["xx", "EMP-1234 "])).text == "xxEMP-1234 "
    going_on.begin("xx ")
    assert folded(run(going_on, ["EMP-1234 "])).text == "[CODE] "


def test_names_of_others_stay() -> None:
    """A placeholder that stands for nothing here stays as the model said it."""
    assert folded(run(screen(NAMES), ["<EMAIL_2> <EMAIL", "_1> <FOO_1>"])).text == "<EMAIL_2> bob@example.com <FOO_1>"
