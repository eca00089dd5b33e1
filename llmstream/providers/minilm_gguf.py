"""Writes all-MiniLM-L6-v2, as its authors published it, as a GGUF file that llama.cpp reads. 8 bits for each weight.

Run as ``python -m llmstream.providers.minilm_gguf SAFETENSORS VOCABULARY GGUF``, apart from the service: it takes a
moment, and numpy's memory. The same input gives the same bytes.
"""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import gguf

LAYERS, HEADS, WIDTH, FEED_FORWARD, CONTEXT = 6, 12, 384, 1536, 512
EPSILON = 1e-12
SPECIAL = {"unknown": 100, "cls": 101, "seperator": 102, "mask": 103, "padding": 0, "bos": 101, "eos": 102}
"""Ids of the tokens that stand for no text, under the names that the format gave them."""

_SAME = ("token_embd", "position_embd", "token_types", "token_embd_norm")
_EMBEDDINGS = ("word_embeddings", "position_embeddings", "token_type_embeddings", "LayerNorm")
_BLOCK = {
    "attention.self.query": "attn_q",
    "attention.self.key": "attn_k",
    "attention.self.value": "attn_v",
    "attention.output.dense": "attn_output",
    "attention.output.LayerNorm": "attn_output_norm",
    "intermediate.dense": "ffn_up",
    "output.dense": "ffn_down",
    "output.LayerNorm": "layer_output_norm",
}
_QUANTIZED = {"token_embd", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_up", "ffn_down"}


def write(weights: Path, vocabulary: Path, target: Path) -> None:
    """Writes the GGUF file. Raises ValueError, KeyError for weights that are not this model's."""
    import gguf

    writer = gguf.GGUFWriter(str(target), "bert")
    writer.add_name("all-MiniLM-L6-v2")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_block_count(LAYERS)
    writer.add_head_count(HEADS)
    writer.add_layer_norm_eps(EPSILON)
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType.MEAN)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    _add_vocabulary(writer, vocabulary.read_text("utf-8").splitlines())
    _add_tensors(writer, weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_vocabulary(writer: gguf.GGUFWriter, words: list[str]) -> None:
    """WordPiece marks what goes on inside a word; llama.cpp wants the beginnings marked instead."""
    import gguf

    special = [word.startswith("[") and word.endswith("]") and len(word) > 2 for word in words]
    beginning = "\u2581"
    tokens = [
        word if own else word.removeprefix("##") if word.startswith("##") else beginning + word
        for word, own in zip(words, special, strict=True)
    ]
    writer.add_tokenizer_model("bert")
    writer.add_token_list(tokens)
    writer.add_token_scores([-1000.0] * len(tokens))
    writer.add_token_types([gguf.TokenType.CONTROL if own else gguf.TokenType.NORMAL for own in special])
    writer.add_token_type_count(2)
    for name, number in SPECIAL.items():
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", number)


def _add_tensors(writer: gguf.GGUFWriter, weights: Path) -> None:
    import gguf
    import numpy as np

    data = weights.read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    header: dict[str, Any] = json.loads(data[8 : 8 + length])
    start = 8 + length
    for theirs, ours in _names():
        about = header[theirs]
        if about["dtype"] != "F32":
            raise ValueError(f"{theirs} is {about['dtype']}")
        first, last = about["data_offsets"]
        values = np.frombuffer(data[start + first : start + last], np.float32).reshape(about["shape"])
        name, _, part = ours.rpartition(".")
        if part == "weight" and name.rpartition(".")[2] in _QUANTIZED:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(ours, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(ours, values)


def _names() -> Iterator[tuple[str, str]]:
    """What each tensor is called there and here."""
    for theirs, ours in zip(_EMBEDDINGS, _SAME, strict=True):
        yield f"embeddings.{theirs}.weight", f"{ours}.weight"
    yield "embeddings.LayerNorm.bias", "token_embd_norm.bias"
    for layer in range(LAYERS):
        for theirs, ours in _BLOCK.items():
            for part in ("weight", "bias"):
                yield f"encoder.layer.{layer}.{theirs}.{part}", f"blk.{layer}.{ours}.{part}"


if __name__ == "__main__":
    write(*map(Path, sys.argv[1:4]))
