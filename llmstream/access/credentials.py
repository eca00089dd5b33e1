"""Secrets of API keys: made, recognised, never kept.

A secret made here holds 256 random bits. Nobody can guess it however fast they hash, so one round of a salted BLAKE2b
protects it as well as a slow password hash would, and a request pays about a microsecond.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable, Sequence

from llmstream.types import ApiKey, CallerLimits, Scope, scopes_upto

_ID_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"
_SECRET = re.compile(r"sk-([0-9a-z]{10})-[A-Za-z0-9_-]{43}")


def issue(
    name: str,
    *,
    scopes: Iterable[Scope],
    models: Sequence[str] | None,
    now: float,
    expires_at: float,
    limits: CallerLimits | None = None,
) -> tuple[str, ApiKey]:
    """A new secret, to be shown once, and what is kept of it. Times are seconds since the epoch."""
    key_id = "".join(secrets.choice(_ID_ALPHABET) for _ in range(10))
    secret, salt = f"sk-{key_id}-{secrets.token_urlsafe(32)}", secrets.token_bytes(16)
    key = ApiKey(
        id=key_id,
        name=name,
        salt=salt.hex(),
        digest=_digest(secret, salt),
        scopes=scopes_upto(scopes),
        created_at=now,
        expires_at=expires_at,
        models=None if models is None else tuple(models),
        limits=limits,
    )
    return secret, key


def id_of(secret: str) -> str | None:
    """The id of the key that a secret says it is; None for what was not made here."""
    found = _SECRET.fullmatch(secret)
    return found[1] if found else None


def matches(key: ApiKey, secret: str) -> bool:
    """Whether this is the key's secret; takes as long for any other."""
    return hmac.compare_digest(_digest(secret, bytes.fromhex(key.salt)), key.digest)


def name_of(secret: str) -> str:
    """The principal behind a configured key without a name: the same after every restart, whatever the order of keys.

    Names stand in records and logs, and people choose configured keys: this hash is slow on purpose.
    """
    digest = hashlib.scrypt(secret.encode(), salt=b"llmstream principal", n=2**12, r=8, p=1, dklen=6)
    return f"key-{digest.hex()}"


def _digest(secret: str, salt: bytes) -> str:
    return hashlib.blake2b(secret.encode(), key=salt, digest_size=32).hexdigest()
