from __future__ import annotations

import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmstream.providers.engines.base import EngineSpec, Generation
from llmstream.providers.engines.ctransformers import CTransformersEngine
from llmstream.providers.engines.ctransformers_model import Model
from llmstream.providers.engines.gguf_header import read_header
from llmstream.providers.engines.outflow import Outflow
from llmstream.providers.engines.text_request import Sampling
from llmstream.types import Delta, Failure, GenerateRequest, Usage
from tests.tiny_gguf import write_tiny_gguf

pytest.importorskip("ctransformers")

DEADLINE = 30
HELLO = [{"role": "user", "content": "hello world"}]


def chat(**body: Any) -> GenerateRequest:
    return GenerateRequest.of("chat", "tiny", {"messages": HELLO, "max_tokens": 24, "temperature": 0, **body})


def completion(prompt: object, **body: Any) -> GenerateRequest:
    return GenerateRequest.of("completion", "tiny", {"prompt": prompt, "max_tokens": 8, "temperature": 0, **body})


class Answer:
    """Collects what an engine emits for one generation."""

    def __init__(self, on_delta: Callable[[int], None] = lambda _: None) -> None:
        self.deltas: list[Delta] = []
        self.failure: Failure | None = None
        self.began, self._done, self._on_delta = threading.Event(), threading.Event(), on_delta

    def emit(self, id: int, deltas: list[Delta], failure: Failure | None, done: bool) -> None:  # noqa: A002
        assert not self._done.is_set()
        self.deltas += deltas
        self.failure = failure
        self.began.set()
        self._on_delta(id)
        if done:
            self._done.set()

    def wait(self) -> Answer:
        assert self._done.wait(DEADLINE)
        return self

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas)

    @property
    def tokens(self) -> list[int]:
        return [token for delta in self.deltas for token in delta.tokens]

    @property
    def finish_reason(self) -> str | None:
        return self.deltas[-1].finish_reason if self.deltas else None


def ask(engine: CTransformersEngine, request: GenerateRequest, text: str = "", tokens: tuple[int, ...] = ()) -> Answer:
    answer = Answer()
    engine.start(Generation(1, request, text, tokens), answer.emit)
    return answer.wait()


def spec(path: Path, **more: Any) -> EngineSpec:
    return EngineSpec("ctransformers", str(path), threads=1, **more)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[CTransformersEngine]:
    engine = CTransformersEngine()
    engine.load(spec(write_tiny_gguf(folder / "tiny.gguf")))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def long_engine(folder: Path) -> Iterator[CTransformersEngine]:
    """The same with room for 4000 tokens."""
    engine = CTransformersEngine()
    engine.load(spec(write_tiny_gguf(folder / "long.gguf", context=4000)))
    yield engine
    engine.close()


def test_the_context_is_what_was_asked_for(folder: Path) -> None:
    """The context comes from the file unless the settings name one, and there is one slot whatever was asked."""
    path = write_tiny_gguf(folder / "context.gguf", context=300)
    for asked, given_ in ((None, 300), (128, 128)):
        engine = CTransformersEngine()
        info = engine.load(spec(path, context=asked, slots=4))
        engine.close()
        assert (info.context, info.slots) == (given_, 1)


def test_an_answer_comes_token_by_token(engine: CTransformersEngine) -> None:
    """Every delta carries the ids behind its text, and the last one the reason and the usage."""
    answer = ask(engine, chat())
    assert answer.failure is None
    assert all(delta.tokens for delta in answer.deltas[:-1])
    assert len(answer.tokens) == 24
    assert answer.text
    assert answer.finish_reason == "length"
    assert answer.deltas[-1].usage == Usage(engine.prompt_tokens(chat()), 24)


@pytest.mark.parametrize("cut", [1, 2, 11, 23])
def test_a_continuation_is_the_rest_of_the_answer(engine: CTransformersEngine, cut: int) -> None:
    """Greedy output behind the logged tokens is what the uninterrupted answer had there, counted as one answer."""
    whole = ask(engine, chat())
    rest = ask(engine, chat(), "logged", tuple(whole.tokens[:cut]))
    assert rest.tokens == whole.tokens[cut:]
    assert rest.deltas[-1] == whole.deltas[-1]


def test_a_continuation_of_text_goes_on_behind_it(engine: CTransformersEngine) -> None:
    """Where the ids of the logged text are unknown the text is tokenized behind the prompt and counts."""
    answer = ask(engine, chat(max_tokens=30), "hello a world")
    assert 0 < len(answer.tokens) < 30
    assert answer.deltas[-1].usage == Usage(engine.prompt_tokens(chat()), 30)


