"""Guards taken out one at a time, to see that the simulation finds out: a check whose absence nobody notices proves
nothing."""

from __future__ import annotations
import __future__

import functools
import inspect
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any
from unittest.mock import patch

from llmstream.acceptance import Acceptance
from llmstream.scheduler.control import QueueControl
from llmstream.scheduler.scheduler import Scheduler
from llmstream.store import job_scripts, lane_control, lanes
from llmstream.store.jobs import Jobs
from llmstream.store.pipeline import Pipeline, Script
from llmstream.store.writer import Writer
from tests.simulation.world import Outcome, simulate, uncollected

LIMIT = 2_000
"""So many schedules without a fault mean that nobody noticed."""
Simulate = Callable[[int], Outcome]
FORGETS: Mapping[str, Any] = {"forgets": True}
HELD: Mapping[str, Any] = {"held": True}
UNORDERED: Mapping[str, Any] = {"ordered": False}


@dataclass(frozen=True)
class Mutation:
    """A guard, and what stands there instead."""

    where: Script | Callable[..., Any]
    """The script or the method that has it."""
    guard: str
    instead: str = ""
    also: tuple[str, ...] = ()
    """Other guards of the same place, taken out with it because each of them is enough."""
    world: Mapping[str, Any] = field(default_factory=dict)
    """What all schedules have: what few have by chance, or what is missing where it backs the guard up."""
    rare: bool = False
    """Whether it takes long to find."""

    @contextmanager
    def applied(self) -> Iterator[Simulate]:
        """Gives a ``simulate`` without the guard."""
        if isinstance(self.where, Script):
            changed = self._changed(self.where.source)
            mutate = {self.where.source: changed}
            yield functools.partial(simulate, mutate=lambda source: mutate.get(source, source), **self.world)
        else:
            with _replaced(self.where, self._changed(textwrap.dedent(inspect.getsource(self.where)))):
                yield functools.partial(simulate, **self.world)

    def _changed(self, source: str) -> str:
        for guard, instead in ((self.guard, self.instead), *((other, "") for other in self.also)):
            assert source.count(guard) == 1, f"there is no such guard, or more than one: {guard}"
            source = source.replace(guard, instead)
        return source

    def first_fault(self, limit: int = LIMIT) -> Outcome | None:
        """Runs schedules until one breaks a truth."""
        with self.applied() as run, uncollected():
            return next((outcome for seed in range(limit) if (outcome := run(seed)).faults), None)


@contextmanager
def _replaced(method: Callable[..., Any], source: str) -> Iterator[None]:
    module = inspect.getmodule(method)
    assert isinstance(module, ModuleType)
    owner, _, name = method.__qualname__.rpartition(".")
    flags, found = __future__.annotations.compiler_flag, dict[str, Any]()
    exec(compile(source, str(module.__file__), "exec", flags), vars(module), found)
    with patch.object(getattr(module, owner), name, found[name]):
        yield


