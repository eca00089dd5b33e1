"""Turns of a conversation, one after the other, whichever replica gets them.

A turn is on record as what was said and the job that answers; the answer stays in that job's log, and goes into the
conversation when somebody looks for it. So nothing has to be done when a job ends, wherever that is.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

from llmstream.config_routes import Multitask
from llmstream.errors import Conflict, LLMStreamError, NotFound
from llmstream.gateway import Gateway
from llmstream.history import Message, bounded, merge, outcome, starts, without_oldest
from llmstream.store.sessions import Conversation
from llmstream.types import BEGINNING, EventId, GenerateRequest, JobState, Principal, new_id

LEASE_S = 10.0
LOOK_S = 1.0
"""How long somebody in the line does not look whether they are next: no answer before them has ended."""
GLANCE_S = 0.02
"""The same while nobody's answer is awaited."""

logger = logging.getLogger(__name__)


class Seen(NamedTuple):
    """How far an answer has been read."""

    job_id: str | None = None
    position: EventId = BEGINNING


class Turn:
    """The right to add to a conversation; say which job answers."""

    def __init__(self, request: GenerateRequest, *, repeated: bool = False) -> None:
        self.request = request
        """The new messages behind those of the conversation that fit."""
        self.repeated = repeated
        """Whether the request is in the conversation already, and is to be sent on as it came."""
        self.job_id: str | None = None


class Conversations:
    """The conversations behind one gateway."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._sessions = gateway.sessions
        self._settings = gateway.settings.chat_history

    @asynccontextmanager
    async def turn(
        self,
        principal: Principal,
        session_id: str,
        request: GenerateRequest,
        multitask: Multitask,
        came_before: Callable[[], Awaitable[bool]],
    ) -> AsyncIterator[Turn]:
        """Waits for the conversation's other turns as ``multitask`` says; the job that answers is to be started inside.

        Raises Conflict when another message is being answered, for ``reject`` or for too long.
        """
        owner, number = principal.id, new_id()
        request = await self._gateway.filters.redacted(request)
        try:
            earlier = await self._wait(owner, session_id, number, multitask, came_before)
            if earlier is None:
                yield Turn(request, repeated=True)
                return
            turn = Turn(await self._fitted(request, earlier.messages))
            yield turn
            if turn.job_id is not None:
                written = Conversation(earlier.messages, request.messages, turn.job_id, earlier.version + 1)
                await self._write(owner, session_id, number, written)
        finally:
            try:
                await self._sessions.leave(owner, session_id, number)
            except LLMStreamError as error:  # the lease ends by itself
                logger.warning("a session stays taken for a moment: %s", error.message)

    async def read(self, principal: Principal, session_id: str) -> dict[str, Any]:
        """A conversation as far as it has come. Raises NotFound."""
        found = await self._sessions.find(principal.id, session_id)
        if found is None:
            raise _unknown(session_id)
        conversation, left = found
        state = await self._state(conversation)
        running = state is not None and not state.done
        last = conversation.said if running else await self._last(conversation, state)
        return {
            "session_id": session_id,
            "messages": merge(conversation.messages, last),
            "running": conversation.job_id if running else None,
            "expires_in_s": round(left, 3),
        }

    async def forget(self, principal: Principal, session_id: str) -> None:
        """Forgets a conversation; an answer that is on its way goes on. Raises NotFound."""
        if not await self._sessions.forget(principal.id, session_id):
            raise _unknown(session_id)

    async def latest(self, principal: Principal, limit: int) -> list[dict[str, Any]]:
        """The sessions that were used last."""
        found = await self._sessions.latest(principal.id, limit)
        return [{"session_id": name, "used_at": at} for name, at in found]

    async def _wait(
        self,
        owner: str,
        session_id: str,
        number: str,
        multitask: Multitask,
        came_before: Callable[[], Awaitable[bool]],
    ) -> Conversation | None:
        """The conversation with all its answers, once it is ours; None for a request that is in it already."""
        loop = asyncio.get_running_loop()
        deadline, seen = loop.time() + self._settings.wait_s, Seen()
        while True:
            place = await self._sessions.enter(owner, session_id, number, LEASE_S)
            if await came_before():
                return None
            conversation = place.conversation
            state = await self._state(conversation)
            running = state is not None and not state.done
            if place.first and not running:
                messages = merge(conversation.messages, await self._last(conversation, state))
                return Conversation(bounded(messages, self._settings.max_bytes), version=conversation.version)
            if multitask == "reject" or loop.time() >= deadline:
                raise Conflict(
                    f"Session {session_id!r} is answering another message. Send this one when that answer has ended, "
                    "or with multitask 'wait' or 'interrupt'.",
                    code="session_busy",
                    param="session_id",
                    retry_after=1.0,
                )
            if running and multitask == "interrupt":
                assert conversation.job_id is not None
                await self._gateway.cancel(conversation.job_id)
            elif running:
                seen = await self._until_over(conversation.job_id, seen)
            else:
                await asyncio.sleep(GLANCE_S)

    async def _until_over(self, job_id: str | None, seen: Seen) -> Seen:
        """Waits for the end of a job, for a while."""
        assert job_id is not None
        with self._gateway.follow(job_id, seen.position if seen.job_id == job_id else BEGINNING) as follower:
            try:
                async with asyncio.timeout(LOOK_S):
                    async for _ in follower:
                        pass
            except (TimeoutError, NotFound):
                pass
            return Seen(job_id, follower.position)

    async def _state(self, conversation: Conversation) -> JobState | None:
        if conversation.job_id is None:
            return None
        try:
            return await self._gateway.job(conversation.job_id)
        except NotFound:
            return None

    async def _last(self, conversation: Conversation, state: JobState | None) -> list[Message]:
        """What the last turn leaves."""
        if state is None:
            return []
        return outcome(conversation.said, state.status, await self._gateway.transcript(state.job.id))

    async def _write(self, owner: str, session_id: str, number: str, conversation: Conversation) -> None:
        try:
            if await self._sessions.write(owner, session_id, number, conversation):
                return
            error: LLMStreamError = Conflict(
                f"Session {session_id!r} went on meanwhile, as this replica was too slow; send the message again.",
                code="session_busy",
                param="session_id",
            )
        except LLMStreamError as trouble:
            error = trouble
        assert conversation.job_id is not None
        await self._gateway.cancel(conversation.job_id)
        raise error

    async def _fitted(self, request: GenerateRequest, earlier: list[Message]) -> GenerateRequest:
        """The request behind as many of the latest turns as leave room for an answer: ``max_tokens``, or a quarter of
        the context where that is less."""
        messages = merge(earlier, request.messages)
        if not earlier:
            return _with(request, messages)
        context = next((model.context for model in self._gateway.models if model.name == request.model), None)
        room = min(request.max_tokens or context, context // 4) if context is not None else request.max_tokens
        most = len(starts(messages)) - 1

        async def fits(dropped: int) -> bool:
            return await self._gateway.fits(_with(request, without_oldest(messages, dropped), room))

        if await fits(0):
            return _with(request, messages)
        low, high = 1, most
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if await fits(middle) else (middle + 1, high)
        return _with(request, without_oldest(messages, low))


def _with(request: GenerateRequest, messages: list[Message], max_tokens: int | None = None) -> GenerateRequest:
    body = {**request.body, "messages": messages}
    if max_tokens is not None:
        body["max_tokens"] = max_tokens
    return GenerateRequest.of("chat", request.model, body, request.provider)


def _unknown(session_id: str) -> NotFound:
    return NotFound(f"There is no session {session_id!r}; it never existed, was deleted, or its time is over.")
