"""Conversations that the server keeps: what was said, which job answers, and who comes next.

Whoever adds to a conversation stands in its line; only the first may write, as long as its lease lasts.
"""

from __future__ import annotations

import logging
import time
from typing import Any, NamedTuple

import msgspec
from msgspec import Struct

from llmstream.store.keys import Keys
from llmstream.store.pipeline import Script, Sender
from llmstream.store.recent import Recent

MOST_SESSIONS = 1000
"""An owner's list of sessions remembers so many."""
LINE_S = 60
"""How long a line outlives those who stand in it."""

Message = dict[str, Any]

_NOW = """
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local function fmt(number) return string.format('%.0f', number) end
"""
_ENTER = Script(
    "session_enter",
    _NOW
    + """
-- KEYS chat, turns, alive; ARGV turn, lease_ms, ttl_ms. Also renews. -> whether it is first, and the conversation
redis.call('ZADD', KEYS[2], 'NX', fmt(now), ARGV[1])
redis.call('ZADD', KEYS[3], fmt(now + ARGV[2] * 1000), ARGV[1])
redis.call('PEXPIRE', KEYS[2], ARGV[3])
redis.call('PEXPIRE', KEYS[3], ARGV[3])
for _, turn in ipairs(redis.call('ZRANGEBYSCORE', KEYS[3], '-inf', fmt(now))) do
  redis.call('ZREM', KEYS[2], turn)
  redis.call('ZREM', KEYS[3], turn)
end
local chat = redis.call('HMGET', KEYS[1], 'chat', 'version')
return {redis.call('ZRANGE', KEYS[2], 0, 0)[1] == ARGV[1] and 1 or 0, chat[1] or '', tonumber(chat[2] or 0)}
""",
)
_LEAVE = Script(
    "session_leave",
    """
-- KEYS turns, alive; ARGV turn.
redis.call('ZREM', KEYS[1], ARGV[1])
redis.call('ZREM', KEYS[2], ARGV[1])
""",
)
_WRITE = Script(
    "session_write",
    _NOW
    + """
-- KEYS chat, turns, alive; ARGV turn or '' to write again, conversation, version, ttl_ms. -> whether it was written
if ARGV[1] ~= '' then
  local alive = redis.call('ZSCORE', KEYS[3], ARGV[1])
  if not alive or tonumber(alive) <= now or redis.call('ZRANGE', KEYS[2], 0, 0)[1] ~= ARGV[1] then return 0 end
end
if tonumber(redis.call('HGET', KEYS[1], 'version') or 0) >= tonumber(ARGV[3]) then return 0 end
redis.call('HSET', KEYS[1], 'chat', ARGV[2], 'version', ARGV[3])
redis.call('PEXPIRE', KEYS[1], ARGV[4])
return 1
""",
)
_FORGET = Script(
    "session_forget",
    """
-- KEYS chat; ARGV ttl_ms. -> the version that is empty, or 0. It stays for a while, so that nobody writes an older one.
local chat = redis.call('HMGET', KEYS[1], 'chat', 'version')
if not chat[1] or chat[1] == '' then return 0 end
local version = tonumber(chat[2]) + 1
redis.call('HSET', KEYS[1], 'chat', '', 'version', version)
redis.call('PEXPIRE', KEYS[1], ARGV[1])
return version
""",
)
_NOTE = Script(
    "session_note",
    """
-- KEYS sessions; ARGV time, session, ttl_ms, sessions kept.
redis.call('ZADD', KEYS[1], ARGV[1], ARGV[2])
redis.call('ZREMRANGEBYRANK', KEYS[1], 0, -ARGV[4] - 1)
redis.call('PEXPIRE', KEYS[1], ARGV[3])
""",
)

logger = logging.getLogger(__name__)


class Conversation(Struct, frozen=True, omit_defaults=True):
    """What a session holds. The last turn is on its way as long as nobody has added to it since."""

    messages: list[Message] = []
    """All turns but the last one."""
    said: list[Message] = []
    """What the caller said in the last one."""
    job_id: str | None = None
    """The job that answers it: the answer is in its log."""
    version: int = 0


class Place(NamedTuple):
    """Where a turn stands."""

    first: bool
    conversation: Conversation


_decode = msgspec.json.Decoder(Conversation).decode


class Sessions:
    """The conversations of all owners, each in a hash slot of its own."""

    def __init__(self, pipeline: Sender, keys: Keys, recent: Recent, *, ttl_s: float) -> None:
        self._pipeline = pipeline
        self._keys = keys
        self._recent = recent
        self._ttl_ms = max(1, int(ttl_s * 1000))

    async def enter(self, owner: str, session_id: str, turn: str, lease_s: float) -> Place:
        """Puts a turn into the line, or keeps it there."""
        keys = self._keys.conversation(owner, session_id)
        lease_ms = int(lease_s * 1000)
        first, chat, version = await self._pipeline.run(_ENTER, keys, turn, lease_ms, lease_ms + LINE_S * 1000)
        return Place(bool(first), _decode(chat) if chat else Conversation(version=version))

    async def leave(self, owner: str, session_id: str, turn: str) -> None:
        _, *line = self._keys.conversation(owner, session_id)
        await self._pipeline.run(_LEAVE, line, turn)

    async def write(self, owner: str, session_id: str, turn: str, conversation: Conversation) -> bool:
        """Replaces the conversation, which lives on from now; False when the turn is not the first any more, or the
        conversation was forgotten meanwhile."""
        keys, data = self._keys.conversation(owner, session_id), msgspec.json.encode(conversation)
        step = (data, conversation.version, self._ttl_ms)
        if not await self._pipeline.run(_WRITE, keys, turn, *step):
            return False
        self._recent.remember(lambda: self._pipeline.run(_WRITE, keys, "", *step), len(data))
        note = (repr(time.time()), session_id, self._ttl_ms, MOST_SESSIONS)
        self._pipeline.defer_script(_NOTE, [self._keys.sessions(owner)], note, _noted)
        return True

    async def find(self, owner: str, session_id: str) -> tuple[Conversation, float] | None:
        """A conversation, and the seconds until it is forgotten."""
        chat, *_ = self._keys.conversation(owner, session_id)
        left, data = self._pipeline.call("PTTL", chat), self._pipeline.call("HGET", chat, "chat")
        seconds, found = await left / 1000, await data
        return (_decode(found), seconds) if found else None

    async def forget(self, owner: str, session_id: str) -> bool:
        """Whether there was anything to forget."""
        keys, left_ms = self._keys.conversation(owner, session_id), LINE_S * 1000
        await self._pipeline.call("ZREM", self._keys.sessions(owner), session_id)
        version: int = await self._pipeline.run(_FORGET, keys[:1], left_ms)
        if version:
            self._recent.remember(lambda: self._pipeline.run(_WRITE, keys, "", b"", version, left_ms), 0)
        return bool(version)

    async def latest(self, owner: str, limit: int) -> list[tuple[str, float]]:
        """The sessions of an owner that were used last, with the time of it, latest first."""
        since = time.time() - self._ttl_ms / 1000
        found = await self._pipeline.call("ZRANGE", self._keys.sessions(owner), 0, limit - 1, "REV", "WITHSCORES")
        used = [(name.decode(), float(at)) for name, at in zip(found[::2], found[1::2], strict=True)]
        return [(name, at) for name, at in used if at > since]


def _noted(_reply: Any, error: Exception | None) -> None:
    if error is not None:
        logger.warning("a session will be missing in its owner's list: %s", error)
