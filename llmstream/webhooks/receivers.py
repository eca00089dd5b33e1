"""Who hears of which job's end, and how: the URL that a request names, and the receivers of the configuration."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import NamedTuple

from yarl import URL

from llmstream.config import Settings
from llmstream.config_webhooks import NOTHING_SIGNS, ReceiverSettings, split_secrets
from llmstream.errors import BadRequest
from llmstream.types import REQUESTED, Durability, Job, Principal, Webhook
from llmstream.webhooks.reach import Reach
from llmstream.webhooks.signing import Secrets, SigningSecrets


class Receiver(NamedTuple):
    """Where one event goes."""

    url: URL
    secrets: Secrets
    events: tuple[str, ...] | None
    """None: all."""
    include_text: bool
    trusted: bool
    """Whether the configuration names it."""


class Receivers:
    """All receivers there can be."""

    def __init__(self, settings: Settings) -> None:
        self.reach = Reach(settings.webhooks.allow)
        self.secrets = SigningSecrets(settings)
        self._patterns = {name: tuple(each.principals) for name, each in settings.webhook_receivers.items()}
        self._configured = {name: _configured(each) for name, each in settings.webhook_receivers.items()}

    def choose(self, principal: Principal, webhook: Webhook | None, durability: Durability) -> tuple[str, ...]:
        """The names of those who are to hear of a job's end. Raises BadRequest for what a request must not name."""
        if webhook is not None:
            self._check(principal, webhook, durability)
        if durability == "memory":
            return ()
        names = [name for name, patterns in self._patterns.items() if _matches(principal.id, patterns)]
        return (*names, REQUESTED) if webhook is not None else tuple(names)

    def find(self, job: Job, name: str) -> Receiver | None:
        """A receiver of a job's end; None where the configuration has it no more. Raises BadRequest for a URL that is
        not allowed any more."""
        if name != REQUESTED:
            return self._configured.get(name)
        webhook, secrets = job.webhook, self.secrets.of(job.principal)
        if webhook is None or not secrets:
            return None
        return Receiver(self.reach.check(webhook.url), secrets, webhook.events, webhook.include_text, trusted=False)

    def _check(self, principal: Principal, webhook: Webhook, durability: Durability) -> None:
        if not self.secrets.of(principal.id):
            raise BadRequest(NOTHING_SIGNS, param="webhook")
        if durability == "memory":
            raise BadRequest(
                "A webhook needs a job on record, and durability 'memory' keeps none; leave one of the two out.",
                param="webhook",
            )
        self.reach.check(webhook.url)


def _matches(principal: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(principal, pattern) for pattern in patterns)


def _configured(settings: ReceiverSettings) -> Receiver:
    url, secrets = URL(settings.url.get_secret_value()), split_secrets(settings.secret.get_secret_value())
    return Receiver(url, secrets, tuple(settings.events), settings.include_text, trusted=True)
