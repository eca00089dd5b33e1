"""From a request to its job: what every family of routes does alike."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple, Protocol

from aiohttp import web

from llmstream.api.access import EVERYBODY, PRINCIPAL, caller
from llmstream.api.duplicates import identity
from llmstream.api.keys import GATEWAY
from llmstream.api.native_schemas import JobFields
from llmstream.api.schemas import named_webhook
from llmstream.api.times import Later
from llmstream.config_routes import Multitask
from llmstream.conversations import Conversations, Turn
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
    history: bool = True
    """Whether it is a conversation, or only where answers can be read."""


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
    if cacheable and session is None:
        there, generate, known = await reuse(request, generate, known, fields)
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
            patience_s=gateway.settings.breaker.wait_s,
            webhook=named_webhook(fields.webhook),
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

    if session is None or not session.history:
        return await start_fitting(generate)
    async with next_turn(request, session, generate, known, fields.durability, fields) as turn:
        asked = await start_fitting(turn.request)
        turn.began(asked.job, asked.follower)
        return asked


class NextTurn:
    """The next message of a conversation."""

    def __init__(self, turn: Turn) -> None:
        self.request = turn.request
        """The message behind the conversation."""
        self.follower: Follower | None = None
        self._turn = turn

    def began(self, job: Job, follower: Follower | None = None) -> None:
        """Says which job answers, and who reads it."""
        self._turn.job_id, self.follower = job.id, follower


@asynccontextmanager
async def next_turn(
    request: web.Request,
    session: Session,
    generate: GenerateRequest,
    known: Identity | None,
    durability: Durability | None,
    later: Later,
) -> AsyncIterator[NextTurn]:
    """Waits until it is the turn of a message in its conversation. Raises BadRequest, Conflict."""
    gateway, principal = request.app[GATEWAY], principal_of(request)
    settings = gateway.settings.chat_history
    if not settings.enabled:
        raise BadRequest(
            "Conversations are switched off here (chat_history.enabled); leave session_id out and send all messages.",
            param="session_id",
        )
    if later.scheduled:
        raise BadRequest(
            "A message of a conversation is answered in its turn, not at a time of its own; leave session_id or "
            "not_before and delay_s out.",
            param="not_before" if later.not_before is not None else "delay_s",
        )
    if (durability or gateway.settings.store.durability) == "memory":
        raise BadRequest(
            "A session keeps what is said, and durability 'memory' nothing; leave one of the two out.",
            param="durability",
        )

    async def came_before() -> bool:
        return known is not None and known.named and await gateway.came_before(known, principal)

    mine: NextTurn | None = None
    try:
        multitask = session.multitask or settings.multitask
        async with Conversations(gateway).turn(principal, session.id, generate, multitask, came_before) as turn:
            mine = NextTurn(turn)
            yield mine
    except BaseException:
        if mine is not None and mine.follower is not None:
            mine.follower.close()
        raise


def session_of(
    request: web.Request, session_id: str | None, history: bool | None, multitask: Multitask | None
) -> Session | None:
    """The conversation that a request adds to, where ``session_id`` alone only names its stream. Raises BadRequest."""
    settings = request.app[GATEWAY].settings.chat_history
    kept = settings.enabled and settings.everywhere if history is None else history
    if kept and session_id is not None:
        return Session(session_id, multitask)
    if history:
        raise BadRequest("history is that of a session; say which one with session_id.", param="history")
    if multitask is not None:
        raise BadRequest(
            "multitask is for messages of one conversation; send it with session_id and history true.",
            param="multitask",
        )
    return None


class Wishes(Protocol):
    """What decides whether an answer that is there already will do."""

    @property
    def durability(self) -> Durability | None: ...
    @property
    def webhook(self) -> object: ...
    @property
    def scheduled(self) -> bool: ...


async def reuse(
    request: web.Request, generate: GenerateRequest, known: Identity | None, wishes: Wishes
) -> tuple[Asked | None, GenerateRequest, Identity | None]:
    """An answer that is there already, or else the request as it is kept, and by what it has to be known so that equal
    ones find it. One that is to begin later wants a new answer, and so does one with a webhook: of a cached answer
    nobody would be told.

    A request with a name of its own goes its own way; so does one that says ``Cache-Control: no-store``, while
    ``no-cache`` wants a new answer to be kept in place of an old one.
    """
    if wishes.scheduled or wishes.webhook is not None:
        return None, generate, known
    gateway, principal = request.app[GATEWAY], principal_of(request)
    settings, durability = gateway.settings.cache, wishes.durability
    generate = await gateway.filters.redacted(generate)
    said = {word.strip().lower() for word in request.headers.get("Cache-Control", "").split(",")}
    kept = (durability or gateway.settings.store.durability) != "memory" and NO_STORE not in said
    if not kept or not settings.enabled or not principal.may_use(generate.model):
        return None, generate, known
    if known is not None and _has_a_name(known, settings.share_in_flight):
        return None, generate, known
    found = await gateway.cache.look(generate, principal, refresh=NO_CACHE in said)
    if found.hit is not None:
        await gateway.count_request(principal)
        return Asked(found.hit.job, gateway.read(found.hit.job), cached=True), generate, known
    return None, generate, (known or Identity(""))._replace(reserved=found.reserved)


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
    named = defaults.embeddings if kind == "embedding" else defaults.served
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
