"""A local model is a process of its own, and what happens to that process stays there."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmstream.config import ModelSettings
from llmstream.errors import BadRequest, ConfigError, ContextLengthExceeded, EngineCrashed, UpstreamRejected
from llmstream.providers import device
from llmstream.providers.local import LocalProvider
from llmstream.transcript import Transcript
from llmstream.types import Delta, GenerateRequest
from tests.providers.asking import batches, chat, collect, completion, logged, text_of
from tests.providers.conftest import TINY_CONTEXT
from tests.waiting import wait_until


def alive(pid: int) -> bool:
    """Whether a process runs; one that nobody has reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def kill(provider: LocalProvider) -> int:
    pid = provider.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    return pid


async def test_an_answer_ends_with_a_reason_and_the_usage(provider: LocalProvider) -> None:
    """The last delta says why the answer ended and how many tokens it took."""
    deltas = await collect(provider, chat(max_tokens=12))
    assert deltas[-1].finish_reason == "length"
    assert deltas[-1].usage is not None
    assert deltas[-1].usage.completion_tokens == 12
    assert sum(len(delta.tokens) for delta in deltas) == 12
    assert text_of(deltas)


async def test_a_killed_engine_fails_its_answers_and_comes_back(provider: LocalProvider) -> None:
    """SIGKILL of the engine is a retryable error for all running answers, and the next request waits for a new one."""
    running = [batches(provider, chat(f"question {number}")) for number in range(2)]
    for answer in running:
        await anext(answer)
    pid = kill(provider)
    for answer in running:
        with pytest.raises(EngineCrashed) as caught:
            async for _ in answer:
                pass
        assert caught.value.retryable
    assert (await collect(provider, chat(max_tokens=3)))[-1].finish_reason == "length"
    health = await provider.health()
    assert health["status"] == "ok"
    assert health["restarts"] == 1
    assert provider.pid != pid


async def test_health_tells_that_the_engine_restarts(provider: LocalProvider) -> None:
    """Between the end of a process and the loading of the next the status is ``restarting``."""
    seen: list[object] = []

    async def restarting() -> bool:
        seen.append((await provider.health())["status"])
        return "restarting" in seen

    kill(provider)
    await wait_until(restarting)
    await provider.check(chat())
    assert (await provider.health())["status"] == "ok"


async def test_a_check_under_way_when_the_engine_dies_fails_or_is_answered(provider: LocalProvider) -> None:
    """A check never hangs on a process that is gone."""
    checks = [asyncio.create_task(provider.check(chat("word " * 50))) for _ in range(20)]
    await asyncio.sleep(0)
    kill(provider)
    outcomes = await asyncio.wait_for(asyncio.gather(*checks, return_exceptions=True), 20)
    assert all(outcome is None or isinstance(outcome, EngineCrashed) for outcome in outcomes)


async def test_closing_an_answer_frees_its_slot(provider: LocalProvider) -> None:
    """After ``aclose`` of as many answers as there are slots, as many new ones can run at once."""
    abandoned = [batches(provider, chat(f"question {number}")) for number in range(2)]
    for answer in abandoned:
        await anext(answer)
    before = time.perf_counter()
    for answer in abandoned:
        await answer.aclose()
    assert time.perf_counter() - before < 2
    answers = await asyncio.gather(*(collect(provider, chat(f"again {number}", max_tokens=5)) for number in range(2)))
    assert [answer[-1].finish_reason for answer in answers] == ["length", "length"]


async def test_an_engine_that_hangs_is_replaced(provider: LocalProvider, monkeypatch: pytest.MonkeyPatch) -> None:
    """When a cancelled answer does not end in time, the engine is killed and a new one takes over."""
    monkeypatch.setattr(device, "CANCEL_DEADLINE_S", 0.2)
    answer = batches(provider, chat())
    await anext(answer)
    pid = provider.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    await asyncio.wait_for(answer.aclose(), 5)
    assert (await collect(provider, chat(max_tokens=2)))[-1].finish_reason == "length"
    assert provider.pid != pid


