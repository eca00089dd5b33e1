"""Writes a LLaMA GGUF of half a megabyte with random weights: a real model for real engines, without any sense."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

EMBEDDING, LAYERS, HEADS, FEED_FORWARD = 64, 2, 4, 128
UNKNOWN, BEGIN, END = 0, 1, 2
WORDS = ["\u2581", "\u2581the", "\u2581a", "\u2581of", "er", "in", "\u2581hello", "\u2581world"]
PRINTABLE = [chr(code) for code in range(33, 127)]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
TOOL_TEMPLATE = r"""
{%- if tools %}
    {{- '<|im_start|>system\nTools:' }}
    {%- for tool in tools %}
        {{- "\n" + (tool | tojson) }}
    {%- endfor %}
    {{- '\nCall with <tool_call>\n{"name": ..., "arguments": ...}\n</tool_call><|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role }}
    {%- if message.content %}
        {{- '\n' + message.content }}
    {%- endif %}
    {%- for call in message.tool_calls or [] %}
        {{- '\n<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
        {{- call.function.arguments | tojson }}
        {{- '}\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}"""


def write_tiny_gguf(path: Path, *, context: int = 512, seed: int = 0, chat_template: str = CHAT_TEMPLATE) -> Path:
    """Writes the model to ``path`` and returns it. The same seed gives the same bytes."""
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("tiny-random")
    writer.add_context_length(context)
    writer.add_embedding_length(EMBEDDING)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_rope_dimension_count(EMBEDDING // HEADS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_file_type(0)
    writer.add_chat_template(chat_template)
    _add_tensors(writer, _add_vocabulary(writer), np.random.default_rng(seed))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with path.open("r+b") as file:
        file.seek(4)
        file.write(b"\x02\0\0\0")  # ctransformers reads version 2 at most, whose layout is the same
    return path


def _add_vocabulary(writer: gguf.GGUFWriter) -> int:
    special = [b"<unk>", b"<s>", b"</s>"]
    single_bytes = [b"<0x%02X>" % byte for byte in range(256)]
    pieces = [piece.encode() for piece in WORDS + PRINTABLE]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(special + single_bytes + pieces)
    writer.add_token_scores([0.0] * (len(special) + 256) + [-float(rank) for rank in range(len(pieces))])
    kinds = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    writer.add_token_types([*kinds, *[gguf.TokenType.BYTE] * 256, *[gguf.TokenType.NORMAL] * len(pieces)])
    writer.add_unk_token_id(UNKNOWN)
    writer.add_bos_token_id(BEGIN)
    writer.add_eos_token_id(END)
    return len(special) + 256 + len(pieces)


def _add_tensors(writer: gguf.GGUFWriter, vocabulary: int, rng: np.random.Generator) -> None:
    def weights(*shape: int) -> npt.NDArray[np.float32]:
        return (rng.standard_normal(shape) * 0.3).astype(np.float32)

    ones = np.ones(EMBEDDING, np.float32)
    output = weights(vocabulary, EMBEDDING)
    output[: 3 + 256] *= 0.1  # readable pieces win over control tokens and loose bytes, so greedy text goes on for long
    writer.add_tensor("token_embd.weight", weights(vocabulary, EMBEDDING))
    writer.add_tensor("output_norm.weight", ones)
    writer.add_tensor("output.weight", output)
    for layer in range(LAYERS):
        prefix = f"blk.{layer}."
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"{prefix}{name}.weight", ones)
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            writer.add_tensor(f"{prefix}{name}.weight", weights(EMBEDDING, EMBEDDING))
        writer.add_tensor(f"{prefix}ffn_gate.weight", weights(FEED_FORWARD, EMBEDDING))
        writer.add_tensor(f"{prefix}ffn_up.weight", weights(FEED_FORWARD, EMBEDDING))
        writer.add_tensor(f"{prefix}ffn_down.weight", weights(EMBEDDING, FEED_FORWARD))
