"""From a request to its job: what every family of routes does alike."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

from aiohttp import web

from llmstream.api.access import EVERYBODY, PRINCIPAL, caller
from llmstream.api.duplicates import identity
from llmstream.api.keys import GATEWAY
from llmstream.api.native_schemas import JobFields
from llmstream.config_routes import Multitask
from llmstream.conversations import Conversations
from llmstream.duplicates import Identity
from llmstream.errors import BadRequest, ContextLengthExceeded
from llmstream.store.follower import Follower
from llmstream.types import Durability, GenerateRequest, Job, Kind, Principal

NO_CACHE, NO_STORE = "no-cache", "no-store"
CACHED = {"X-Cache": "hit"}
"""The headers of an answer that was there already."""


class Session(NamedTuple):
    """Where a message belongs."""

    id: str
    multitask: Multitask | None


class Asked(NamedTuple):
    """A job that was accepted, and its reader; close it."""

    job: Job
    follower: Follower
    cached: bool = False
    """Whether the answer was there already."""

    @property
    def headers(self) -> dict[str, str]:
        return {"x-job-id": self.job.id, **(CACHED if self.cached else {})}


async def ask(
    request: web.Request,
    generate: GenerateRequest,
    fields: JobFields,
    body: dict[str, Any],
    *,
    on_disconnect: str,
    deadline_s: float | None = None,
    cacheable: bool,
    session: Session | None = None,
) -> Asked:
    """Starts the job that a request asks for, or finds one that did the same where it is ``cacheable``; as the next
    turn of ``session``, if there is one. ``on_disconnect`` and ``deadline_s`` hold where ``fields`` say nothing; the
    latter only for a job that may begin at once.

    ``max_tokens`` is an upper limit here: where less fits into the context, the answer may take what is left.
    """
    gateway = request.app[GATEWAY]
    known = identity(request, fields.job_id, body)
    generate = await gateway.filters.redacted(generate)
    if cacheable and session is None and not fields.scheduled:
        there, known = await reuse(request, generate, known, fields.durability)
        if there is not None:
            return there

    async def start(generate: GenerateRequest) -> Asked:
        job, follower = await gateway.start(
            generate,
            principal=principal_of(request),
            priority=fields.priority,
            session_id=session.id if session is not None else None,
            deadline_s=fields.deadline_s or (None if fields.scheduled else deadline_s),
            not_before=fields.not_before,
            delay_s=fields.delay_s,
            durability=fields.durability,
            identity=known,
            grace_s=gateway.settings.disconnect.limit(fields.on_disconnect or on_disconnect),
            restarts=fields.on_cut != "fail",
        )
        return Asked(job, follower)

    async def start_fitting(generate: GenerateRequest) -> Asked:
        try:
            return await start(generate)
        except ContextLengthExceeded:
            if generate.max_tokens is None:
                raise
            kept = {name: value for name, value in generate.body.items() if name != "max_tokens"}
            return await start(chat(generate.model, kept, generate.provider))

    if session is None:
        return await start_fitting(generate)
    return await _next_turn(request, session, generate, known, fields, start_fitting)


async def _next_turn(
    request: web.Request,
    session: Session,
    generate: GenerateRequest,
    known: Identity | None,
    fields: JobFields,
    start: Callable[[GenerateRequest], Awaitable[Asked]],
) -> Asked:
    gateway, principal = request.app[GATEWAY], principal_of(request)
    settings = gateway.settings.chat_history
    if not settings.enabled:
        raise BadRequest(
            "Conversations are switched off here (chat_history.enabled); leave session_id out and send all messages.",
            param="session_id",
        )
    if fields.scheduled:
        raise BadRequest(
            "A message of a conversation is answered in its turn, not at a time of its own; leave session_id or "
            "not_before and delay_s out.",
            param="not_before" if fields.not_before is not None else "delay_s",
        )
    if (fields.durability or gateway.settings.store.durability) == "memory":
        raise BadRequest(
            "A session keeps what is said, and durability 'memory' nothing; leave one of the two out.",
            param="durability",
        )

    async def came_before() -> bool:
        return known is not None and known.named and await gateway.came_before(known, principal)

    asked: Asked | None = None
    try:
        multitask = session.multitask or settings.multitask
        async with Conversations(gateway).turn(principal, session.id, generate, multitask, came_before) as turn:
            asked = await start(turn.request)
            turn.job_id = asked.job.id
        return asked
    except BaseException:
        if asked is not None:
            asked.follower.close()
        raise


async def reuse(
    request: web.Request, generate: GenerateRequest, known: Identity | None, durability: Durability | None
) -> tuple[Asked | None, Identity | None]:
    """An answer that is there already, or else by what the request has to be known so that equal ones find it.

    A request with a name of its own goes its own way; so does one that says ``Cache-Control: no-store``, while
    ``no-cache`` wants a new answer to be kept in place of an old one.
    """
    gateway, principal = request.app[GATEWAY], principal_of(request)
    settings = gateway.settings.cache
    said = {word.strip().lower() for word in request.headers.get("Cache-Control", "").split(",")}
    kept = (durability or gateway.settings.store.durability) != "memory" and NO_STORE not in said
    if not kept or not settings.enabled or not principal.may_use(generate.model):
        return None, known
    if known is not None and _has_a_name(known, settings.share_in_flight):
        return None, known
    found = await gateway.cache.look(generate, principal, refresh=NO_CACHE in said)
    if found.hit is not None:
        return Asked(found.hit.job, gateway.read(found.hit.job), cached=True), known
    return None, (known or Identity(""))._replace(reserved=found.reserved)


def _has_a_name(known: Identity, share: bool) -> bool:
    """Whether it is to be looked for under its own name. A retry is, unless equal requests meet anyway."""
    return known.job_id is not None or known.key is not None or (bool(known.retry) and not share)


def chat(model: str, body: dict[str, Any], provider: str | None) -> GenerateRequest:
    """A conversation as the gateway takes it; members that are None are left out."""
    said = {name: value for name, value in body.items() if value is not None}
    return GenerateRequest.of("chat", model, {**said, "model": model}, provider)


def principal_of(request: web.Request) -> Principal:
    """Who asks."""
    principal: Principal = request.get(PRINCIPAL, EVERYBODY)
    return principal


def served_model(request: web.Request, kind: Kind = "chat") -> str | None:
    """Who answers a request of a kind that names no model; None when the caller knows nobody by name."""
    defaults = request.app[GATEWAY].settings.model
    named = defaults.embeddings if kind == "embedding" else defaults.name
    able = (model.name for model in caller(request).models if model.takes(kind))
    return named or next(able, None)


def default_model(request: web.Request, kind: Kind = "chat") -> str:
    """Like :func:`served_model`. Raises BadRequest when there is none."""
    if (name := served_model(request, kind)) is None:
        setting = "model.embeddings" if kind == "embedding" else "model.name"
        raise BadRequest(
            f"No model is configured by name; say which one with 'model', or set {setting}.", param="model"
        )
    return name
