"""Signatures as Standard Webhooks describes them, and whose secret makes them. Pure."""

from __future__ import annotations

import hmac
from base64 import b64encode
from collections.abc import Mapping

from llmstream.config import Settings
from llmstream.config_webhooks import SECRET_PREFIX, split_secrets
from llmstream.types import LOCAL

Secrets = tuple[bytes, ...]


def signed_headers(secrets: Secrets, message_id: str, timestamp: int, body: bytes) -> dict[str, str]:
    """The headers that prove who sent ``body`` and when; one signature for each secret."""
    content = b"%b.%d.%b" % (message_id.encode(), timestamp, body)
    signatures = [b64encode(hmac.digest(secret, content, "sha256")).decode() for secret in secrets]
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": " ".join(f"v1,{signature}" for signature in signatures),
    }


class SigningSecrets:
    """The secrets of those whose requests name URLs. Nothing of them is ever stored.

    A principal has the one of its key's settings, or one that is made of the server's: nobody can sign as somebody else
    with what its own receiver knows. A server without keys has one principal, who signs with the server's own.
    """

    def __init__(self, settings: Settings) -> None:
        server = settings.webhooks.secret
        self._server: Secrets = split_secrets(server.get_secret_value()) if server is not None else ()
        self._own: Mapping[str, Secrets] = {
            name: split_secrets(key.webhook_secret.get_secret_value())
            for name, key in settings.keys.items()
            if key.webhook_secret is not None
        }

    def of(self, principal: str) -> Secrets:
        """What signs events of a principal's jobs, the newest first; empty where nothing is configured."""
        if self.configured(principal):
            return self._own.get(principal) or self._server
        return tuple(hmac.digest(secret, b"webhooks:" + principal.encode(), "sha256") for secret in self._server)

    def configured(self, principal: str) -> bool:
        """Whether they stand in the configuration as they are."""
        return principal in self._own or principal == LOCAL


def written(secret: bytes) -> str:
    """A secret as receivers are told it."""
    return SECRET_PREFIX + b64encode(secret).decode()
