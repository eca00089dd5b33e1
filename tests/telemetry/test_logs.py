from __future__ import annotations

import json
import logging
from typing import Any

import pytest

from llmstream.config import LoggingSettings
from llmstream.telemetry import setup_logging
from llmstream.telemetry.origin import ORIGIN, Origin

log = logging.getLogger("llmstream.tests.telemetry")


pytestmark = pytest.mark.usefixtures("restored_logging")


def entries(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def test_json_lines_carry_the_standard_and_the_extra_fields(capsys: pytest.CaptureFixture[str]) -> None:
    """A JSON entry has timestamp, level, logger, message and whatever the call gave as extra."""
    setup_logging(LoggingSettings(format="json"))
    log.info("claimed %s", "it", extra={"job_id": "j1", "request_id": "r1", "attempt": 2})
    (entry,) = entries(capsys)
    assert entry.pop("timestamp").endswith("Z")
    assert entry == {
        "level": "INFO",
        "logger": "llmstream.tests.telemetry",
        "message": "claimed it",
        "job_id": "j1",
        "request_id": "r1",
        "attempt": 2,
    }


def test_json_keeps_a_traceback_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """An exception is a field of the entry, not further lines."""
    setup_logging(LoggingSettings(format="json"))
    try:
        raise ValueError("no such thing")
    except ValueError:
        log.exception("failed")
    (entry,) = entries(capsys)
    assert entry["exception"].endswith("ValueError: no such thing")


def test_console_lines_are_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    """A console line has time, level, logger, message and the extra fields as name=value."""
    setup_logging(LoggingSettings())
    log.warning("slow", extra={"job_id": "j1"})
    time, rest = capsys.readouterr().err.split(" ", 1)
    assert time.endswith("Z")
    assert rest == "WARNING llmstream.tests.telemetry: slow job_id=j1\n"


def test_a_message_cannot_forge_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Line breaks and terminal codes inside a console message are escaped."""
    setup_logging(LoggingSettings())
    log.info("model %s", "x\n2026 ERROR forged \x1b[31m")
    assert capsys.readouterr().err.count("\n") == 1


def test_level_and_repeated_setup(capsys: pytest.CaptureFixture[str]) -> None:
    """Messages below the level are dropped, and setting up twice does not write twice."""
    setup_logging(LoggingSettings(level="DEBUG", format="console"))
    setup_logging(LoggingSettings(level="WARNING", format="json"))
    log.info("not this")
    log.warning("this")
    assert [entry["message"] for entry in entries(capsys)] == ["this"]


def test_lines_know_the_request_and_the_job_that_they_are_about(capsys: pytest.CaptureFixture[str]) -> None:
    """The ids of the work at hand stand on every line, unless the line names others; without work there are none."""
    setup_logging(LoggingSettings(format="json"), pid=7)
    log.info("idle")
    token = ORIGIN.set(Origin("r1", "j1"))
    try:
        log.info("own")
        log.info("another's", extra={"job_id": "j2"})
    finally:
        ORIGIN.reset(token)
    ids = [{key: entry.get(key) for key in ("request_id", "job_id", "pid")} for entry in entries(capsys)]
    assert ids == [
        {"request_id": None, "job_id": None, "pid": 7},
        {"request_id": "r1", "job_id": "j1", "pid": 7},
        {"request_id": "r1", "job_id": "j2", "pid": 7},
    ]


@pytest.mark.parametrize(
    "message",
    [
        "connect to redis://user:hunter2-hunter2@host:6379/0 failed",
        "header Authorization: Bearer hunter2-hunter2",
        "api_key=hunter2-hunter2",
        '{"password": "hunter2-hunter2"}',
        "key sk-hunter2-hunter2 refused",
        "REDISS://USER:hunter2-hunter2@HOST:6379/0",
        "AUTHORIZATION: BASIC hunter2-hunter2",
        "Access-Token: hunter2-hunter2",
        "CLIENT_SECRET='hunter2-hunter2'",
    ],
)
@pytest.mark.parametrize("form", ["console", "json"])
def test_secrets_are_never_written(message: str, form: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Passwords and keys are masked in messages, in extra fields and in tracebacks."""
    setup_logging(LoggingSettings.model_validate({"format": form}))
    log.info("%s", message, extra={"detail": message, "api_key": "hunter2-hunter2"})
    try:
        raise ValueError(message)
    except ValueError:
        log.exception("failed")
    written = capsys.readouterr().err
    assert "hunter2" not in written
    assert "********" in written
    assert written.count("ValueError") >= 1
