"""What is paused and draining, for all pools: the record that every replica follows, and that outlives them all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from llmstream.errors import Conflict
from llmstream.store.keys import Keys
from llmstream.store.lane_control import CONTROL_TTL_MS
from llmstream.store.pipeline import Script, Sender
from llmstream.types import QueueRule, QueueRules, encode

TRIES = 20
"""So often a change is made anew because another one came between."""

_PUT = Script(
    "put-rules",
    f"""
-- KEYS queues; ARGV rules, their version or '' for a new one, what the version was or '' for any older one
-- -> version, or 0
local version = tonumber(redis.call('HGET', KEYS[1], 'version') or 0)
if ARGV[3] ~= '' and version ~= tonumber(ARGV[3]) then return 0 end
local t = redis.call('TIME')
-- Grows also where the store has forgotten the last one.
local new = tonumber(ARGV[2]) or math.max(t[1] * 1000 + math.floor(t[2] / 1000), version + 1)
if new <= version then return 0 end
redis.call('HSET', KEYS[1], 'version', string.format('%.0f', new), 'rules', ARGV[1])
redis.call('PEXPIRE', KEYS[1], {CONTROL_TTL_MS})
return new
""",
)

_RENEW = Script(
    "renew-rules",
    f"""
-- KEYS queues -> version
redis.call('PEXPIRE', KEYS[1], {CONTROL_TTL_MS})
return tonumber(redis.call('HGET', KEYS[1], 'version') or 0)
""",
)

_decode = msgspec.json.Decoder(tuple[QueueRule, ...]).decode
Edit = Callable[[tuple[QueueRule, ...]], tuple[QueueRule, ...]]


class Control:
    """The one record of the rules. Each queue has a copy, which its claims obey."""

    def __init__(self, pipeline: Sender, keys: Keys) -> None:
        self._pipeline = pipeline
        self._key = keys.queues

    async def read(self) -> QueueRules:
        found: list[Any] = await self._pipeline.call("HMGET", self._key, "version", "rules")
        return QueueRules(int(found[0]), _decode(found[1])) if found[0] is not None else QueueRules()

    async def change(self, edit: Edit) -> QueueRules:
        """Replaces the rules by what ``edit`` makes of them. Raises Conflict when others change them all the time."""
        for _ in range(TRIES):
            known = await self.read()
            rules = edit(known.rules)
            if rules == known.rules:
                return known
            version = await self._pipeline.run(_PUT, [self._key], encode(rules), "", known.version)
            if version:
                return QueueRules(version, rules)
        raise Conflict("Others are changing the queues at the same time; try again.")

    async def restore(self, rules: QueueRules) -> None:
        """Writes rules again that the store may have forgotten; later ones stay."""
        await self._pipeline.run(_PUT, [self._key], encode(rules.rules), rules.version, "")

    async def write_anew(self, version: int) -> QueueRules:
        """Gives the rules, which are of ``version``, a later one than anybody has."""
        rules = (await self.read()).rules
        return QueueRules(await self._pipeline.run(_PUT, [self._key], encode(rules), "", version), rules)

    async def renew(self) -> int:
        """Lets the rules live on; returns their version."""
        version: int = await self._pipeline.run(_RENEW, [self._key])
        return version
