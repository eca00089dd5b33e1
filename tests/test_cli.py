"""The real command against real servers that run the echo engine.

Servers and chats are processes of their own, with pipes and signals; commands that only print run in this one.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import shlex
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from llmstream.cli import main
from llmstream.commands.frames import Frame, Frames
from llmstream.commands.jobs import table
from llmstream.commands.server_file import ServerFile
from tests.waiting import wait_until

ROOT = Path(__file__).parents[1]
TOKENS = 40
WHOLE = "".join(f" tok{number:04d}" for number in range(TOKENS))
ECHO = ("--set", "models.echo.engine=echo")
SLOW = ("--set", "models.slow.engine=echo", "--set", f"models.slow.tokens={TOKENS}", "--set", "models.slow.delay_ms=25")
LEASE = ("--set", "scheduler.lease_s=0.3")
SLOWER = (
    "--set",
    "models.slower.engine=echo",
    "--set",
    "models.slower.tokens=40",
    "--set",
    "models.slower.delay_ms=200",
)
SERVER = (*ECHO, *SLOW, *SLOWER, *LEASE)


class Printed(NamedTuple):
    status: int
    out: str
    err: str


class Process:
    """One run of the command, its output in files."""

    def __init__(self, folder: Path, words: Sequence[str], stdin: bytes = b"") -> None:
        number = len(list(folder.glob("*.out")))
        self._out, self._err = folder / f"{number}.out", folder / f"{number}.err"
        (folder / f"{number}.in").write_bytes(stdin)
        with (folder / f"{number}.in").open("rb") as given, self._out.open("wb") as out, self._err.open("wb") as err:
            self.popen = subprocess.Popen(words, stdin=given, stdout=out, stderr=err, env=environment(), cwd=folder)

    @property
    def out(self) -> str:
        return self._out.read_bytes().decode()

    @property
    def err(self) -> str:
        return self._err.read_text()

    @property
    def ended(self) -> bool:
        return self.popen.poll() is not None

    def wait(self) -> int:
        return self.popen.wait(30)

    def interrupt(self) -> int:
        self.popen.send_signal(signal.SIGINT)
        return self.wait()


class Cli:
    """Runs commands that share one data directory; ends what still runs."""

    def __init__(self, folder: Path, capture: pytest.CaptureFixture[str] | None = None) -> None:
        self._capture = capture
        self.data_dir = folder / "data"
        self._runs = folder / "runs"
        self._runs.mkdir()
        self._started: list[Process] = []

    def start(self, *args: str, stdin: bytes = b"") -> Process:
        return self.start_words([*command(), *args, "--data-dir", str(self.data_dir)], stdin=stdin)

    def start_words(self, words: Sequence[str], stdin: bytes = b"") -> Process:
        process = Process(self._runs, words, stdin)
        self._started.append(process)
        return process

    def here(self, *args: str) -> Printed:
        """Runs a command in this process."""
        assert self._capture is not None
        try:
            status = main([*args, "--data-dir", str(self.data_dir)])
        except SystemExit as leave:
            status = int(leave.code or 0)
        printed = self._capture.readouterr()
        return Printed(status, printed.out, printed.err)

    def serve(self, *flags: str) -> Process:
        server = self.start("serve", "--port", "0", *flags)
        until(lambda: "listens on" in server.out or server.ended)
        assert not server.ended, server.err
        return server

    def close(self) -> None:
        for process in self._started:
            if not process.ended:
                process.popen.kill()
                process.wait()


def command() -> list[str]:
    return [sys.executable, "-m", "llmstream"]


def environment() -> dict[str, str]:
    """No setting but ours; port 0, so that nobody else's server on the usual port is found."""
    kept = {name: value for name, value in os.environ.items() if "LLMSTREAM" not in name and name != "REDIS_URL"}
    # Nothing here speaks TLS, and loading certificates is a fifth of each start.
    return {**kept, "PYTHONPATH": str(ROOT), "SERVER__PORT": "0", "SSL_CERT_FILE": os.devnull}


