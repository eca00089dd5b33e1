"""Who asks, and whether they may: an API key for each request, or a signed URL where a client cannot send headers.

Every handler says with :func:`needs` or :func:`open_as` who may call it. One that says nothing is for admins only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeVar

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from llmstream.access.access import Access
from llmstream.api.keys import GATEWAY
from llmstream.caller import Caller
from llmstream.config_security import SecuritySettings
from llmstream.errors import Forbidden, Unauthorized
from llmstream.types import Principal, Scope

PRINCIPAL = web.RequestKey("principal", Principal)
TOKEN = "token"  # noqa: S105 - the name of a parameter
EVERYBODY = Principal()

Group = Literal["health", "metrics", "docs"]
AnyHandler = TypeVar("AnyHandler", bound=Callable[..., Any])


class Rule(NamedTuple):
    """Who may call a handler."""

    scope: Scope
    group: Group | None = None
    """Open to everybody where ``security.open`` names this group."""
    ticket: bool = False
    """Whether a signed URL opens it, too."""


UNDECIDED = Rule("admin")
RULES: dict[Callable[..., Any], Rule] = {}
"""By handler."""


def needs(scope: Scope, *, ticket: bool = False) -> Callable[[AnyHandler], AnyHandler]:
    """Marks a handler that takes keys with this scope."""
    return _ruled(Rule(scope, ticket=ticket))


def open_as(group: Group) -> Callable[[AnyHandler], AnyHandler]:
    """Marks a handler that needs no key by default, and else one that may ``read``."""
    return _ruled(Rule("read", group))


def caller(request: web.Request) -> Caller:
    """The gateway as whoever sent the request may use it."""
    return Caller(request.app[GATEWAY], request.get(PRINCIPAL, EVERYBODY))


def guard(settings: SecuritySettings) -> Middleware:
    """Lets nobody through who may not call the handler."""
    open_groups = frozenset(settings.open)

    @web.middleware
    async def guarded(request: web.Request, handler: Handler) -> web.StreamResponse:
        match = request.match_info
        rule = RULES.get(match.handler, UNDECIDED)
        if match.http_exception is not None or rule.group in open_groups:
            return await handler(request)
        access = request.app[GATEWAY].access
        assert access is not None, "a server with keys opens its gateway with them"
        secret = _shown(request)
        if secret is not None:
            principal = access.keys.recall(secret) or await access.keys.find(secret)
        else:
            principal = await _by_ticket(request, access, rule)
        if rule.scope not in principal.scopes:
            raise Forbidden(
                f"This API key may not do that: it needs the scope {rule.scope!r} and has "
                f"{', '.join(map(repr, principal.scopes))}."
            )
        request[PRINCIPAL] = principal
        return await handler(request)

    return guarded


def _ruled(rule: Rule) -> Callable[[AnyHandler], AnyHandler]:
    def mark(handler: AnyHandler) -> AnyHandler:
        RULES[handler] = rule
        return handler

    return mark


def _shown(request: web.Request) -> str | None:
    kind, _, secret = request.headers.get("Authorization", "").partition(" ")
    if kind.lower() == "bearer" and (secret := secret.strip()):
        return secret
    return request.headers.get("X-API-Key") or None


async def _by_ticket(request: web.Request, access: Access, rule: Rule) -> Principal:
    token = request.query.get(TOKEN)
    if token is None or not rule.ticket:
        raise Unauthorized(
            "An API key is needed: send it as 'Authorization: Bearer KEY' or 'X-API-Key: KEY'.", code="missing_api_key"
        )
    return await access.tickets.check(token, request.match_info["session_id"], request.query.get("task_id"))
