"""A durable, streaming LLM gateway: every answer is logged before it is seen, and goes on after a crash.

    import llmstream

    async with llmstream.Server(llmstream.Settings()) as server:
        ...  # any OpenAI client at f"{server.url}/v1"

Importing the package starts nothing and loads neither aiohttp nor redis; the names below are loaded on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmstream.api.app import create_app
    from llmstream.config import Settings, load
    from llmstream.errors import LLMStreamError
    from llmstream.server import Server

__version__ = "0.1.0"
__all__ = ["LLMStreamError", "Server", "Settings", "create_app", "load"]

_HOME = {
    "LLMStreamError": "llmstream.errors",
    "Server": "llmstream.server",
    "Settings": "llmstream.config",
    "create_app": "llmstream.api.app",
    "load": "llmstream.config",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'llmstream' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
