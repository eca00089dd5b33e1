"""How llama.cpp is set up for one model on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from msgspec.structs import replace

from llmstream.providers.engines.base import EngineSpec
from llmstream.providers.engines.cores import available_cores
from llmstream.providers.engines.gguf_header import read_header, read_version

LARGEST_CONTEXT = 8192
"""What a slot gets when nothing is configured and the model could do more."""
SMALLEST_BATCH, LARGEST_BATCH = 8, 512
BYTES_TIMES_TOKENS = 500_000_000
"""Weights in bytes, times tokens, that one core works through in about 0.1 s; measured on a 2.5 GHz Xeon."""


def make_parameters(xllamacpp: Any, spec: EngineSpec, socket_path: str) -> Any:
    threads = spec.threads or available_cores()
    context = spec.context or min(trained_context(Path(spec.path)), LARGEST_CONTEXT)
    parameters = xllamacpp.CommonParams()
    parameters.model.path = spec.path
    parameters.n_parallel = spec.slots
    parameters.n_ctx = context * spec.slots
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
    # A cancellation is seen between two batches, and while one runs the other generations wait. The slots that
    # generate take one place each.
    batch = BYTES_TIMES_TOKENS * threads // max(1, Path(spec.path).stat().st_size)
    kinds = {device["type"].name for device in xllamacpp.get_device_info()}
    if spec.gpu_layers != 0 and any("GPU" in kind for kind in kinds):
        batch = LARGEST_BATCH
    batch = min(max(batch, SMALLEST_BATCH), LARGEST_BATCH)
    parameters.n_batch = parameters.n_ubatch = batch + spec.slots - 1
    if spec.gpu_layers is not None:
        parameters.n_gpu_layers = spec.gpu_layers
    parameters.cache_ram_mib = 0
    parameters.hostnames = [socket_path]  # otherwise it listens on a TCP port, without a key
    parameters.n_threads_http = 2
    parameters.ui = False
    parameters.embedding = False
    parameters.use_jinja = True
    parameters.verbosity = 1
    return parameters


def make_embedding_parameters(xllamacpp: Any, spec: EngineSpec, socket_path: str) -> Any:
    """Like :func:`make_parameters`, for a model that turns each input into one vector."""
    # Such models have no positions behind those they were trained on.
    context = min(spec.context or LARGEST_CONTEXT, trained_context(Path(spec.path)))
    parameters = make_parameters(xllamacpp, replace(spec, context=context), socket_path)
    # An input is read in one go: each of its tokens sees all the others.
    parameters.n_batch = parameters.n_ubatch = parameters.n_ctx // spec.slots
    parameters.embedding = True
    return parameters


def pools(path: Path) -> bool:
    """Whether a GGUF file holds a model that makes embeddings, and says how. Raises ValueError for a damaged one."""
    if read_version(path) is None:
        return False
    metadata = read_header(path).metadata
    return bool(metadata.get(f"{metadata.get('general.architecture')}.pooling_type"))


def trained_context(path: Path) -> int:
    """The context the model says it was trained for."""
    metadata = read_header(path).metadata
    length = metadata.get(f"{metadata.get('general.architecture')}.context_length")
    return length if isinstance(length, int) and length > 0 else LARGEST_CONTEXT