def resume_command(process: Process) -> list[str]:
    """The command that an interrupted chat tells its user to type."""
    (line,) = [line for line in process.err.splitlines() if "--resume" in line]
    words = shlex.split(line)
    assert words[:4] == ["python", "-m", "llmstream", "chat"], process.err
    return [sys.executable, *words[1:]]


def until(predicate: Callable[[], bool], timeout: float = 20.0) -> None:
    asyncio.run(wait_until(predicate, timeout))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The data directory of a server that runs as long as this module's tests."""
    made = Cli(tmp_path_factory.mktemp("home"))
    made.serve(*SERVER)
    yield made.data_dir
    made.close()


@pytest.fixture
def served(home: Path, cli: Cli) -> Cli:
    """The command where that server runs."""
    cli.data_dir = home
    return cli


@pytest.fixture
def cli(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Cli]:
    """The command in a directory where nothing has run yet."""
    monkeypatch.setenv("SERVER__PORT", "0")
    for name in ("REDIS_URL", "LLMSTREAM_URL", "LLMSTREAM_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    made = Cli(tmp_path, capfd)
    yield made
    made.close()


def test_chat_finds_the_server_and_pipes_nothing_but_the_answer(served: Cli) -> None:
    """A chat finds the running server on a port nobody chose, and a pipe gets the answer's exact bytes."""
    record = served.data_dir / "server.json"
    assert stat.S_IMODE(record.stat().st_mode) == 0o600
    asked = served.start("chat", "to be — or not", "--model", "echo")
    piped = served.start("chat", "-", "--model", "slow", "--system", "Be brief.", "--timings", stdin=b"from a pipe\n")
    assert (asked.wait(), asked.out, asked.err) == (0, "to be — or not", "")
    assert (piped.wait(), piped.out) == (0, WHOLE)
    assert f"{TOKENS} tokens" in piped.err
    cut = served.here("chat", "one two three", "--model", "echo", "--max-tokens", "2")
    assert (cut.status, cut.out) == (0, "one two")
    assert "limit of tokens" in cut.err
    refused = served.here("chat", "hello", "--model", "nobody")
    assert (refused.status, refused.out) == (1, "")
    assert refused.err.startswith("error: ")
    assert "nobody" in refused.err
    assert "slow" in served.here("models").out


def test_an_interrupted_chat_is_taken_up_where_it_stopped(served: Cli) -> None:
    """Ctrl-C ends only the reading: the printed command gives the rest, and without --after all of it.

    So does a pipe that nobody reads any more, without a traceback.
    """
    assert_told_to_resume_when_the_pipe_closes(served)
    chat = served.start("chat", "count", "--model", "slow")
    until(lambda: "tok0005" in chat.out)
    assert chat.interrupt() == 130
    words = resume_command(chat)
    rest = served.start_words(words)
    assert rest.wait() == 0
    assert rest.out
    assert chat.out + rest.out == WHOLE
    job_id = words[words.index("--resume") + 1]
    assert served.here("chat", "--resume", job_id)[:2] == (0, WHOLE)
    assert served.here("chat", "--resume", job_id, "--after", "1-10")[:2] == (0, WHOLE[len(" tok0000") * 10 :])


def test_jobs_are_listed_shown_and_cancelled(served: Cli) -> None:
    """A running job is in the list, can be shown, and ends with its partial text when it is cancelled."""
    chat = served.start("chat", "count", "--model", "slower", "--priority", "7")
    until(lambda: "tok0001" in chat.out)
    (job,) = json.loads(served.here("jobs", "--json", "--limit", "1").out)
    assert (job["status"], job["lane"], job["priority"]) == ("in_progress", "high", 7)
    job_id = job["task_id"]
    assert job_id in served.here("jobs").out
    cancelled = served.here("cancel", job_id, "nosuchjob")
    assert (cancelled.status, cancelled.out) == (1, f"{job_id} cancelled\n")
    assert "nosuchjob" in cancelled.err
    assert chat.wait() == 1
    assert "cancelled" in chat.err
    shown = json.loads(served.here("jobs", job_id, "--json").out)
    assert (shown["status"], shown["text"]) == ("cancelled", chat.out)
    assert WHOLE.startswith(chat.out)
    assert "cancelled" in served.here("jobs", job_id).out


def test_queues_are_paused_and_jobs_cancelled_by_filter(served: Cli) -> None:
    """What is paused is shown with what waits for it; jobs are cancelled by what they are; resumed, nothing is held."""
    assert served.here("queues", "pause", "--lane", "low", "--model", "slow*").out == "lane low, model slow* paused\n"
    running = ServerFile(served.data_dir).read()
    assert running is not None
    words = {"message": "x", "model": "slower", "priority": -9}
    subprocess.run(_post(f"{running.url}/chat/async", words), check=True, stdout=subprocess.DEVNULL)
    (rule,) = json.loads(served.here("queues", "--json").out)["rules"]
    assert (rule["mode"], rule["lane"], rule["model"], rule["waiting"]) == ("paused", "low", "slow*", 1)
    shown = served.here("queues").out
    assert "lane low, model slow*" in shown
    assert (
        served.here("cancel", "--status", "queued", "--model", "slow*", "--max-priority", "-9").out == "1 cancelled\n"
    )
    assert served.here("cancel", "--created-before", "2001-01-01T00:00:00Z").out == "0 cancelled\n"
    assert served.here("queues", "drain", "--model", "nobody").out == "model nobody draining\n"
    resumed = served.here("queues", "resume", "--lane", "low", "--model", "slow*")
    assert resumed.out == "lane low, model slow* resumed\n"
    assert "Still held: model nobody (draining)" in resumed.err
    assert served.here("queues", "resume", "--all").status == 0
    assert "Nothing is paused or draining." in served.here("queues").err


def test_jobs_are_requeued(served: Cli) -> None:
    """A job that was cancelled goes on as another, which says where it is from; one that runs is refused."""
    chat = served.start("chat", "count", "--model", "slower")
    until(lambda: "tok0001" in chat.out)
    (job,) = json.loads(served.here("jobs", "--json", "--limit", "1").out)
    assert served.here("jobs", "--dead").err == "No job was given up.\n"
    assert served.here("jobs", job["task_id"], "--dead").status == 2
    assert served.here("requeue", job["task_id"]).status == 1
    served.here("cancel", job["task_id"])
    assert chat.wait() == 1
    requeued = served.here("requeue", job["task_id"], "nosuchjob")
    assert requeued.status == 1
    assert "nosuchjob" in requeued.err
    old, _, new = requeued.out.strip().partition(" goes on as ")
    assert old == job["task_id"]
    assert json.loads(served.here("jobs", new, "--json").out)["continues"] == old
    served.here("cancel", new)


def test_dead_letters_are_shown_with_their_reason(capsys: pytest.CaptureFixture[str]) -> None:
    """The table of dead letters says why each was given up."""
    job = {"task_id": "j", "status": "failed", "model": "m", "priority": 0, "lane": "default", "attempt": 3}
    rows = [{**job, "created_at": 0.0, "error": {"message": "tried too often"}}]
    Console(width=200).print(table(rows, 1.0))
    assert "tried too often" in capsys.readouterr().out


def test_an_answer_survives_the_death_of_its_server(cli: Cli) -> None:
    """After kill -9 and a new start on another port, a waiting chat goes on by itself and an ended one resumes.

    The SIGHUP of a closed terminal ends the new server in order, as SIGTERM does: with status 0, and nobody is sent to
    it any more.
    """
    pace = ("--set", "models.slow.delay_ms=50")  # both chats must be on their way before either is done
    server = cli.serve(*SERVER, *pace)
    patient, impatient = (cli.start("chat", "count", "--model", "slow") for _ in range(2))
    until(lambda: "tok0005" in patient.out and "tok0005" in impatient.out)
    server.popen.kill()
    server.wait()
    assert (cli.data_dir / "server.json").exists()
    until(lambda: "Connection lost" in impatient.err)
    assert impatient.interrupt() == 130
    assert len(impatient.out) < len(WHOLE)
    second = cli.serve(*SERVER, *pace)
    rest = cli.start_words(resume_command(impatient))
    assert rest.wait() == 0
    assert impatient.out + rest.out == WHOLE
    assert (patient.wait(), patient.out) == (0, WHOLE)
    second.popen.send_signal(signal.SIGHUP)
    assert second.wait() == 0
    assert not (cli.data_dir / "server.json").exists()


def test_an_answer_that_starts_over_is_never_glued_to_the_old_one(cli: Cli) -> None:
    """When the model can't go on, a piped chat fails, says that its output is void, and how to read the new answer."""
    server = cli.serve(*SERVER)
    chat = cli.start("chat", "to be or not", "--model", "slow")
    until(lambda: "tok0005" in chat.out)
    server.popen.kill()
    cli.serve("--set", "models.slow.engine=echo", *LEASE)
    assert chat.wait() == 1
    assert "start over" in chat.err
    assert WHOLE.startswith(chat.out)
    words = resume_command(chat)
    fresh = cli.start_words(words)
    assert (fresh.wait(), fresh.out) == (0, "to be or not")
    job_id = words[words.index("--resume") + 1]
    assert cli.here("chat", "--resume", job_id).out == "to be or not"


def test_without_a_server_the_command_answers_itself(cli: Cli) -> None:
    """Without a server, or with the traces of a dead one, the answer comes from this process; Ctrl-C keeps the job."""
    cli.data_dir.mkdir()
    (cli.data_dir / "server.json").write_text(json.dumps({"url": "http://127.0.0.1:1", "pid": os.getpid()}))
    chat = cli.start("chat", "count", "--model", "slow", *SLOW)
    until(lambda: "tok0005" in chat.out or chat.ended)
    assert chat.interrupt() == 130, chat.err
    rest = cli.start_words(resume_command(chat))
    assert rest.wait() == 0
    assert rest.out
    assert chat.out + rest.out == WHOLE


def test_a_second_ctrl_c_ends_the_server_at_once(cli: Cli) -> None:
    """While jobs hold up the end that the first Ctrl-C asked for, a further one kills."""
    held = cli.serve(*SERVER, "--set", "models.slow.delay_ms=100000")
    url = held.out.split("listens on ")[1].split()[0]
    body = {"model": "slow", "messages": [{"role": "user", "content": "x"}], "n": 2, "stream": True}
    caller = cli.start_words(_post(f"{url}/v1/chat/completions", body))
    until(lambda: '"role"' in caller.out)

    def interrupted() -> bool:
        held.popen.send_signal(signal.SIGINT)
        return held.ended

    until(interrupted)
    assert held.wait() == -signal.SIGINT
    assert "Ctrl-C again" in held.err


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("serve", "--set", "server.prt=1"), "did you mean 'port'"),
        (("serve", "--set", "nothing"), "KEY=VALUE"),
        (("serve", "--config", "missing.yaml"), "missing.yaml"),
        (("chat", "hello", "--priority", "high"), "--priority"),
        (("chat",), "Ask something"),
        (("chat", "x", "--resume", "y"), "not both"),
        (("chat", "--resume", "x", "--after", "soon"), "attempt-seq"),
        (("jobs", "--limit", "0"), "--limit"),
        (("cancel",), "IDs"),
        (("cancel", "x", "--all"), "not both"),
        (("queues", "pause"), "--lane"),
        (("queues", "pause", "--all", "--lane", "low"), "--all"),
        (("queues", "--all"), "say which"),
        (("models", "pull"), "SOURCE"),
    ],
)
def test_wrong_flags_and_settings_end_with_status_2(cli: Cli, args: tuple[str, ...], said: str) -> None:
    """Whatever is wrong on the command line or in the settings is named on stderr, with status 2."""
    printed = cli.here(*args)
    assert (printed.status, printed.out) == (2, "")
    assert said in printed.err


