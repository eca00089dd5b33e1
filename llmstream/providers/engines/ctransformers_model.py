"""A model in the ctransformers library, behind checks for everything that crashes it."""

from __future__ import annotations

import ctypes
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmstream.providers.engines.base import EngineSpec
from llmstream.providers.engines.cores import available_cores
from llmstream.providers.engines.gguf_header import Header, read_header, read_version
from llmstream.providers.engines.text_request import Sampling

MODEL_TYPES = ("dolly-v2", "falcon", "gpt2", "gpt_bigcode", "gpt_neox", "gptj", "llama", "mpt", "replit", "starcoder")
MAX_CONTEXT = 8192
_GGML_MAGICS = (b"lmgg", b"fmgg", b"tjgg")
_SPECIAL_KINDS = (3, 4)  # control and user-defined tokens
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>")
_LOOK_BACK = 64

# The older tokenizers use std::regex, which recurses once per character and runs off the stack on long texts.
_CHUNKS = re.compile(r"(?s).{1,200}(?=\s|$)|.{1,200}")


class Model:
    """Loaded weights and the tokens they have seen. One thread at a time may call ``feed`` and ``sample``; the rest
    only reads and may run beside them."""

    def __init__(self, spec: EngineSpec) -> None:
        """Loads; blocks. Raises ValueError for a file the library cannot take, OSError without a build for here."""
        path = Path(spec.path)
        self.header = check_file(path, spec.model_type)
        self._llm = _load(path, spec, self.header)
        self.vocabulary: int = self._llm.vocab_size
        self.context = min(self._llm.context_length, spec.context or MAX_CONTEXT)
        self.slice = 32 if self.header else 8  # the older evaluators size their scratch memory for 8
        self._threads = spec.threads or available_cores()
        self.past: list[int] = []
        self._special = _special_tokens(self.header)
        self._split = re.compile("|".join(map(re.escape, sorted(self._special, key=len, reverse=True))) or "(?!)")
        self._ends = {self._special[text] for text in _TURN_ENDS if text in self._special}
        self.feed([0])  # the older evaluators measure their memory with the first, which must be small
        self.past.clear()

    @property
    def add_bos(self) -> bool:
        """Whether prompts begin with the beginning-of-sequence token."""
        return self._llm.model_type == "llama" and bool(self._metadata("tokenizer.ggml.add_bos_token", True))

    def text_of(self, key: str) -> str:
        """The text of the token that metadata ``tokenizer.ggml.{key}_token_id`` points to; empty without one."""
        token = self._metadata(f"tokenizer.ggml.{key}_token_id", -1)
        tokens = self._metadata("tokenizer.ggml.tokens", [])
        return tokens[token] if 0 <= token < len(tokens) else ""

    @property
    def template(self) -> str | None:
        return self._metadata("tokenizer.chat_template", None) or None

    def tokenize(self, text: str) -> list[int]:
        """Tokens of a prompt; control tokens written in it become themselves, a beginning is added once."""
        tokens: list[int] = []
        at = 0
        for match in self._split.finditer(text):
            tokens += [*self._plain(text[at : match.start()]), self._special[match[0]]]
            at = match.end()
        tokens += self._plain(text[at:])
        begin: int = self._llm.bos_token_id
        if self.add_bos and tokens[:1] != [begin] and 0 <= begin < self.vocabulary:
            tokens.insert(0, begin)
        return tokens

    def _plain(self, text: str) -> list[int]:
        # A C string ends at NUL, and half a surrogate pair has no UTF-8.
        text = text.replace("\0", "\ufffd").encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        chunks = [text] if self.header else _CHUNKS.findall(text)
        tokens: list[int] = []
        for chunk in filter(None, chunks):
            raw = chunk.encode()
            # The library writes up to one token per byte and some more, whatever room it is given.
            room = (ctypes.c_int * (len(raw) + 8))()
            count: int = self._llm.ctransformers_llm_tokenize(raw, False, room)
            tokens += room[:count]
        return tokens

    def check_tokens(self, tokens: Sequence[int]) -> None:
        """Raises ValueError for an id outside the vocabulary, which the library would follow out of its memory."""
        for token in tokens:
            if not 0 <= token < self.vocabulary:
                raise ValueError(f"token id {token} is outside the model's vocabulary of {self.vocabulary}")

    def rewind(self, tokens: Sequence[int]) -> Sequence[int]:
        """Forgets all but what ``tokens`` begin with; returns those still to feed, at least one."""
        common = 0
        while common < min(len(tokens) - 1, len(self.past)) and tokens[common] == self.past[common]:
            common += 1
        del self.past[common:]
        return tokens[common:]

    def feed(self, tokens: Sequence[int]) -> None:
        """Evaluates the next tokens, at most ``slice`` of them."""
        self.check_tokens(tokens)
        if len(self.past) + len(tokens) > self.context:
            raise ValueError(f"more than the {self.context} tokens of the context")
        array = (ctypes.c_int * len(tokens))(*tokens)
        if not self._llm.ctransformers_llm_batch_eval(array, len(array), len(self.past), len(array), self._threads):
            self.past.clear()
            raise RuntimeError("ctransformers failed to evaluate tokens")
        self.past.extend(tokens)

    def sample(self, sampling: Sampling, position: int) -> int:
        """Chooses the token behind what was fed; the same seed and position choose the same."""
        recent = self.past[-_LOOK_BACK:]
        greedy = sampling.temperature < 1e-3
        # Outside 1…vocabulary the older samplers leave their arrays.
        top_k = 1 if greedy else min(sampling.top_k if sampling.top_k > 0 else self.vocabulary, self.vocabulary)
        # The library starts its generator anew for each token: one seed for all would repeat one random number.
        seed = zlib.crc32(f"{sampling.seed} {position}".encode()) & 0x7FFFFFFF
        temperature = 1.0 if greedy else sampling.temperature
        token: int = self._llm.ctransformers_llm_sample(
            (ctypes.c_int * len(recent))(*recent),
            len(recent),
            top_k,
            sampling.top_p,
            temperature,
            sampling.repetition_penalty,
            seed,
        )
        return token

    def ends(self, token: int) -> bool:
        return token in self._ends or bool(self._llm.is_eos_token(token))

    def piece(self, token: int) -> bytes:
        """The bytes of a token, which need not be whole characters."""
        self.check_tokens([token])
        text: bytes = self._llm.ctransformers_llm_detokenize(token)
        return text

    def _metadata(self, key: str, default: Any) -> Any:
        return self.header.metadata.get(key, default) if self.header else default