async def test_a_cancelled_task_waits_for_its_slot_to_be_free(provider: LocalProvider) -> None:
    """Cancelling the task that reads an answer stops the model before the task ends."""
    started = asyncio.Event()

    async def read() -> None:
        async for _ in batches(provider, chat()):
            started.set()

    reader = asyncio.create_task(read())
    await started.wait()
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    assert (await collect(provider, chat(max_tokens=2)))[-1].finish_reason == "length"


async def test_more_answers_than_slots_wait_and_can_be_cancelled_there(provider: LocalProvider) -> None:
    """An answer that waits for a slot is cancelled at once, while the others go on."""
    running = [batches(provider, chat(f"question {number}")) for number in range(2)]
    for answer in running:
        await anext(answer)
    waiting = asyncio.create_task(collect(provider, chat("a third")))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(waiting, 5)
    for answer in running:
        await answer.aclose()


async def test_two_streams_do_not_mix(provider: LocalProvider) -> None:
    """Two answers at once are the same as one after the other."""
    requests = [chat("hello", max_tokens=40), chat("world", max_tokens=40)]
    alone = [text_of(await collect(provider, request)) for request in requests]
    together = await asyncio.gather(*(collect(provider, request) for request in requests))
    assert [text_of(answer) for answer in together] == alone


async def test_a_prompt_too_long_is_refused_with_the_number_of_tokens(provider: LocalProvider) -> None:
    """The error of an overlong prompt says by how many tokens, exactly, and what to shorten."""
    fitting = completion([300] * (TINY_CONTEXT - 1))
    await provider.check(fitting)
    assert (await collect(provider, fitting))[-1].finish_reason == "length"
    with pytest.raises(ContextLengthExceeded, match="by 8 tokens") as caught:
        await provider.check(completion([300] * (TINY_CONTEXT + 7)))
    assert caught.value.param == "prompt"
    with pytest.raises(ContextLengthExceeded, match="by 10 tokens"):
        await provider.check(completion([300] * 500, max_tokens=22))
    with pytest.raises(ContextLengthExceeded) as caught:
        await provider.check(chat("word " * 400))
    assert caught.value.param == "messages"


async def test_an_answer_without_a_limit_ends_where_the_context_does(provider: LocalProvider) -> None:
    """Prompt and answer together fill the context, and the reason is ``length``."""
    last = (await collect(provider, completion([300] * 500)))[-1]
    assert last.finish_reason == "length"
    assert last.usage is not None
    assert last.usage.total_tokens == TINY_CONTEXT


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", "hot"),
        ("temperature", 3),
        ("top_p", -1),
        ("seed", 1.5),
        ("stop", [""]),
        ("stop", ["a"] * 17),
        ("frequency_penalty", 5),
        ("logit_bias", {"hello": 1}),
        ("logit_bias", {"5": 1000}),
        ("logprobs", "yes"),
        ("top_logprobs", 3),
        ("response_format", {"type": "xml"}),
        ("response_format", {"type": "json_schema"}),
        ("max_tokens", 0),
        ("max_completion_tokens", True),
        ("n", 0),
        ("n", 3),
        ("tools", [{"type": "function", "function": {"name": "look"}}]),
        ("tool_choice", "required"),
        ("modalities", ["text", "audio"]),
        ("audio", {"voice": "alloy"}),
        ("reasoning_effort", "high"),
        ("web_search_options", {}),
        ("temprature", 1),
    ],
)
async def test_a_field_that_cannot_be_honoured_is_named(provider: LocalProvider, field: str, value: Any) -> None:
    """Wrong, unknown and impossible fields are refused with the name of the field."""
    with pytest.raises(BadRequest) as caught:
        await provider.check(chat(**{field: value}))
    assert caught.value.param == field


async def test_parts_that_are_not_text_are_refused(provider: LocalProvider) -> None:
    """An image in a message is a clear error, not silence."""
    image = {"type": "image_url", "image_url": {"url": "https://example.com/cat.png"}}
    request = GenerateRequest.of("chat", "tiny", {"messages": [{"role": "user", "content": [image]}]})
    with pytest.raises(BadRequest, match="not text") as caught:
        await provider.check(request)
    assert caught.value.param == "messages[0].content[0]"