def test_users_see_messages_and_no_tracebacks(cli: Cli) -> None:
    """A wrong value and a missing server give one message each; only --debug shows where it came from."""
    wrong, lonely = cli.start("serve", "--port", "many"), cli.start("jobs", "--debug")
    assert (wrong.wait(), wrong.out) == (2, "")
    assert "server.port = 'many'" in wrong.err
    assert "Traceback" not in wrong.err
    assert lonely.wait() == 1
    assert "No llmstream server answers" in lonely.err
    assert "Traceback" in lonely.err


def test_the_printed_configuration_has_no_secrets(cli: Cli) -> None:
    """``serve --print-config`` shows what the flags and the environment make of the settings, secrets masked."""
    printed = cli.here("serve", "--print-config", "--host", "::1", "--set", "store.url=redis://me:hunter2@host:6379/0")
    assert printed.status == 0
    assert "hunter2" not in printed.out
    assert "host: ::1" in printed.out
    assert "redis://me:" in printed.out


def test_doctor_tells_a_good_configuration_from_a_bad_one(cli: Cli) -> None:
    """The doctor names every problem and what to do, and leaves neither files nor processes behind."""
    good = cli.here("doctor", *ECHO)
    assert good.status == 0, good.out
    assert "problem" not in good.out
    with socket.create_server(("127.0.0.1", 0)) as taken:
        flags = ("--set", f"server.port={taken.getsockname()[1]}", "--set", "store.url=redis://127.0.0.1:1/0")
        bad = cli.here("doctor", *flags, *ECHO, "--set", "models.m.source=/nowhere.gguf", "--json")
    assert bad.status == 1
    checks = {check["name"]: check for check in json.loads(bad.out)}
    for name in ("store", "port", "weights of m"):
        assert checks[name]["status"] == "problem", name
        assert checks[name]["advice"], name
    assert not cli.data_dir.exists()
    wrong = cli.here("doctor", "--set", "scheduler.lease_s=never")
    assert wrong.status == 1
    assert "scheduler.lease_s" in wrong.out


