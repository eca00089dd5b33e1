"""The mock upstream and the load generator: two C programs, so that they cost little beside what is measured."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import msgspec

from tests.bench.processes import Unavailable

HERE = Path(__file__).parent
PROMPT = "lorem ipsum dolor sit amet " * 8
STARTS_S = 5.0
COMPILES_S = 120
FAULTS = ("wrong_status", "wrong_content", "incomplete", "cut", "not_connected", "unfinished")


@dataclass(frozen=True)
class Tools:
    upstream: Path
    load: Path


def build(folder: Path) -> Tools:
    """Compiles what is missing or older than its source. Raises Unavailable without a C compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        raise Unavailable("there is no C compiler; install one (apt install gcc) so that 'cc' is on the PATH")
    folder.mkdir(parents=True, exist_ok=True)
    built = {}
    for name in ("upstream", "load"):
        source, binary = HERE / f"{name}.c", folder / name
        if not binary.exists() or binary.stat().st_mtime < source.stat().st_mtime:
            command = [compiler, "-O2", "-o", str(binary), str(source)]
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=COMPILES_S)
            if done.returncode:
                raise Unavailable(f"{compiler} cannot compile {source}: {done.stderr[-600:]}")
        built[name] = binary
    return Tools(**built)


class Percentiles(msgspec.Struct, frozen=True):
    """Milliseconds."""

    p50: float
    p90: float
    p99: float
    max: float


class Answers(msgspec.Struct, frozen=True):
    """What the load generator saw. Every answer is read token by token."""

    seconds: float
    begun: int
    ok: int
    tokens: int
    wrong_status: int
    wrong_content: int
    incomplete: int
    cut: int
    not_connected: int
    unfinished: int
    bad_status: int
    bad_answer: str
    first: Percentiles | None
    """From request to first token."""
    gap: Percentiles | None
    """Between two tokens of one answer."""
    total: Percentiles | None
    accepted: Percentiles | None
    """From request to 202."""

    @property
    def wrong(self) -> bool:
        """Whether any answer was not merely late."""
        return bool(self.wrong_status or self.wrong_content or self.incomplete or self.cut)

    @property
    def faults(self) -> str:
        """What was wrong, in words; empty when everything was right."""
        found = [f"{getattr(self, kind):,} {kind.replace('_', ' ')}" for kind in FAULTS if getattr(self, kind)]
        detail = f" (HTTP {self.bad_status}: {self.bad_answer[:120]})" if self.wrong_status else ""
        return f"of {self.begun:,} answers {', '.join(found)}{detail}" if found else ""


@dataclass(frozen=True)
class Load:
    """One run of the load generator."""

    tokens: int = 64
    delay_ms: int = 0
    clients: int = 1
    seconds: float = 2.0
    """How long new requests are begun."""
    drain_s: float = 20.0
    ramp_ms: int = 0
    requests: int | None = None
    shape: Literal["stream", "whole", "accepted"] = "stream"
    """A streamed completion, a whole one, or a job that is accepted first and read then."""
    once: bool = False
    """One request for each client."""
    read: str | None = None
    """An event stream to GET instead of posting."""
    first_ms: int | None = None
    body: dict[str, Any] = field(default_factory=dict)
    """Further members of the request."""

    def shortened(self, factor: float) -> Load:
        return self if self.once else replace(self, seconds=self.seconds * factor)

    @property
    def model(self) -> str:
        """The name that tells the mock upstream how to answer."""
        return f"mock-n{self.tokens}-d{self.delay_ms}" + ("" if self.first_ms is None else f"-t{self.first_ms}")

    def words(self) -> list[str]:
        words = [
            *("-e", self.tokens, "-c", self.clients, "-t", self.seconds, "-g", self.drain_s, "-r", self.ramp_ms),
            *(("-n", self.requests) if self.requests is not None else ()),
            *(("-k",) if self.once else ()),
        ]
        if self.read is not None:
            words += ["-G", self.read]
        else:
            words += ["-P", json.dumps(self._body())]
            words += {"stream": (), "whole": ("-w",), "accepted": ("-A", "-u", "/chat/async")}[self.shape]
        return [str(word) for word in words]

    def _body(self) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [
                {"role": "system", "content": "You are a helpful assistant."},
                {"role": "user", "content": PROMPT},
            ],
            "temperature": 0.7,
        }
        if self.shape == "stream":
            body["stream"] = True
        return {**body, **self.body}


@asynccontextmanager
async def generating(
    tools: Tools, load: Load, port: int, *, core: str, headers: Mapping[str, str]
) -> AsyncIterator[asyncio.Task[Answers]]:
    """A load that runs while the context is open, to its end or until it is told to stop by leaving.

    Raises Unavailable when the generator itself fails.
    """
    words = ["taskset", "-c", core, str(tools.load), "-p", str(port), *load.words()]
    for name, value in headers.items():
        words += ["-a", f"{name}: {value}"]
    process = await asyncio.create_subprocess_exec(*words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    answers = asyncio.create_task(_answers(process), name="load")
    limit = load.seconds + load.ramp_ms / 1000 + load.drain_s + STARTS_S
    try:
        async with asyncio.timeout(limit):
            yield answers
            if process.returncode is None:
                process.terminate()
            await answers
    finally:
        if process.returncode is None:
            process.kill()
        await asyncio.wait([answers])


async def _answers(process: asyncio.subprocess.Process) -> Answers:
    out, errors = await process.communicate()
    if process.returncode:
        raise Unavailable(f"the load generator failed: {errors.decode(errors='replace').strip()}")
    return msgspec.json.decode(out.decode(errors="replace"), type=Answers)
