from __future__ import annotations

import threading
from typing import Any

import pytest

from llmstream.config import PriceSettings
from llmstream.providers import tokens
from llmstream.providers.tokens import Tokenizer, answered, asked, estimated
from llmstream.scheduler.accounts import Accounts
from llmstream.types import Delta, GenerateRequest, Usage
from tests.providers.asking import logged

TABLE = {
    "far/m": PriceSettings(input=1, output=10, cached=0.25),
    "m": PriceSettings(input=2, output=20),
    "far/*": PriceSettings(input=4, output=40),
}


def counting() -> Tokenizer:
    """A tokenizer with its vocabulary."""
    return Tokenizer(exact=True)


@pytest.mark.parametrize(
    ("provider", "model", "usage", "cost"),
    [
        ("far", "m", Usage(1_000_000, 0), 1.0),
        ("far", "m", Usage(0, 1_000_000), 10.0),
        ("far", "m", Usage(1000, 100, {"prompt_tokens_details": {"cached_tokens": 400}}), 0.0017),
        ("far", "m", Usage(1000, 100, {"prompt_cache_hit_tokens": 400}), 0.0017),
        ("far", "m", Usage(10, 0, {"prompt_tokens_details": {"cached_tokens": 400}}), 0.0000025),
        ("far", "m", Usage(10, 0, {"prompt_tokens_details": {"cached_tokens": None}}), 0.00001),
        ("near", "m", Usage(1000, 100, {"prompt_tokens_details": {"cached_tokens": 400}}), 0.004),
        ("far", "other", Usage(1000, 100), 0.008),
        ("near", "other", Usage(1000, 100), None),
        ("far", "m", Usage(0, 0), 0.0),
    ],
)
def test_the_most_exact_price_counts(provider: str, model: str, usage: Usage, cost: float | None) -> None:
    """Provider and model together go before the model, that before the provider; cached tokens have their own price."""
    assert Accounts(TABLE, Tokenizer()).priced(usage, provider, model).cost == cost


def test_without_a_price_an_upstreams_own_cost_stays() -> None:
    """What an upstream says that it cost is passed on, and a price in the table goes before it."""
    usage = Usage(1_000_000, 0, {"cost": 0.5})
    assert Accounts({}, Tokenizer()).priced(usage, "far", "m") == usage
    assert Accounts(TABLE, Tokenizer()).priced(usage, "far", "m").cost == 1.0


def request(messages: Any, **body: Any) -> GenerateRequest:
    return GenerateRequest.of("chat", "m", {"model": "m", "messages": messages, **body})


async def test_tokens_are_counted_where_nobody_tells() -> None:
    """Prompt and answer are counted with the vocabulary, tool calls and reasoning too, and marked as estimated."""
    said = [
        Delta("Hello world"),
        Delta(fields={"reasoning_content": "because"}),
        Delta(fields={"tool_calls": [{"index": 0, "id": "call_1", "function": {"name": "f", "arguments": "{}"}}]}),
    ]
    usage = await Accounts({}, counting()).counted(
        request(
            [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
        ),
        logged(said),
    )
    assert usage == Usage(3 + 1 + 2 * 4, 2 + 1 + 2, {"estimated": True})


@pytest.mark.parametrize(
    ("text", "count"), [("", 0), ("a", 1), ("four", 1), ("hello", 2), ("日本語", 3), ("привет", 3)]
)
async def test_the_rule_of_thumb(monkeypatch: pytest.MonkeyPatch, text: str, count: int) -> None:
    """Without the package four bytes are a token, and nothing has to be loaded."""
    monkeypatch.setattr(tokens, "find_spec", lambda name: None)
    assert estimated(text) == count
    assert await (counting()).count([text]) == count


async def test_data_is_not_counted_as_text() -> None:
    """Images, audio and files of a message count nothing, however long their data is."""
    data = "x" * 10_000
    parts = [
        {"type": "image_url", "image_url": {"url": data}},
        {"type": "input_audio", "input_audio": {"data": data}},
        {"type": "file", "file": {"file_data": data}},
        {"type": "text", "text": "what is it"},
    ]
    assert asked(request([{"role": "user", "content": parts}])) == (["what is it"], 4)
    assert answered(logged([Delta("ok", fields={"audio": {"data": data}})])) == ["ok"]
    assert asked(GenerateRequest.of("completion", "m", {"prompt": ["a", "b"]})) == (["a", "b"], 0)


async def test_counting_is_done_beside_the_event_loop() -> None:
    """Texts are counted in another thread, in slices that let the event loop have its turn."""
    threads: list[int] = []
    lengths: list[int] = []

    class Encoding:
        def encode_ordinary(self, text: str) -> list[int]:
            threads.append(threading.get_ident())
            lengths.append(len(text))
            return [0] * len(text)

    tokenizer = Tokenizer()
    tokenizer._exact, tokenizer._encoding = True, Encoding()
    assert await tokenizer.count(["x" * 9000, "y"]) == 9001
    assert threading.get_ident() not in threads
    assert max(lengths) <= 4000