def test_a_complete_answer_is_not_continued(engine: CTransformersEngine) -> None:
    """An answer that already has its tokens ends at once with the reason and the usage."""
    whole = ask(engine, chat())
    assert ask(engine, chat(), whole.text, tuple(whole.tokens)).deltas == whole.deltas[-1:]


def test_a_seed_repeats_an_answer(engine: CTransformersEngine) -> None:
    """The same seed gives the same answer, cut or not; another seed gives another."""
    request = chat(temperature=1.5, seed=7)
    first = ask(engine, request)
    assert ask(engine, request).tokens == first.tokens
    assert ask(engine, request, "", tuple(first.tokens[:9])).tokens == first.tokens[9:]
    assert ask(engine, chat(temperature=1.5, seed=8)).tokens != first.tokens


@pytest.mark.parametrize(
    "sampling",
    [{"top_k": -1}, {"top_k": 0}, {"top_k": 10**9}, {"top_p": 0}, {"temperature": 100, "repetition_penalty": 3}],
)
def test_extreme_sampling_is_safe(engine: CTransformersEngine, sampling: dict[str, float]) -> None:
    """Sampling values at the edge of their range give an answer."""
    answer = ask(engine, chat(**{"temperature": 1, **sampling}))
    assert answer.failure is None
    assert answer.finish_reason in {"stop", "length"}


def test_each_token_has_its_own_random_number(folder: Path) -> None:
    """With one seed the choice behind the same tokens differs by position, and is the same at the same position."""
    model = Model(spec(write_tiny_gguf(folder / "seeds.gguf")))
    model.feed([1, 265])
    sampling = Sampling(temperature=2.0, top_p=1.0, top_k=0, repetition_penalty=1.0, seed=1, stop=())
    chosen = [model.sample(sampling, position) for position in range(40)]
    assert len(set(chosen)) > 10
    assert [model.sample(sampling, position) for position in range(40)] == chosen


def test_a_repetition_penalty_changes_what_repeats(engine: CTransformersEngine) -> None:
    """A high repetition penalty leaves fewer repeated tokens in an answer."""
    plain, penalized = (ask(engine, chat(max_tokens=60, repetition_penalty=p)).tokens for p in (1.0, 50.0))
    assert len(set(penalized)) > len(set(plain))


def test_a_stop_string_over_several_tokens_ends_the_answer(engine: CTransformersEngine) -> None:
    """The answer ends before a stop string that no single token holds, and none of it was shown."""
    text = ask(engine, chat()).text
    stop = text[6:9]
    answer = ask(engine, chat(stop=["never", stop]))
    assert answer.text == text[: text.index(stop)]
    assert answer.finish_reason == "stop"


@pytest.mark.parametrize("text", ["🎉" * 2000, "a\0b", "", "é" * 3000])
def test_any_text_can_be_counted(engine: CTransformersEngine, text: str) -> None:
    """Emoji, NUL and nothing at all are tokenized within their memory."""
    assert engine.prompt_tokens(completion(text)) >= 1


def test_control_tokens_in_a_prompt_are_themselves(engine: CTransformersEngine) -> None:
    """A control token written in the prompt becomes its id, and a beginning is not added twice."""
    assert engine.prompt_tokens(completion("<s></s>")) == 2


def test_token_ids_are_a_prompt(engine: CTransformersEngine) -> None:
    """A text completion takes token ids as they are."""
    assert ask(engine, completion([1, 265, 266])).deltas[-1].usage == Usage(3, 8)


@pytest.mark.parametrize("token", [-1, 361, 2**31, 2**70])
def test_ids_outside_the_vocabulary_are_refused(engine: CTransformersEngine, token: int) -> None:
    """An id the model has not is refused in a prompt and in a continuation."""
    with pytest.raises(ValueError, match="outside the model's vocabulary of 361"):
        engine.prompt_tokens(completion([1, token]))
    with pytest.raises(ValueError, match="outside the model's vocabulary of 361"):
        engine.start(Generation(1, chat(), "x", (5, token)), Answer().emit)


def test_a_prompt_longer_than_the_context_is_refused(engine: CTransformersEngine) -> None:
    """A prompt that leaves no room is counted, and refused when started."""
    request = completion("hello " * 600)
    assert engine.prompt_tokens(request) > 512
    with pytest.raises(ValueError, match="must leave room for an answer in 512"):
        engine.start(Generation(1, request), Answer().emit)