MUTATIONS = {
    # the log
    "attempt": Mutation(
        job_scripts.BEGIN, "local attempt = tonumber(job[2]) + 1", "local attempt = math.max(1, tonumber(job[2]))"
    ),
    "acknowledged before seen": Mutation(
        Writer._command,
        "entry, data = self._inflight",
        "entry, data = self._inflight; self.channel.publish(entry, self._logged)",
    ),
    "append read back": Mutation(Writer._refused, "reply and reply[0][1] == [FIELD, data]", "False"),
    # begin
    "repeated begin": Mutation(
        job_scripts.BEGIN, "local known = string.find(tokens, ARGV[6], 1, true)", "local known = nil"
    ),
    "begin under an older claim": Mutation(
        job_scripts.BEGIN,
        "if tonumber(ARGV[7]) < tonumber(job[7] or 0) then return {'superseded'} end",
        world={"strike": ("freeze", "begin")},
    ),
    "begin of an ended job": Mutation(
        job_scripts.BEGIN, "if job[1] ~= 'queued' and job[1] ~= 'in_progress' then return {'done'} end"
    ),
    # finish and end
    "end of an ended job": Mutation(
        job_scripts.END, "if job[1] ~= 'queued' and job[1] ~= 'in_progress' then return {'done', job[1]} end"
    ),
    "end of a handed over job": Mutation(
        job_scripts.HAND_OVER,
        "if job[1] ~= 'in_progress' or job[2] ~= ARGV[1] then return 0 end",
        world={"strike": ("close", "finish")},
        rare=True,
    ),
    "attempt that finishes": Mutation(
        job_scripts.FINISH,
        "if job[2] ~= ARGV[1] then return 'fenced' end",
        also=("if last_id ~= ARGV[7] then return 'behind' end",),
        world=UNORDERED,
    ),
    "finish of an ended job": Mutation(
        job_scripts.FINISH,
        "if job[1] ~= 'in_progress' then",
        "if false then",
        also=("if last_id ~= ARGV[7] then return 'behind' end",),
        world=UNORDERED,
    ),
    # the queue
    "owner who releases": Mutation(
        lanes._RELEASE, " or split(claim)[1] ~= ARGV[2]", world={"strike": ("freeze", "XADD")}
    ),
    "owner who leaves": Mutation(
        lanes._LEAVE, "if split(all[i + 1])[1] == ARGV[1] then requeue(all[i]) end", "requeue(all[i])"
    ),
    "lapse of a lease": Mutation(lanes._HEARTBEAT, "then taken = taken + requeue(all[i]) end", "then end"),
    "only the lapsed": Mutation(lanes._HEARTBEAT, "if split(all[i + 1])[1] == lapsed then", "if true then"),
    # limits of a caller
    "so many at once": Mutation(lanes._CLAIM, "number_of('r', own[7]) >= tonumber(own[8])", "false"),
    "the next one of the caller's": Mutation(lanes._SETTLE, "unparked = unpark(caller[7])"),
    "what it used": Mutation(Scheduler._run, "await self._settle(worker)\n        settling", "settling"),
    "comparing claims": Mutation(Scheduler._beat, "await self._reconcile(pool)", "pass"),
    # what is scheduled and paused
    "asleep until its time": Mutation(lanes._PUSH, "local asleep = due > now", "local asleep = false", world=HELD),
    "awake at its time": Mutation(lane_control.RIPEN, "ripen(now, 500) > 0", "ripen(now + 1000, 500) > 0", world=HELD),
    "back in line": Mutation(lane_control.SWEEP, "if part then wait(id, part) end", world=HELD),
    "pause on record": Mutation(
        QueueControl._spread, "await asyncio.gather(*(lanes.control(rules) for lanes in queues))", "pass", world=HELD
    ),
    # the outbox
    "telling of a settled job": Mutation(
        lanes._SETTLE, "local announced = announce(ARGV[1], now)", "local announced = 0"
    ),
    "telling of a removed job": Mutation(lanes._REMOVE, "if announce(ARGV[1], now) == 1 then", "if false then"),
    "telling of a job that never came into line": Mutation(
        lanes._REMOVE, "if waited == 0 and ARGV[3] ~= '' then", "if false then"
    ),
    "telling of a restored job": Mutation(
        Acceptance._accept_again, "created.status in TERMINAL and job.receivers", "False", world=FORGETS
    ),
    "telling of a reclaimed job": Mutation(
        lanes._RECLAIM,
        "if ARGV[i + 4] ~= '' then redis.call('HSET', hooked, id, ARGV[i + 4]) end",
        world=FORGETS,
        rare=True,
    ),
    # a store that comes back without its last writes
    "restoring a log": Mutation(Writer._command, "if self._life != self._presence.life:", "if False:", world=FORGETS),
    "restoring a closed log": Mutation(
        Writer.close, "self._recent.remember(self._again.write, 0)", "pass", world=FORGETS
    ),
    "restoring what moved on": Mutation(
        job_scripts.RESTORE,
        "if known > attempt or (known == attempt and not ours) then return 'fenced' end",
        world=FORGETS,
    ),
    "restoring in order": Mutation(
        job_scripts.RESTORE, "if before(at, position) then return 'hole' end", "first = 11", world=FORGETS
    ),
    "finishing again": Mutation(
        Writer.finish,
        "self._recent.remember(lambda: again.finish(end, data), len(data))",
        "pass",
        world=FORGETS,
    ),
    "submitting again": Mutation(
        Acceptance._enqueue,
        "self._store.recent.remember(lambda: self._accept_again(job, expected, unread_s), created.size)",
        "pass",
        world=FORGETS,
    ),
    "ending again": Mutation(
        Jobs._ended,
        "self._recent.remember(lambda: self._end_again(job_id, finished, previous), len(data))",
        "pass",
        world=FORGETS,
    ),
    "ending again in order": Mutation(Jobs._end_again, "ending.append(str(previous))", "pass", world=FORGETS),
    "no end before everybody was there": Mutation(
        Jobs.end, "await self._presence.recovered()", "pass", world=FORGETS, rare=True
    ),
    "claiming again": Mutation(
        Scheduler._reclaim, "await pool.lanes.reclaim(self.replica, running)", "pass", world=FORGETS
    ),
    "what gathered for another server": Mutation(Pipeline._reach, "everything=True", "everything=False", world=FORGETS),
    "who answers": Mutation(Pipeline._connected, "if self._guard is not None:", "if False:", world=FORGETS),
}
