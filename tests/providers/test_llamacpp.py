"""What llama.cpp generates, and how a cut answer goes on."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from llmstream.config import ModelSettings
from llmstream.errors import BadRequest
from llmstream.providers.engines.cores import available_cores, cgroup_quota
from llmstream.providers.engines.gate import Gate, Ticket
from llmstream.providers.engines.llama_chunks import ChoiceReader, TokenTrail, failure_of
from llmstream.providers.local import LocalProvider
from llmstream.types import Delta, Usage
from tests.providers.asking import chat, collect, completion, logged, text_of
from tests.tiny_gguf import TOOL_TEMPLATE, write_tiny_gguf


def counted(usage: Usage | None) -> tuple[int, int]:
    assert usage is not None
    return usage.prompt_tokens, usage.completion_tokens


@pytest.mark.parametrize("cut", [1, 2, 9, 25, 39])
async def test_a_continued_answer_equals_an_uninterrupted_one(provider: LocalProvider, cut: int) -> None:
    """Greedy text, its token ids and its usage are the same wherever the answer was cut."""
    request = chat(max_tokens=40)
    whole = await collect(provider, request)
    rest = await collect(provider, request, logged(whole[:cut]))
    assert text_of(whole[:cut]) + text_of(rest) == text_of(whole)
    assert logged([*whole[:cut], *rest]).tokens == logged(whole).tokens
    assert counted(rest[-1].usage) == counted(whole[-1].usage)
    assert rest[-1].finish_reason == whole[-1].finish_reason


async def test_an_answer_that_only_lacks_its_end_gets_it(provider: LocalProvider) -> None:
    """When every allowed token was logged, the continuation is the end and nothing else."""
    request = chat(max_tokens=10)
    whole = await collect(provider, request)
    rest = await collect(provider, request, logged(whole[:-1]))
    assert [delta.finish_reason for delta in rest] == ["length"]
    assert counted(rest[0].usage) == counted(whole[-1].usage)


async def test_an_answer_without_token_ids_is_continued_by_its_text(provider: LocalProvider) -> None:
    """Text that another engine logged, or ids that do not say the text, are tokenized again."""
    request = completion("hello", max_tokens=30)
    whole = await collect(provider, request)
    text = text_of(whole[:5])
    so_far = logged([Delta(text=text, tokens=(300, 301))])
    rest = await collect(provider, request, so_far)
    assert text + text_of(rest) == text_of(whole)


async def test_a_stop_string_ends_the_answer_before_it(provider: LocalProvider) -> None:
    """Nothing of a stop string is sent, not even while it might still become another word."""
    whole = text_of(await collect(provider, chat(max_tokens=40)))
    stop = whole[10:14]
    deltas = await collect(provider, chat(max_tokens=40, stop=["never", stop]))
    assert text_of(deltas) == whole[: whole.index(stop)]
    assert deltas[-1].finish_reason == "stop"


async def test_a_stop_string_across_a_cut_still_stops(provider: LocalProvider) -> None:
    """A cut at any token of an answer with a stop string leads to the same text."""
    whole = text_of(await collect(provider, chat(max_tokens=40)))
    request = chat(max_tokens=40, stop=[whole[10:14]])
    stopped = await collect(provider, request)
    for cut in range(1, len(stopped)):
        rest = await collect(provider, request, logged(stopped[:cut]))
        assert text_of(stopped[:cut]) + text_of(rest) == text_of(stopped)
        assert rest[-1].finish_reason == "stop"


async def test_text_held_back_for_a_stop_string_keeps_its_tokens(provider: LocalProvider) -> None:
    """When what looked like a stop string becomes another word, the ids come with the text."""
    plain = await collect(provider, chat(max_tokens=40))
    held = await collect(provider, chat(max_tokens=40, stop=[text_of(plain)[10:13] + "\u00b6"]))
    assert len(held) < len(plain)
    assert logged(held).tokens == logged(plain).tokens


async def test_choices_have_indexes_seeds_and_one_usage(provider: LocalProvider) -> None:
    """With ``n`` each choice has its own text and end, the usage counts all, and a seed repeats them."""
    request = chat(max_tokens=15, n=2, temperature=1, seed=7)
    deltas = await collect(provider, request)
    assert {delta.index for delta in deltas if delta.finish_reason} == {0, 1}
    assert text_of(deltas, 0) != text_of(deltas, 1)
    usages = [delta.usage for delta in deltas if delta.usage]
    assert len(usages) == 1
    assert usages[0].completion_tokens == 30
    again = await collect(provider, request)
    assert [text_of(again, index) for index in (0, 1)] == [text_of(deltas, index) for index in (0, 1)]


async def test_log_probabilities_have_the_shape_of_the_api(provider: LocalProvider) -> None:
    """Each token comes with its log probability, its bytes and as many alternatives as asked for."""
    deltas = await collect(provider, chat(max_tokens=5, logprobs=True, top_logprobs=3))
    entries = logged(deltas).choices[0].logprobs
    assert entries is not None
    assert "".join(entry["token"] for entry in entries["content"]) == text_of(deltas)
    for entry in entries["content"]:
        assert entry.keys() == {"token", "logprob", "bytes", "top_logprobs"}
        assert entry["logprob"] <= 0
        assert len(entry["top_logprobs"]) == 3
    bare = logged(await collect(provider, chat(max_tokens=2, logprobs=True))).choices[0].logprobs
    assert bare is not None
    assert bare["content"][0]["top_logprobs"] == []


@pytest.fixture
async def tool_provider(tmp_path: Path) -> AsyncIterator[LocalProvider]:
    """A model whose chat template knows tools."""
    weights = write_tiny_gguf(tmp_path / "tools.gguf", context=2048, chat_template=TOOL_TEMPLATE)
    provider = LocalProvider("tiny", ModelSettings(slots=1), weights)
    await provider.open()
    yield provider
    await provider.close()


async def test_a_schema_binds_the_answer(tool_provider: LocalProvider) -> None:
    """Whatever the model would rather say, the answer is JSON of the schema that was asked for."""
    verdict = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    schema = {**verdict, "additionalProperties": False}
    wanted = {"type": "json_schema", "json_schema": {"name": "verdict", "schema": schema}}
    request = chat(max_tokens=60, response_format=wanted)
    await tool_provider.check(request)
    assert json.loads(text_of(await collect(tool_provider, request))).keys() == {"ok"}


async def test_text_of_many_bytes_a_character_survives(tool_provider: LocalProvider) -> None:
    """Characters whose bytes are tokens of their own arrive whole."""
    words = "\u65e5\u672c \U0001f600 \u00e9"
    wanted = {"type": "json_schema", "json_schema": {"name": "words", "schema": {"const": words}}}
    deltas = await collect(tool_provider, chat(max_tokens=60, response_format=wanted))
    assert json.loads(text_of(deltas)) == words
    assert not any("\ufffd" in delta.text for delta in deltas)


async def test_a_schema_that_binds_nothing_is_refused(provider: LocalProvider) -> None:
    """A schema that cannot become a grammar is an error, not an answer without one."""
    broken = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "no such type"}}}
    with pytest.raises(BadRequest) as caught:
        await provider.check(chat(response_format=broken))
    assert caught.value.param == "response_format"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "light"}}])
async def test_a_tool_that_must_be_called_is_called(tool_provider: LocalProvider, choice: object) -> None:
    """A required tool call comes in the shape of the API, with arguments of the tool's schema."""
    parameters = {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"]}
    tool = {"type": "function", "function": {"name": "light", "parameters": parameters}}
    request = chat(tools=[tool], tool_choice=choice, max_tokens=300)
    await tool_provider.check(request)
    deltas = await collect(tool_provider, request)
    message = logged(deltas).choices[0].message
    (call,) = message["tool_calls"]
    assert call["function"]["name"] == "light"
    assert json.loads(call["function"]["arguments"]).keys() == {"on"}
    assert message["content"] is None
    assert deltas[-1].finish_reason == "tool_calls"
    assert not tool_provider.can_continue(request, logged(deltas[:-1]))


async def test_a_tool_that_may_be_called_need_not_be(tool_provider: LocalProvider) -> None:
    """With ``auto`` the model may answer in words, and with ``none`` it has to."""
    tool = {"type": "function", "function": {"name": "light"}}
    for choice in ("auto", "none"):
        deltas = await collect(tool_provider, chat(tools=[tool], tool_choice=choice, max_tokens=5))
        assert deltas[-1].finish_reason == "length"
        assert text_of(deltas)


async def test_a_banned_token_is_never_generated(provider: LocalProvider) -> None:
    """A bias of -100 keeps a token out."""
    first = (await collect(provider, chat(max_tokens=1)))[0].tokens[0]
    deltas = await collect(provider, chat(max_tokens=40, logit_bias={str(first): -100}))
    assert first not in logged(deltas).tokens


async def test_the_system_prompt_fills_in(tiny_gguf: Path) -> None:
    """The configured system message counts only for conversations without one."""
    provider = LocalProvider("tiny", ModelSettings(slots=1, system_prompt="be kind"), tiny_gguf)
    await provider.open()
    try:
        alone = counted((await collect(provider, chat("x", max_tokens=1)))[-1].usage)
        messages = [{"role": "developer", "content": "be kind"}, {"role": "user", "content": "x"}]
        given = counted((await collect(provider, chat(messages=messages, max_tokens=1)))[-1].usage)
    finally:
        await provider.close()
    assert alone == given


async def test_cancelling_in_the_prompt_frees_the_slot_soon(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A generation that still reads a prompt of thousands of tokens is stopped between two batches."""
    weights = write_tiny_gguf(tmp_path / "long.gguf", context=16384)
    provider = LocalProvider("tiny", ModelSettings(slots=1, context=16384), weights)
    await provider.open()
    try:
        reading = asyncio.create_task(collect(provider, completion([300 + at % 50 for at in range(16000)])))
        await provider.check(chat())
        reading.cancel()
        before = time.perf_counter()
        with pytest.raises(asyncio.CancelledError):
            await reading
        elapsed = time.perf_counter() - before
        after = await collect(provider, chat(max_tokens=1))
    finally:
        await provider.close()
    with capsys.disabled():
        print(f"cancelled in the prompt after {elapsed * 1000:.0f} ms")  # noqa: T201
    assert elapsed < 2
    assert after[-1].finish_reason == "length"


def test_ids_count_only_when_none_is_missing() -> None:
    """Tokens inside a character are not streamed, so the ids of that piece of text are not known."""
    trail = TokenTrail()
    assert trail.take("a", [5], generated=1) == (5,)
    assert trail.take("", [6], generated=2) == ()
    assert trail.take("bc", [7], generated=3) == (6, 7)
    assert trail.take("\U0001f600", [8], generated=6) is None
    assert trail.take("d", [9], generated=7) == (9,)


def test_missing_ids_come_from_the_tokenizer() -> None:
    """A character that took several tokens gets the ids the tokenizer gives for it."""
    reader = ChoiceReader(0, None, lambda text: tuple(text.encode()))
    chunk = {
        "choices": [{"text": "\u00e9", "logprobs": {"content": [{"id": 1, "bytes": [195, 169]}]}}],
        "timings": {"predicted_n": 2},
    }
    delta = reader.read(chunk)
    assert delta is not None
    assert delta.tokens == (195, 169)


@pytest.mark.parametrize(
    ("said", "status", "code"),
    [
        ({"error": {"code": 400, "type": "exceed_context_size_error", "message": "m"}}, 400, "context_length_exceeded"),
        ({"code": 400, "type": "invalid_request_error", "message": "m"}, 400, None),
        ({"error": {"code": 500, "type": "server_error", "message": "m"}}, 502, "engine_failed"),
        ("bad grammar", 400, None),
    ],
)
def test_errors_of_every_form_become_failures(said: object, status: int, code: str | None) -> None:
    """The library's error objects, chunks and texts all say whose fault it was."""
    failure = failure_of(said)
    assert (failure.status, failure.code) == (status, code)


def test_the_gate_lets_long_prompts_in_one_by_one() -> None:
    """Prompts that share a batch enter together, others wait, and a cancelled ticket waits no more."""
    gate, (first, second, third) = Gate(slots=3, batch=10), (Ticket(), Ticket(), Ticket())
    assert gate.enter(first, 4)
    assert gate.enter(second, 6)
    gate.cancel(third)
    assert not gate.enter(third, 1)
    gate.prefilled(first)
    gate.prefilled(second)
    assert gate.enter(Ticket(), 100)
    gate.leave(first)


def test_cores_follow_the_control_group(tmp_path: Path) -> None:
    """The smallest quota on the way up counts, in the new and the old layout."""
    membership = tmp_path / "cgroup"
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "cpu.max").write_text("150000 100000\n")
    (tmp_path / "a" / "b" / "cpu.max").write_text("max 100000\n")
    membership.write_text("0::/a/b\n")
    assert cgroup_quota(tmp_path, membership) == 1.5
    (tmp_path / "cpu" / "c").mkdir(parents=True)
    (tmp_path / "cpu" / "c" / "cpu.cfs_quota_us").write_text("50000\n")
    (tmp_path / "cpu" / "c" / "cpu.cfs_period_us").write_text("100000\n")
    membership.write_text("1:cpu,cpuacct:/c\n")
    assert cgroup_quota(tmp_path, membership) == 0.5
    assert cgroup_quota(tmp_path, tmp_path / "none") is None
    assert available_cores() >= 1