def check_file(path: Path, model_type: str | None) -> Header | None:
    """Reads the header of a GGUF file, None for an older GGML file. Raises ValueError for what would crash."""
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    version = read_version(path)
    if version is None:
        with path.open("rb") as file:
            magic = file.read(4)
        if magic not in _GGML_MAGICS:
            raise ValueError(f"{path} is neither a GGUF nor a GGML file (it begins with {magic!r})")
        if model_type not in MODEL_TYPES:
            raise ValueError(
                f"{path} is a GGML file, which does not name its kind; set model_type to one of {MODEL_TYPES}"
            )
        return None
    if version not in (1, 2):
        raise _not_for_us(path, f"is GGUF version {version}, and ctransformers reads 1 and 2")
    header = read_header(path)
    kind, tokenizer = (header.metadata.get(key) for key in ("general.architecture", "tokenizer.ggml.model"))
    if kind != "llama":
        raise _not_for_us(path, f"holds a model of architecture {kind!r}, and ctransformers takes only llama")
    if tokenizer != "llama":
        raise _not_for_us(path, f"has a vocabulary of kind {tokenizer!r}, which crashes ctransformers")
    if "output.weight" not in header.tensors:
        raise _not_for_us(path, "has no tensor output.weight of its own")
    if header.newer_types:
        raise _not_for_us(path, "has tensors of a type newer than ctransformers")
    return header


def _not_for_us(path: Path, reason: str) -> ValueError:
    return ValueError(f"{path} {reason}; use engine llamacpp")


def _load(path: Path, spec: EngineSpec, header: Header | None) -> Any:
    from ctransformers.llm import LLM, Config

    own = header.metadata.get("llama.context_length", 2048) if header else 2048
    # Unless told, the library takes 512.
    config = Config(context_length=spec.context or min(own, MAX_CONTEXT), gpu_layers=spec.gpu_layers or 0)
    try:
        return LLM(str(path), "gguf" if header else spec.model_type, config=config)
    except RuntimeError as error:
        raise ValueError(
            f"ctransformers cannot load {path}; it may be damaged"
            + ("" if header else f" or not of model_type {spec.model_type!r}")
        ) from error


def _special_tokens(header: Header | None) -> dict[str, int]:
    if header is None:
        return {}
    texts = header.metadata.get("tokenizer.ggml.tokens", [])
    kinds = header.metadata.get("tokenizer.ggml.token_type", [])
    return {
        text: token
        for token, (text, kind) in enumerate(zip(texts, kinds, strict=False))
        if kind in _SPECIAL_KINDS and text
    }
