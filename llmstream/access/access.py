"""All that decides who somebody is."""

from __future__ import annotations

import secrets
from typing import NamedTuple

from llmstream.access.keyring import KeyRing
from llmstream.access.tickets import Tickets
from llmstream.config import Settings
from llmstream.store.store import Store
from llmstream.types import Clock


class Access(NamedTuple):
    """What a server with keys asks."""

    keys: KeyRing
    tickets: Tickets


async def open_access(settings: Settings, store: Store, clock: Clock) -> Access | None:
    """None for a server without keys. Raises StoreUnavailable."""
    if not settings.authenticated:
        return None
    keys = KeyRing(settings, store.api_keys, clock)
    store.signals.on_revoked = keys.forget
    own, life_s = settings.security.stream_secret, settings.security.stream_url_s
    if own is not None:
        return Access(keys, Tickets(own.get_secret_value().encode(), life_s, clock))
    keep = store.api_keys.keep_secret
    return Access(keys, Tickets(await keep(secrets.token_hex(32).encode()), life_s, clock, keep))
