"""``chat``: one question, the answer on standard output as it comes."""

from __future__ import annotations

import argparse
import asyncio
import secrets
import shlex
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

from pydantic import SecretStr

from llmstream.commands.answer import Answer, Ending, Unfinished
from llmstream.commands.options import program, read_settings, repeated
from llmstream.commands.running import run as run_to_end
from llmstream.commands.service import Service, Unreachable, open_finder
from llmstream.commands.terminal import Output, say
from llmstream.commands.timings import Timings
from llmstream.config import Settings
from llmstream.config_security import KeySettings
from llmstream.errors import ConfigError, LLMStreamError
from llmstream.telemetry import setup_logging
from llmstream.types import LOCAL, EventId

OPTIONS = ("model", "max_tokens", "temperature", "priority")


class Host(NamedTuple):
    """The server that answers, and how to find it again."""

    service: Service
    find: Callable[[], Awaitable[Service | None]]
    embedded: bool


def run(args: argparse.Namespace) -> int:
    if args.resume is not None and args.question is not None:
        raise ConfigError("Give a question or --resume ID, not both.")
    if args.after is not None and args.resume is None:
        raise ConfigError("--after needs --resume ID.")
    settings = read_settings(args)
    body = None if args.resume is not None else request_body(args, _question(args.question))
    return run_to_end(lambda: Chat(args, settings).run(body))


def request_body(args: argparse.Namespace, question: str) -> dict[str, Any]:
    """The body of ``POST /chat/async``."""
    given = {name: value for name in OPTIONS if (value := getattr(args, name)) is not None}
    if args.system is None:
        return {"message": question, **given}
    messages = [{"role": "system", "content": args.system}, {"role": "user", "content": question}]
    return {"messages": messages, **given}


def _question(given: str | None) -> str:
    question = sys.stdin.read() if given == "-" else given
    if question is None:
        raise ConfigError('Ask something: chat "…", or - to read the question from standard input, or --resume ID.')
    if not question.strip():
        raise ConfigError("The question is empty.")
    return question


class Chat:
    """One run of the command."""

    def __init__(self, args: argparse.Namespace, settings: Settings) -> None:
        self._args = args
        self._settings = settings
        self._output = Output()
        self._answer: Answer | None = None
        self._embedded = False

    async def run(self, body: dict[str, Any] | None) -> int:
        """Asks, or takes a job up again without a body. Raises LLMStreamError when the job failed."""
        try:
            async with find_or_embed(self._settings, self._args) as host:
                self._embedded = host.embedded
                self._answer = await (self._ask(host, body) if body is not None else self._resume(host))
                ending = await self._answer.read()
        except (asyncio.CancelledError, Unfinished):
            self._output.end_line()
            self._tell_how_to_resume()
            raise
        self._output.end_line()
        return self._conclude(self._answer, ending)

    async def _ask(self, host: Host, body: dict[str, Any]) -> Answer:
        timings = Timings()
        accepted = await host.service.post("/chat/async", body)
        return Answer(
            host.service,
            host.find,
            self._output,
            job_id=accepted["task_id"],
            session_id=accepted["session_id"],
            timings=timings,
        )

    async def _resume(self, host: Host) -> Answer:
        job = await host.service.get(f"/chat/{self._args.resume}")
        answer = self._answer = Answer(
            host.service,
            host.find,
            self._output,
            job_id=job["task_id"],
            session_id=job["session_id"] or job["task_id"],
            after=self._args.after,
        )
        if self._args.after is None:
            # The server's text leaves out what a restart made void, which the log's events still show.
            await answer.replay(job["text"], EventId.parse(job["last_event_id"]))
        return answer

    def _conclude(self, answer: Answer, ending: Ending) -> int:
        if self._args.timings:
            say(str(answer.timings))
        if ending.status == "failed":
            raise LLMStreamError(ending.message or "The job failed.")
        if ending.status == "cancelled":
            raise LLMStreamError("The job was cancelled; this is all it had produced.")
        if ending.reason == "length":
            say("The answer is cut: it reached the limit of tokens.")
        return 0

    def _tell_how_to_resume(self) -> None:
        answer = self._answer
        if answer is None:
            return
        words = [*shlex.split(program()), "chat", "--resume", answer.job_id]
        if answer.position is not None:
            words += ["--after", str(answer.position)]
        goes_on = "is kept and goes on when a server runs" if self._embedded else "goes on"
        say(f"Job {answer.job_id} {goes_on}. Read the rest (without --after: everything) with:")
        say(f"  {shlex.join([*words, *repeated(self._args)])}")


@asynccontextmanager
async def find_or_embed(settings: Settings, args: argparse.Namespace) -> AsyncIterator[Host]:
    """The running server, or one inside this process for as long as the context is open."""
    async with open_finder(settings, args.url) as finder:
        service = await finder.find()
        if service is not None:
            yield Host(service, finder.find, embedded=False)
            return
        if finder.given is not None:
            raise Unreachable(f"No llmstream server answers at {finder.given}.")
        from llmstream.commands.progress import Bars
        from llmstream.server import Server

        setup_logging(settings.logging if args.debug else settings.logging.model_copy(update={"level": "ERROR"}))
        say("No server is running; this process answers itself.")
        with Bars() as bars:
            key = secrets.token_urlsafe(32)
            async with Server(_private(settings, key), progress=bars) as server:
                service = finder.at(server.url, key)

                async def same() -> Service:
                    return service

                yield Host(service, same, embedded=True)


def _private(settings: Settings, key: str) -> Settings:
    """Settings for a server of our own: any free port, nobody else's keys, and no waiting for jobs when we leave."""
    server = settings.server.model_copy(update={"host": "127.0.0.1", "port": 0, "shutdown_grace_s": 0.0})
    keys = {LOCAL: KeySettings(value=SecretStr(key), scopes=["admin"])}
    return settings.model_copy(update={"server": server, "keys": keys})