def test_models_are_listed_and_pulled(cli: Cli, tmp_path: Path) -> None:
    """Without a server the configuration's models are listed; a pull prints the path of the weights."""
    model = tmp_path / "tiny.gguf"
    model.write_bytes(b"GGUF" + bytes(64))
    assert cli.here("models", "pull", str(model))[:2] == (0, f"{model}\n")
    listed = cli.here("models", *ECHO)
    assert listed.status == 0
    assert "echo" in listed.out
    missing = cli.here("models", "pull", str(tmp_path / "none.gguf"))
    assert missing.status == 2
    assert "none.gguf" in missing.err


@given(st.lists(st.integers(0, 200)))
def test_frames_are_the_same_however_the_bytes_are_cut(cuts: list[int]) -> None:
    """A stream's frames don't depend on where the network cuts it."""
    wire = (
        "retry: 1000\n\n: ping\n\nid: 1-0\r\ndata: a\r\n\r\nid: 1-1\ndata: é\ndata:x\nevent: odd\n\ndata: cut".encode()
    )
    frames = Frames()
    edges = sorted({0, len(wire), *(cut for cut in cuts if cut < len(wire))})
    found = [frame for start, end in itertools.pairwise(edges) for frame in frames.feed(wire[start:end])]
    assert found == [Frame("a", "1-0"), Frame("é\nx", "1-1", "odd")]


def assert_told_to_resume_when_the_pipe_closes(cli: Cli) -> None:
    words = [*command(), "chat", "count", "--model", "slow", "--data-dir", str(cli.data_dir)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()) as chat:
        assert chat.stdout
        assert chat.stderr
        assert chat.stdout.read(1) == b" "
        chat.stdout.close()
        said = chat.stderr.read().decode()
    assert chat.returncode == 1
    assert "--resume" in said
    assert "Traceback" not in said


def _post(url: str, body: object) -> list[str]:
    code = "import sys, urllib.request as u\nfor line in u.urlopen(u.Request(*sys.argv[1:2], sys.argv[2].encode(), "
    code += "{'Content-Type': 'application/json'})): print(line, flush=True)"
    return [sys.executable, "-c", code, url, json.dumps(body)]