def test_an_answer_ends_with_the_context(engine: CTransformersEngine) -> None:
    """Without a limit an answer ends when prompt and answer fill the context."""
    usage = ask(engine, chat(max_tokens=None)).deltas[-1].usage
    assert usage is not None
    assert usage.total_tokens == 512


def test_a_running_generation_is_cancelled(engine: CTransformersEngine) -> None:
    """Cancelling between two tokens ends the generation without a reason, and the engine is free for the next."""
    answer = Answer(engine.cancel)
    engine.start(Generation(5, chat(max_tokens=None)), answer.emit)
    assert len(answer.wait().tokens) == 1
    assert answer.finish_reason is None
    assert len(ask(engine, chat()).tokens) == 24


def test_a_prompt_is_cancelled_in_the_middle(long_engine: CTransformersEngine) -> None:
    """Cancelling while a long prompt is evaluated ends the generation at once, before it says anything."""
    begun = time.perf_counter()
    assert ask(long_engine, completion([265] * 3500, max_tokens=1)).finish_reason == "length"
    uncancelled = time.perf_counter() - begun
    answer = Answer()
    begun = time.perf_counter()
    long_engine.start(Generation(6, completion([266] * 3500)), answer.emit)
    long_engine.cancel(6)
    assert answer.wait().deltas == []
    assert time.perf_counter() - begun < uncancelled / 4


def test_a_waiting_generation_is_cancelled(long_engine: CTransformersEngine) -> None:
    """Generations wait for each other, and one cancelled while it waits never begins."""
    first, second, third = Answer(), Answer(), Answer()
    for id_, answer in enumerate((first, second, third)):
        long_engine.start(Generation(id_, chat(max_tokens=200)), answer.emit)
    long_engine.cancel(1)
    assert first.wait().tokens == third.wait().tokens
    assert second.wait().deltas == []


def test_counting_goes_on_beside_a_generation(long_engine: CTransformersEngine) -> None:
    """Prompts are counted on one thread while another generates, and neither disturbs the other."""
    alone = ask(long_engine, chat(max_tokens=300)).tokens
    answer = Answer()
    long_engine.start(Generation(8, chat(max_tokens=300)), answer.emit)
    assert answer.began.wait(DEADLINE)
    assert len({long_engine.prompt_tokens(completion("hello 🎉 " * 50)) for _ in range(100)}) == 1
    assert answer.wait().tokens == alone


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "function"}]),
        ("response_format", {"type": "json_object"}),
        ("logprobs", True),
        ("logit_bias", {"5": 1}),
        ("n", 2),
        ("presence_penalty", 0.5),
        ("temperature", "hot"),
        ("temperature", -1),
        ("top_p", 1.1),
        ("stop", 5),
        ("repetition_penalty", 0),
        ("messages", []),
        ("messages", [{"role": "tool", "content": "x"}]),
        ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(engine: CTransformersEngine, field: str, value: object) -> None:
    """A field that asks for more than text generation, or has a wrong value, is refused by its name."""
    with pytest.raises(ValueError, match=field) as refused:
        engine.prompt_tokens(chat(**{field: value}))
    assert getattr(refused.value, "param", None) == field


def test_neutral_fields_are_accepted(engine: CTransformersEngine) -> None:
    """Fields set to what they are anyway change nothing."""
    neutral = {"tools": [], "response_format": {"type": "text"}, "logprobs": False, "n": 1, "presence_penalty": 0.0}
    assert engine.prompt_tokens(chat(**neutral)) == engine.prompt_tokens(chat())


def test_the_files_template_is_used(folder: Path) -> None:
    """A conversation is what the file's chat template makes of it, with the system prompt first where there is none."""
    engine = CTransformersEngine()
    engine.load(spec(write_tiny_gguf(folder / "template.gguf"), system_prompt="be a hello"))
    parts = [{"role": "user", "content": [{"type": "text", "text": "hello"}, {"type": "text", "text": " world"}]}]
    rendered = completion("system: be a hello\nuser: hello world\nassistant:")
    assert engine.prompt_tokens(chat(messages=parts)) == engine.prompt_tokens(rendered)
    own = [{"role": "developer", "content": "x"}, *HELLO]
    rendered = completion("system: x\nuser: hello world\nassistant:")
    assert engine.prompt_tokens(chat(messages=own)) == engine.prompt_tokens(rendered)
    engine.close()


