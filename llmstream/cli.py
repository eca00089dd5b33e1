"""The command line: what can be typed, and what becomes of errors."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import TypeAlias

from llmstream import __version__
from llmstream.commands.options import Command, assignment, event_id, program
from llmstream.commands.terminal import forget_stdout
from llmstream.errors import ConfigError, LLMStreamError
from llmstream.types import LANES, SCOPES

EPILOG = """\
Settings come from defaults < --config FILE < environment (SERVER__PORT, STORE__URL …) < flags.
Exit status: 0 done, 1 something failed, 2 wrong flags or configuration, 130 interrupted."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    args = build_parser().parse_args(argv)
    try:
        return _command(args)(args)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        forget_stdout()
        return 1
    except Exception as error:
        return _report(error, debug=args.debug)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program(),
        description="A durable, streaming LLM gateway: every answer is logged before it is seen.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"llmstream {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    settings = _settings_flags()
    client = argparse.ArgumentParser(add_help=False, parents=[settings])
    client.add_argument("--url", help="the server to talk to (LLMSTREAM_URL); by default the one that runs here")
    _add_serve(commands, settings)
    _add_chat(commands, client)
    _add_jobs(commands, client)
    _add_queues(commands, client)
    _add_models(commands, client)
    _add_keys(commands, settings)
    doctor = commands.add_parser("doctor", parents=[client], help="check everything the service needs")
    doctor.add_argument("--json", action="store_true", help="print the checks as JSON")
    doctor.set_defaults(command="doctor:run")
    return parser


def _settings_flags() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(add_help=False)
    flags.add_argument("--config", metavar="FILE", help="YAML file with settings (LLMSTREAM_CONFIG)")
    flags.add_argument("--data-dir", metavar="DIR", help="where weights and the embedded store live")
    flags.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        type=assignment,
        dest="assignments",
        help="any setting by its dotted key, for example scheduler.max_waiting=100; can be repeated",
    )
    flags.add_argument("--debug", action="store_true", help="show where an error comes from")
    return flags


Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def _add_serve(commands: Commands, settings: argparse.ArgumentParser) -> None:
    serve = commands.add_parser("serve", parents=[settings], help="run the server")
    serve.add_argument("--host", help="address to listen on")
    serve.add_argument("--port", help="port to listen on; 0 picks a free one")
    serve.add_argument(
        "--workers", help="replica processes that share the port; SIGHUP or SIGUSR2 restarts them one by one"
    )
    serve.add_argument("--print-config", action="store_true", help="print the settings, secrets masked, and exit")
    serve.set_defaults(command="serve:run")


def _add_chat(commands: Commands, client: argparse.ArgumentParser) -> None:
    chat = commands.add_parser(
        "chat",
        parents=[client],
        help="ask a question; the answer streams to the terminal",
        description="Asks the running server, or a server inside this process when none runs. Standard output gets "
        "the answer and nothing else.",
    )
    chat.add_argument("question", nargs="?", help="what to ask; - reads it from standard input")
    chat.add_argument("--model", help="which model answers; by default the first one of the server")
    chat.add_argument("--system", help="system message")
    chat.add_argument("--max-tokens", type=int, help="longest answer, in tokens")
    chat.add_argument("--temperature", type=float, help="0 always takes the likeliest token")
    chat.add_argument("--priority", type=int, help="10 first, -10 last")
    chat.add_argument("--resume", metavar="ID", help="read the answer of this job, from its beginning")
    chat.add_argument("--after", metavar="EVENT_ID", type=event_id, help="with --resume: only what follows this event")
    chat.add_argument("--timings", action="store_true", help="tell the time to the first token and tokens per second")
    chat.set_defaults(command="chat:run")


def _add_jobs(commands: Commands, client: argparse.ArgumentParser) -> None:
    jobs = commands.add_parser("jobs", parents=[client], help="list the latest jobs, or show one")
    jobs.add_argument("id", nargs="?", help="show this job")
    jobs.add_argument("--dead", action="store_true", help="list those that failed after all their attempts")
    jobs.add_argument("--limit", type=int, default=20, help="how many to list (20)")
    jobs.add_argument("--json", action="store_true", help="print JSON")
    jobs.set_defaults(command="jobs:run")
    cancel = commands.add_parser(
        "cancel",
        parents=[client],
        help="end jobs that wait or run",
        description="Ends the jobs named, or all those that wait or run and fit what the flags say.",
    )
    cancel.add_argument("ids", nargs="*", metavar="ID")
    cancel.add_argument("--status", choices=["queued", "scheduled", "in_progress"], help="only those")
    cancel.add_argument("--lane", choices=LANES, help="only those of this lane")
    cancel.add_argument("--model", metavar="PATTERN", help="only those for these models, such as 'gpt-*'")
    cancel.add_argument("--min-priority", type=int, metavar="N", help="only those of this priority or a higher one")
    cancel.add_argument("--max-priority", type=int, metavar="N", help="only those of this priority or a lower one")
    cancel.add_argument("--session", metavar="ID", dest="session_id", help="only those of this session")
    cancel.add_argument("--principal", metavar="NAME", help="only those of this principal")
    cancel.add_argument(
        "--created-after", metavar="TIME", help="only later ones: 2030-01-31T09:00:00Z, or epoch seconds"
    )
    cancel.add_argument("--created-before", metavar="TIME", help="only earlier ones")
    cancel.add_argument("--all", action="store_true", help="every job")
    cancel.set_defaults(command="jobs:cancel")
    requeue = commands.add_parser(
        "requeue",
        parents=[client],
        help="run failed or cancelled jobs once more",
        description="Makes a new job of each, which goes on where the old one stopped, and prints both ids.",
    )
    requeue.add_argument("ids", nargs="+", metavar="ID")
    requeue.set_defaults(command="jobs:requeue")