async def test_fields_that_tune_a_hosted_service_are_without_effect(provider: LocalProvider) -> None:
    """What only matters to a hosted service is accepted."""
    await provider.check(
        chat(
            service_tier="flex", prompt_cache_key="k", safety_identifier="s", user="u", metadata={"a": "b"}, store=True,
            stream=True, stream_options={"include_usage": True}, parallel_tool_calls=True, n=1, seed=None,
            modalities=["text"], response_format={"type": "text"}, tools=None, logit_bias={"5": -100}, stop="x",
        )
    )  # fmt: skip


def test_what_no_json_can_hold_is_no_request() -> None:
    """A lone surrogate or an infinite number is the caller's mistake, found when the request is made."""
    for body in ({"messages": "\ud800"}, {"seed": float("inf")}):
        with pytest.raises(ValueError, match=r"surrogates|JSON compliant"):
            GenerateRequest.of("chat", "m", body)


async def test_a_refused_request_is_not_the_engines_fault(provider: LocalProvider) -> None:
    """A prompt that was never checked and does not fit fails for good, without a retry."""
    with pytest.raises(UpstreamRejected) as caught:
        await collect(provider, completion([300] * 600))
    assert not caught.value.retryable


async def test_a_file_that_is_no_model_says_so(tmp_path: Path) -> None:
    """Weights that cannot be loaded are a configuration error with the engine's own words, and nothing stays behind."""
    weights = tmp_path / "broken.gguf"
    weights.write_bytes(b"GGUF" + bytes(100))
    provider = LocalProvider("broken", ModelSettings(), weights)
    with pytest.raises(ConfigError, match=r"broken\.gguf"):
        await provider.open()
    assert provider.pid is None
    await provider.close()


async def test_closing_ends_the_process(tiny_gguf: Path) -> None:
    """``close`` leaves no process, may come twice, and without ``open``."""
    provider = LocalProvider("tiny", ModelSettings(slots=1), tiny_gguf)
    await provider.close()
    provider = LocalProvider("tiny", ModelSettings(slots=1), tiny_gguf)
    await provider.open()
    pid = provider.pid
    assert pid is not None
    assert alive(pid)
    await provider.close()
    await provider.close()
    assert not alive(pid)
    with pytest.raises(EngineCrashed):
        await provider.check(chat())


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A folder whose sockets have names that the system takes: 107 bytes at most."""
    with tempfile.TemporaryDirectory(prefix="t") as folder:
        yield Path(folder)


PARENT = """
import asyncio, pathlib, sys
from llmstream.config import ModelSettings
from llmstream.providers import device
from llmstream.providers.local import LocalProvider
async def main():
    provider = LocalProvider("tiny", ModelSettings(slots=1), pathlib.Path(sys.argv[1]))
    await provider.open()
    print(provider.pid, flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""


async def test_the_engine_dies_with_the_service(tiny_gguf: Path, short_path: Path) -> None:
    """SIGKILL of the service leaves no engine behind."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "TMPDIR": str(short_path)}
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", PARENT, str(tiny_gguf), stdout=subprocess.PIPE, env=environment
    )
    assert parent.stdout is not None
    pid = int(await asyncio.wait_for(parent.stdout.readline(), 30))
    assert alive(pid)
    parent.kill()
    await parent.wait()
    await wait_until(lambda: not alive(pid))


async def test_ctrl_c_does_not_reach_the_engine(provider: LocalProvider) -> None:
    """SIGINT, which a terminal sends to the whole group, leaves the engine at work."""
    assert provider.pid is not None
    os.kill(provider.pid, signal.SIGINT)
    await provider.check(chat())
    assert (await provider.health())["restarts"] == 0


def test_only_plain_text_of_one_choice_is_continued(tiny_gguf: Path) -> None:
    """A grammar, tools or several choices have state that the log does not hold."""
    provider = LocalProvider("tiny", ModelSettings(), tiny_gguf)
    so_far = logged([Delta(text="a", tokens=(300,))])
    assert provider.can_continue(chat(), so_far)
    assert provider.can_continue(chat(response_format={"type": "text"}), so_far)
    assert not provider.can_continue(chat(response_format={"type": "json_object"}), so_far)
    assert not provider.can_continue(chat(tools=[{"type": "function", "function": {"name": "look"}}]), so_far)
    assert not provider.can_continue(chat(n=2), so_far)
    assert not provider.can_continue(chat(), Transcript())