def write_header(
    path: Path, *, architecture: str = "llama", vocabulary: str = "llama", tensor: str = "output.weight"
) -> Path:
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_tokenizer_model(vocabulary)
    writer.add_array("odd.flags", [True, False])
    writer.add_tensor(tensor, np.ones((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with path.open("r+b") as file:
        file.seek(4)
        file.write(struct.pack("<I", 2))
    return path


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ({"vocabulary": "gpt2"}, "vocabulary of kind 'gpt2', which crashes.*use engine llamacpp"),
        ({"architecture": "qwen2"}, "architecture 'qwen2'.*use engine llamacpp"),
        ({"tensor": "token_embd.weight"}, r"no tensor output\.weight.*use engine llamacpp"),
    ],
)
def test_a_file_that_crashes_the_library_is_refused(tmp_path: Path, kind: dict[str, str], words: str) -> None:
    """A GGUF file of a kind the library cannot take is refused before the library sees it."""
    with pytest.raises(ValueError, match=words):
        CTransformersEngine().load(spec(write_header(tmp_path / "x.gguf", **kind)))


def test_a_newer_file_is_refused(tmp_path: Path) -> None:
    """A GGUF file of version 3 is refused with the engine that reads it."""
    path = write_tiny_gguf(tmp_path / "x.gguf")
    with path.open("r+b") as file:
        file.seek(4)
        file.write(struct.pack("<I", 3))
    with pytest.raises(ValueError, match=r"GGUF version 3.*use engine llamacpp"):
        CTransformersEngine().load(spec(path))


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    """A GGUF file that ends early, wherever that is, is called damaged instead of crashing the process."""
    content = write_tiny_gguf(tmp_path / "x.gguf").read_bytes()
    for size in (9, 24, 100, 5000, len(content) // 2, len(content) - 1):
        path = tmp_path / f"{size}.gguf"
        path.write_bytes(content[:size])
        with pytest.raises(ValueError, match="damaged or incomplete"):
            CTransformersEngine().load(spec(path))


def test_the_header_reader_agrees_with_gguf(folder: Path) -> None:
    """Metadata and tensors are read as the gguf package reads them."""
    path = write_tiny_gguf(folder / "header.gguf")
    header, reference = read_header(path), gguf.GGUFReader(path)
    assert header.tensors == {tensor.name: int(tensor.tensor_type) for tensor in reference.tensors}
    for key, value in header.metadata.items():
        assert reference.fields[key].contents() == value


@pytest.mark.parametrize(
    ("content", "model_type", "words"),
    [
        (b"", None, "neither a GGUF nor a GGML"),
        (b"PK\3\4 zip", "gpt2", "neither a GGUF nor a GGML"),
        (b"lmgg and more", None, "set model_type to one of"),
        (b"lmgg and more", "gpt5", "set model_type to one of"),
    ],
)
def test_what_is_no_model_is_refused(tmp_path: Path, content: bytes, model_type: str | None, words: str) -> None:
    """A file that is no model, or does not say which, is refused with what to do."""
    path = tmp_path / "x.bin"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=words):
        CTransformersEngine().load(spec(path, model_type=model_type))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    """A path that leads nowhere is named."""
    with pytest.raises(ValueError, match=r"there is no file .*none\.gguf"):
        CTransformersEngine().load(spec(tmp_path / "none.gguf"))


def write_gpt2_ggml(path: Path) -> Path:
    """Writes a GPT-2 of the older GGML format with random weights and one token for each byte."""
    rng, width, context, words = np.random.default_rng(0), 32, 256, [bytes([byte]) for byte in range(256)] + [b"hello"]
    outputs = {"attn/c_attn": 3 * width, "attn/c_proj": width, "mlp/c_fc": 4 * width, "mlp/c_proj": width}
    inputs = {"mlp/c_proj": 4 * width}
    layer: dict[str, tuple[int, ...]] = {f"{norm}/{part}": (width,) for norm in ("ln_1", "ln_2") for part in "gb"}
    layer |= {f"{name}/w": (size, inputs.get(name, width)) for name, size in outputs.items()}
    layer |= {f"{name}/b": (size,) for name, size in outputs.items()}
    shapes: dict[str, tuple[int, ...]] = {
        "model/ln_f/g": (width,),
        "model/ln_f/b": (width,),
        "model/wte": (len(words), width),
    }
    shapes["model/wpe"] = (context, width)
    shapes |= {f"model/h0/{name}": shape for name, shape in layer.items()}
    with path.open("wb") as file:
        file.write(b"lmgg" + struct.pack("<7i", len(words), context, width, 2, 1, 0, len(words)))
        for word in words:
            file.write(struct.pack("<i", len(word)) + word)
        for name, shape in shapes.items():
            file.write(struct.pack(f"<3i{len(shape)}i", len(shape), len(name), 0, *reversed(shape)) + name.encode())
            file.write((rng.standard_normal(shape) * 0.5).astype(np.float32).tobytes())
    return path


def test_an_older_ggml_file_answers(tmp_path: Path) -> None:
    """A GPT-2 GGML file streams an answer with the plain template, also at sampling values that broke the library."""
    engine = CTransformersEngine()
    info = engine.load(spec(write_gpt2_ggml(tmp_path / "gpt2.bin"), model_type="gpt2"))
    assert (info.context, info.details["chat_template"]) == (256, "plain")
    assert engine.prompt_tokens(chat(messages=HELLO)) == engine.prompt_tokens(
        completion("User: hello world\nAssistant:")
    )
    for sampling in ({"temperature": 0}, {"temperature": 1, "top_k": 0}, {"temperature": 1, "top_k": 10**6}):
        answer = ask(engine, chat(**sampling))
        assert answer.failure is None
        assert answer.finish_reason in {"stop", "length"}
    engine.close()


def test_a_long_word_does_not_overflow_the_stack(tmp_path: Path) -> None:
    """An older tokenizer, whose regular expressions recurse per character, survives 100,000 letters without a space."""
    path = write_gpt2_ggml(tmp_path / "gpt2.bin")
    script = (
        "import sys; from llmstream.providers.engines.base import EngineSpec;"
        "from llmstream.providers.engines.ctransformers_model import Model;"
        "model = Model(EngineSpec('ctransformers', sys.argv[1], model_type='gpt2', threads=1));"
        "print(len(model.tokenize('a' * 100_000)), model.tokenize('hello' * 3))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script, str(path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (ran.returncode, ran.stdout) == (0, "100000 [256, 256, 256]\n"), ran.stderr


@given(st.text("abé🎉"), st.lists(st.integers(1, 5)), st.lists(st.text("abé🎉", min_size=1), max_size=3))
def test_what_flows_out_is_the_text_before_the_first_stop(text: str, cuts: list[int], stops: list[str]) -> None:
    """However the bytes of a text are cut into tokens, its characters flow out up to the stop string that is whole
    first, and the tokens that flow out are the first ones in order."""
    data, pieces = text.encode(), list[bytes]()
    for cut in cuts:
        pieces.append(data[:cut])
        data = data[cut:]
    pieces.append(data)
    expected, stopped = text, False
    for count in range(1, len(pieces) + 1):
        so_far = b"".join(pieces[:count]).decode(errors="ignore")
        if found := [so_far.index(stop) for stop in stops if stop in so_far]:
            expected, stopped = so_far[: min(found)], True
            break
    outflow, shown = Outflow(stops), list[Delta]()
    for token, piece in enumerate(pieces):
        shown += filter(None, [outflow.add(token, piece)])
        if outflow.stopped:
            break
    else:
        shown += filter(None, [outflow.rest()])
    assert outflow.stopped == stopped
    assert "".join(delta.text for delta in shown) == expected
    tokens = [token for delta in shown for token in delta.tokens]
    assert tokens == list(range(len(tokens)))
    assert stopped or len(tokens) == len(pieces)


def test_half_a_character_never_flows_out() -> None:
    """Bytes of a character wait for the rest of it, and are dropped when the answer ends before it comes."""
    outflow = Outflow(())
    second, third, fourth = b"\xf0", b"\x9f\x8e", b"\x89"
    assert outflow.add(1, "é".encode()) == Delta(text="é", tokens=(1,))
    assert outflow.add(2, second) is None
    assert outflow.add(3, third) is None
    assert outflow.add(4, fourth) == Delta(text="🎉", tokens=(2, 3, 4))
    assert outflow.add(5, second) is None
    assert outflow.rest() == Delta(text="", tokens=(5,))


def test_bytes_that_are_no_text_flow_out_replaced() -> None:
    """Bytes that can never become a character are shown as U+FFFD at once."""
    assert Outflow(()).add(1, b"a\xff\x80b") == Delta(text="a\ufffd\ufffdb", tokens=(1,))