def _add_queues(commands: Commands, client: argparse.ArgumentParser) -> None:
    queues = commands.add_parser(
        "queues",
        parents=[client],
        help="show, pause, drain or resume parts of the queue",
        description="pause: nothing of it begins, new jobs wait. drain: it takes no new jobs, and what waits is "
        "finished. resume: ends both. It holds for all servers that share the store, also after a restart.",
    )
    queues.add_argument("action", nargs="?", choices=["list", "pause", "drain", "resume"], default="list")
    queues.add_argument("--lane", choices=LANES, help="this lane")
    queues.add_argument("--model", metavar="PATTERN", help="these models, such as 'gpt-*'")
    queues.add_argument("--all", action="store_true", help="everything")
    queues.add_argument("--json", action="store_true", help="print JSON")
    queues.set_defaults(command="queues:run")


def _add_models(commands: Commands, client: argparse.ArgumentParser) -> None:
    models = commands.add_parser(
        "models",
        parents=[client],
        help="list models, or pull weights",
        description="list: the models of the running server, else those of the configuration. pull: fetch weights and "
        "print where they are; SOURCE is a name such as smollm2, or a Hugging Face owner/repo/file.gguf.",
    )
    models.add_argument("action", nargs="?", choices=["list", "pull"], default="list")
    models.add_argument("source", nargs="?", metavar="SOURCE")
    models.set_defaults(command="models:run")


KEY_LIMITS = {
    "requests_per_minute": "requests for an answer in a minute; 0: no limit (as rate_limit says; so with the others)",
    "burst_size": "so many of them at once after a pause",
    "tokens_per_minute": "tokens of prompts and answers in a minute",
    "concurrent_jobs": "jobs that run at once in one pool; more wait",
    "queued_jobs": "jobs that wait in one pool; more are refused",
}


def _add_keys(commands: Commands, settings: argparse.ArgumentParser) -> None:
    keys = commands.add_parser(
        "keys",
        help="make, list and revoke API keys",
        description="Works on the store of the settings, and so on all servers that share it, while they run or not.",
    ).add_subparsers(required=True, metavar="ACTION")
    create = keys.add_parser(
        "create",
        parents=[settings],
        help="make a key and print it, this once",
        description="Jobs belong to the NAME: a key made for a name that had one before sees that one's jobs.",
    )
    create.add_argument("name", metavar="NAME", help="whose key it is")
    create.add_argument(
        "--scope", action="append", choices=SCOPES, dest="scopes", help="what it may do (generate); can be repeated"
    )
    create.add_argument(
        "--model",
        action="append",
        metavar="PATTERN",
        dest="models",
        help="a model it may ask for, such as 'gpt-*' (all); can be repeated",
    )
    create.add_argument("--expires", default="365d", metavar="WHEN", help="90d, 12h or a date (365d)")
    for limit, meaning in KEY_LIMITS.items():
        create.add_argument(f"--{limit.replace('_', '-')}", type=int, metavar="N", dest=limit, help=meaning)
    create.add_argument("--add", action="store_true", help="make another key for a name that has one")
    create.set_defaults(command="keys:create")
    listed = keys.add_parser("list", parents=[settings], help="list the keys of the store")
    listed.add_argument("--json", action="store_true", help="print JSON")
    listed.set_defaults(command="keys:list_all")
    revoke = keys.add_parser("revoke", parents=[settings], help="end a key, or all keys of a name, at once")
    revoke.add_argument("key", metavar="ID_OR_NAME")
    revoke.set_defaults(command="keys:revoke")


def _command(args: argparse.Namespace) -> Command:
    # Imported now, so that a command pays only for what it uses.
    module, _, name = args.command.partition(":")
    run: Callable[[argparse.Namespace], int] = getattr(import_module(f"llmstream.commands.{module}"), name)
    return run


def _report(error: Exception, *, debug: bool) -> int:
    if debug:
        traceback.print_exception(error, file=sys.stderr)
    known = isinstance(error, LLMStreamError)
    said = str(error) if known else f"{type(error).__name__}: {error}. This should not happen; --debug shows where."
    sys.stderr.write(f"error: {said}\n")
    return 2 if isinstance(error, ConfigError) else 1
