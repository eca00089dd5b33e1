"""Secrets of keys: made, recognised, never kept."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from llmstream.access.credentials import id_of, issue, matches, name_of
from llmstream.types import ApiKey, Scope, encode


def new(*scopes: Scope) -> tuple[str, ApiKey]:
    return issue("alice", scopes=scopes, models=None, now=0.0, expires_at=1.0)


def test_a_secret_is_recognised() -> None:
    """A key's own secret matches, that of another does not, and its record does not hold it."""
    (secret, key), (other, _) = new("generate"), new("generate")
    assert id_of(secret) == key.id
    assert matches(key, secret)
    assert not matches(key, other)
    assert not matches(key, secret[:-1])
    assert secret.split("-", 2)[2].encode() not in encode(key)


def test_equal_secrets_would_have_different_records() -> None:
    """Every key has a salt of its own."""
    keys = [new("generate")[1] for _ in range(100)]
    assert len({key.salt for key in keys}) == len({key.id for key in keys}) == 100


@given(st.text())
def test_only_what_was_made_here_has_an_id(text: str) -> None:
    """Text that is no key of ours leads to no look into the store."""
    assert id_of(text) is None


def test_scopes_hold_each_other() -> None:
    """admin holds generate, generate holds read."""
    assert [new(scope)[1].scopes for scope in ("read", "generate", "admin")] == [
        ("read",),
        ("read", "generate"),
        ("read", "generate", "admin"),
    ]
    assert new("read", "admin")[1].scopes == ("read", "generate", "admin")


def test_a_configured_key_has_a_lasting_name() -> None:
    """The principal of a key without a name is the same in every process, and says nothing about the key."""
    name = name_of("your-secure-api-key-here")
    assert name == name_of("your-secure-api-key-here") != name_of("your-secure-api-key-herf")
    assert name.startswith("key-")
    assert len(name) == 16
