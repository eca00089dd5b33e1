"""Signatures that the official libraries accept."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from openai import InvalidWebhookSignatureError, OpenAI
from openai.types.webhooks import ResponseCompletedWebhookEvent
from standardwebhooks import Webhook
from standardwebhooks.webhooks import WebhookVerificationError

from llmstream.config import Settings
from llmstream.config_webhooks import split_secrets
from llmstream.transcript import Transcript
from llmstream.types import Delta, Event, EventId, Finished, GenerateRequest, Job, JobState, Usage
from llmstream.webhooks.event import event_id, render
from llmstream.webhooks.signing import SigningSecrets, signed_headers, written
from tests.webhooks.receiver import new_secret

OLD, NEW, OTHER = new_secret("o"), new_secret("n"), new_secret("x")
JOB = Job(id="j1", request=GenerateRequest.of("chat", "echo", {}), pool="echo", created_at=1700000000.5)
STATE = JobState(JOB, "completed", 1, "r", 1700000001.0, 1700000002.0, usage=Usage(3, 2))
TRANSCRIPT = Transcript([Event(EventId(1, 1), Delta("héllo")), Event(EventId(1, 2), Finished("completed", 2.0))])


def sign(body: bytes, *secrets: str, at: float | None = None) -> dict[str, str]:
    return signed_headers(split_secrets(",".join(secrets)), "evt_1", int(at or time.time()), body)


def test_the_signature_of_the_standard() -> None:
    """Byte for byte the signature that the standard's own library makes and accepts."""
    body = render(STATE, TRANSCRIPT, 100)
    headers = sign(body, NEW)
    assert Webhook(NEW).verify(body, headers)["data"]["text"] == "héllo"
    for wrong in (body + b" ", body.replace(b"completed", b"cancelled")):
        with pytest.raises(WebhookVerificationError):
            Webhook(NEW).verify(wrong, headers)
    with pytest.raises(WebhookVerificationError):
        Webhook(OTHER).verify(body, headers)
    with pytest.raises(WebhookVerificationError):
        Webhook(NEW).verify(body, sign(body, NEW, at=time.time() - 3600))


def test_two_secrets_sign_at_once() -> None:
    """While one secret replaces another, receivers that know either of them accept."""
    body = b'{"a":1}'
    headers = sign(body, NEW, OLD)
    assert headers["webhook-signature"].count("v1,") == 2
    for secret in (OLD, NEW):
        assert Webhook(secret).verify(body, headers) == {"a": 1}
    with pytest.raises(WebhookVerificationError):
        Webhook(OTHER).verify(body, headers)


def test_the_openai_client_unwraps_it() -> None:
    """The event is one of OpenAI's, with its typed class."""
    body = render(STATE, TRANSCRIPT, 100)
    with OpenAI(api_key="unused", webhook_secret=NEW) as client:
        event = client.webhooks.unwrap(body, sign(body, NEW))
        assert isinstance(event, ResponseCompletedWebhookEvent)
        assert (event.id, event.created_at, event.data.id) == (event_id(JOB), 1700000002, "j1")
        with pytest.raises(InvalidWebhookSignatureError):
            client.webhooks.unwrap(body, sign(body, OTHER))


def test_an_event_keeps_its_id_and_its_size() -> None:
    """The same job gives the same id; a job that got its id again later gives another. Text is cut where it is told."""
    assert event_id(JOB) == event_id(JOB)
    assert event_id(JOB) != event_id(Job(id="j1", request=JOB.request, pool="echo", created_at=1700099999.0))
    assert b'"text":"h\xc3\xa9l","text_truncated":true' in render(STATE, TRANSCRIPT, 3)
    assert b'"text":"h\xc3\xa9llo","text_truncated":false' in render(STATE, TRANSCRIPT, 5)
    assert b"text" not in render(STATE, None, 5)


def settings(tmp_path: Path, **more: object) -> Settings:
    return Settings.model_validate({"data_dir": tmp_path, **more})


def test_nobody_can_sign_as_somebody_else(tmp_path: Path) -> None:
    """Each principal's secret is its own, made of the server's, and changes with it; a configured one goes before."""
    keys = {"alice": {"value": "k" * 20}, "bob": {"value": "b" * 20, "webhook_secret": OTHER}}
    secrets = SigningSecrets(settings(tmp_path, keys=keys, webhooks={"secret": f"{NEW},{OLD}"}))
    assert [len(secrets.of(name)) for name in ("alice", "bob", "carol", "local")] == [2, 1, 2, 2]
    made = [secrets.of("alice"), secrets.of("bob"), secrets.of("carol"), secrets.of("local")]
    assert len({secret for each in made for secret in each}) == 7
    assert secrets.of("bob") == split_secrets(OTHER)
    assert secrets.of("local") == split_secrets(f"{NEW},{OLD}")
    replaced = SigningSecrets(settings(tmp_path, keys=keys, webhooks={"secret": NEW}))
    assert replaced.of("alice") == secrets.of("alice")[:1]
    assert split_secrets(written(replaced.of("alice")[0])) == replaced.of("alice")
    assert SigningSecrets(settings(tmp_path)).of("alice") == ()


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"webhooks": {"allow": "https://hooks.internal/"}}, "a list of hosts and networks"),
        ({"webhook_receivers": {"request": {"url": "https://a.b", "secret": NEW}}}, "'request' is not allowed"),
        ({"webhook_receivers": {"a,b": {"url": "https://a.b", "secret": NEW}}}, "'a,b' is not allowed"),
        ({"webhook_receivers": {"a": {"url": "ftp://a.b", "secret": NEW}}}, "an http:// or https:// URL"),
        ({"webhook_receivers": {"a": {"url": "https://u:p@a.b", "secret": NEW}}}, "without a user"),
        (
            {"webhook_receivers": {"a": {"url": "https://a.b", "secret": NEW, "events": ["done"]}}},
            r"response\.completed",
        ),
    ],
)
def test_settings_that_are_wrong(sections: dict[str, object], said: str, tmp_path: Path) -> None:
    """What is not possible is said when the server starts."""
    with pytest.raises(ValueError, match=said):
        settings(tmp_path, **sections)


@pytest.mark.parametrize(
    "secret", ["short", "whsec_", "whsec_!!!!", f"{NEW},{OLD},{OTHER}", "whsec_" + "a" * 20, NEW[6:]]
)
def test_secrets_that_are_none(secret: str, tmp_path: Path) -> None:
    """Too short, not base64, without the prefix, or three: refused without being shown."""
    for sections in (
        {"webhooks": {"secret": secret}},
        {"webhook_receivers": {"a": {"url": "https://example.com", "secret": secret}}},
        {"keys": {"a": {"value": "k" * 20, "webhook_secret": secret}}},
    ):
        with pytest.raises(ValueError, match="whsec_ and the base64 of 24 to 64 bytes"):
            settings(tmp_path, **sections)
