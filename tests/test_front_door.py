"""What one gets by ``import llmstream``."""

from __future__ import annotations

import subprocess
import sys

import llmstream

HEAVY = ("aiohttp", "redis", "openai", "pydantic", "uvloop", "xllamacpp", "ctransformers", "rich", "aio_pika")


def test_every_public_name_is_there() -> None:
    """The names in ``__all__`` are sorted, complete and can be had."""
    assert llmstream.__all__ == sorted(llmstream.__all__)
    assert all(getattr(llmstream, name) for name in llmstream.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    """A misspelt name fails the way Python users expect."""
    assert not hasattr(llmstream, "Sever")


def test_importing_loads_and_starts_nothing() -> None:
    """Importing the package loads no heavy library, starts no thread and prints nothing."""
    script = f"""
        import sys, threading
        import llmstream
        loaded = [name for name in {HEAVY!r} if name in sys.modules]
        assert not loaded, loaded
        assert threading.active_count() == 1
    """
    lines = "\n".join(line.strip() for line in script.splitlines())
    ran = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, timeout=60, check=False)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


def test_rabbitmq_is_loaded_only_where_it_is_used() -> None:
    """A server that does without RabbitMQ imports nothing of it."""
    unused = {"aio_pika", "llmstream.broker.rabbitmq", "llmstream.broker.inbox", "llmstream.broker.core"}
    script = f"import sys, llmstream.server, llmstream.cli\nassert not {unused} & sys.modules.keys()"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")
