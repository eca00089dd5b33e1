"""Keys from the command line, and commands that show one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmstream.commands.keys import expiry
from llmstream.errors import ConfigError
from tests.test_cli import ECHO, Cli

REQUIRED = ("--set", "security.keys_required=true")


@pytest.fixture
def cli(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Cli]:
    """The command in a directory where nothing has run yet."""
    monkeypatch.setenv("SERVER__PORT", "0")
    for name in ("REDIS_URL", "LLMSTREAM_URL", "LLMSTREAM_CONFIG", "LLMSTREAM_API_KEY", "API_KEYS"):
        monkeypatch.delenv(name, raising=False)
    made = Cli(tmp_path, capfd)
    yield made
    made.close()


def test_a_key_from_the_command_line_to_an_answer(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key made before the server or while it runs opens it for our own commands, until it is revoked."""
    early = cli.here("keys", "create", "early").out.strip()
    server = cli.serve(*ECHO, *REQUIRED)
    assert "$LLMSTREAM_API_KEY" in server.out
    refused = cli.here("jobs")
    assert refused.status == 1
    assert "An API key is needed" in refused.err
    late = cli.here("keys", "create", "late", *REQUIRED)
    assert late.out.startswith("sk-")
    for key, who in ((early, "early"), (late.out.strip(), "late")):
        monkeypatch.setenv("LLMSTREAM_API_KEY", key)
        assert cli.here("chat", f"Hello {who}").out == f"Hello {who}"
        (job,) = json.loads(cli.here("jobs", "--json").out)
        assert cli.here("jobs", job["task_id"]).status == 0
        assert cli.here("models").status == 0
    assert cli.here("keys", "revoke", "late").out.endswith(" of late is revoked\n")
    while (after := cli.here("jobs")).status == 0:
        pass  # the server hears of it a moment later
    assert "not valid" in after.err
    monkeypatch.setenv("LLMSTREAM_API_KEY", early)
    assert cli.here("jobs").status == 0


def test_keys_are_listed_without_their_secrets(cli: Cli) -> None:
    """The list names each key with what it may do and until when; nothing of the key itself is in it."""
    assert cli.here("keys", "list").err == "There are no keys in the store.\n"
    words = ("--scope", "read", "--model", "gpt-*", "--model", "echo", "--expires", "12h")
    made = cli.here("keys", "create", "alice", *words)
    assert "It is not shown again" in made.err
    assert "here none is" in made.err
    secret = made.out.strip()
    (row,) = json.loads(cli.here("keys", "list", "--json").out)
    assert row.keys() == {"id", "name", "scopes", "models", "limits", "created_at", "expires_at"}
    assert (row["name"], row["scopes"], row["models"]) == ("alice", ["read"], ["gpt-*", "echo"])
    assert row["expires_at"] - row["created_at"] == pytest.approx(12 * 3600)
    assert secret.startswith(f"sk-{row['id']}-")
    for listed in (cli.here("keys", "list").out, cli.here("keys", "list", "--json").out):
        assert "alice" in listed
        assert secret.split("-", 2)[2] not in listed


def test_a_key_with_limits(cli: Cli) -> None:
    """Limits are kept with a key and shown; what is no limit, or cannot hold, is refused."""
    words = ("--requests-per-minute", "60", "--burst-size", "1", "--tokens-per-minute", "0")
    assert cli.here("keys", "create", "alice", *words).status == 0
    (row,) = json.loads(cli.here("keys", "list", "--json").out)
    assert row["limits"] == {"requests_per_minute": 60, "burst_size": 1, "tokens_per_minute": 0}
    assert "requests_per_minute=60" in cli.here("keys", "list").out.replace("\n", "").replace(" ", "")
    for wrong in (("--queued-jobs", "-1"), ("--queued-jobs", "1", "--set", "broker.kind=rabbitmq")):
        refused = cli.here("keys", "create", "bob", *wrong)
        assert refused.status == 2
        assert "--queued-jobs" in refused.err
    off = cli.here("keys", "create", "bob", "--queued-jobs", "1", "--set", "rate_limit.enabled=false")
    assert "switched off" in off.err


def test_a_name_is_one_principal(cli: Cli) -> None:
    """A second key of the same name has to be asked for; revoking the name ends both, an id just one."""
    first = cli.here("keys", "create", "alice")
    refused = cli.here("keys", "create", "alice")
    assert (first.status, refused.status) == (0, 1)
    assert "--add" in refused.err
    configured = ("--set", "keys.bob.value=0123456789abcdef")
    assert cli.here("keys", "create", "bob", *configured).status == 1
    assert cli.here("keys", "create", "alice", "--add").status == 0
    assert cli.here("keys", "create", "alice", "--add").status == 0
    ids = [row["id"] for row in json.loads(cli.here("keys", "list", "--json").out)]
    assert len(ids) == 3
    assert cli.here("keys", "revoke", ids[1]).out == f"{ids[1]} of alice is revoked\n"
    assert len(cli.here("keys", "revoke", "alice").out.splitlines()) == 2
    gone = cli.here("keys", "revoke", "alice")
    assert (gone.status, "keys list" in gone.err) == (1, True)


def test_a_chat_of_its_own_needs_no_key(cli: Cli) -> None:
    """Without a server, chat answers itself also where the configuration asks for keys."""
    assert cli.here("chat", "Hello", *ECHO, *REQUIRED).out == "Hello"


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("create", "two words"), "is not allowed"),
        (("create", "a", "--expires", "soon"), "90d, 12h or 2030-01-31"),
        (("create", "a", "--expires", "0h"), "in the future"),
        (("create", "a", "--expires", "9999d"), "within 3650 days"),
        (("create", "a", "--scope", "everything"), "--scope"),
        ((), "ACTION"),
    ],
)
def test_what_cannot_be_made(cli: Cli, args: tuple[str, ...], said: str) -> None:
    """Wrong words end with status 2 and say what to type."""
    printed = cli.here("keys", *args) if args else cli.here("keys")
    assert printed.status == 2
    assert said in printed.err


@pytest.mark.parametrize(
    ("text", "moment"),
    [("1h", 3600.0), ("2d", 172800.0), ("1970-01-02", 86400.0), ("1970-01-01T02:00:00+01:00", 3600.0)],
)
def test_expiry_is_a_span_or_a_date(text: str, moment: float) -> None:
    """Dates without a time zone are UTC."""
    assert expiry(text, 0.0) == moment
    with pytest.raises(ConfigError):
        expiry(text, 1e9) if "-" in text else expiry(text.replace("1", "0").replace("2", "0"), 0.0)
