"""Claims jobs for free slots, keeps this replica's lease alive, and owns every running job."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from llmstream.config import BreakerSettings, DeadlineSettings, SchedulerSettings
from llmstream.errors import (
    DeadlineExceeded,
    Fenced,
    LLMStreamError,
    NotFound,
    Overloaded,
    ShuttingDown,
    StoreUnavailable,
)
from llmstream.filters.filters import Filters
from llmstream.providers.tokens import Tokenizer
from llmstream.routing.gates import Crossing, Gates
from llmstream.routing.retry import Backoff
from llmstream.routing.router import Router
from llmstream.routing.targets import REMOTE, Target
from llmstream.scheduler.accounts import Accounts
from llmstream.scheduler.admission import Admission
from llmstream.scheduler.audience import Audience
from llmstream.scheduler.charges import Charges
from llmstream.scheduler.control import QueueControl
from llmstream.scheduler.line import Line
from llmstream.scheduler.sleepers import Sleepers
from llmstream.scheduler.worker import Worker
from llmstream.store.breakers import Policy
from llmstream.store.budgets import POLL_S, Wait
from llmstream.store.lanes import ANNOUNCED, OTHERS_MAY, Claimed, Lanes, Standing
from llmstream.store.memory import in_memory
from llmstream.store.store import Store
from llmstream.telemetry.observer import Observer
from llmstream.types import Clock, Finished, Job

CLAIM_BATCH = 64
LIMITED_BATCH = 8
"""So many where each needs room at a target: what finds none was claimed in vain."""
NO_CLAIM = 0
"""The number that memory jobs run under, which no store has given out."""
MAX_BEAT_S = 0.5
RECONCILE_BEATS = 20
"""So often the claims are compared without a reason to doubt them: an answer may get lost after it was looked for."""
PATIENCE_S = 0.01
"""How long a replica that has its share leaves further jobs to the others, who have been told. They may be gone."""
HARD_STOP_S = 5.0
"""After the grace time: what a job gets to reach a token boundary and hand over."""
OVERDUE = "The job was still waiting at its deadline."
GONE_WITH_US = "The replica shut down, and a memory job ends with it; send the request again."

logger = logging.getLogger(__name__)


class Pool:
    """The slots of one pool on this replica and the jobs in them."""

    def __init__(self, lanes: Lanes, slots: int, line: Line, targets: Sequence[Target] = ()) -> None:
        self.lanes = lanes
        self.targets = targets
        """Those whose limits the jobs wait for; none: a free slot is enough."""
        self.full_until = 0.0
        """Until when, in the event loop's time, these have no room."""
        self.rooms = 0
        """How often we were told that they may have room again."""
        self.slots = slots
        self.line = line
        """The memory jobs that wait here."""
        self.running: dict[str, Worker] = {}
        self.unclaimed: set[str] = set()
        """Those of the running ones that the store does not know: memory jobs."""
        self.wake = asyncio.Event()
        self.sleepers = Sleepers(lanes, self.wake.set)
        self.claiming = 0
        """Jobs that a claim under way may bring."""
        self.more = False
        """Whether jobs may wait that there was no room for."""
        self.yielding = False
        """Whether jobs wait that are left to other replicas for a moment."""
        self.cancelled_since_ms = 0
        self.store_ahead_ms = 0.0
        """What the store's clock shows beyond the event loop's."""
        self.unsure = False
        """True after a lost answer: the store may count jobs as ours that do not run here, or the other way round."""
        self.life = 0
        """The server's life that has all our claims."""
        self.beats = 0
        self.last_beat = 0.0

    @property
    def free(self) -> int:
        return self.slots - len(self.running)

    @property
    def claimed(self) -> dict[str, Worker]:
        """Running jobs that the store counts as ours."""
        return {job_id: worker for job_id, worker in self.running.items() if job_id not in self.unclaimed}


class Scheduler:
    """The replica's share of the work.

    ``open`` starts claiming; ``close`` stops claiming, lets running jobs end or hands them over, and leaves.
    """

    def __init__(
        self,
        store: Store,
        router: Router,
        replica: str,
        *,
        settings: SchedulerSettings,
        deadlines: DeadlineSettings,
        backoff: Backoff,
        breaker: BreakerSettings | None = None,
        clock: Clock,
        accounts: Accounts | None = None,
        observer: Observer | None = None,
        filters: Filters | None = None,
    ) -> None:
        self.replica = replica
        self._filters = filters
        self._accounts = accounts
        self._store = store
        self._router = router
        self._settings = settings
        self._deadlines = deadlines
        self._backoff = backoff
        self._clock = clock
        self._observer = observer or Observer()
        self._beat_s = min(MAX_BEAT_S, settings.lease_s / 4)
        self._tasks: set[asyncio.Task[None]] = set()
        self._loops: list[asyncio.Task[None]] = []
        self._closing = False
        self.on_over: Callable[[str], None] | None = None
        """Gets the id of a logged job that has just ended here."""
        self.on_announced: Callable[[], None] | None = None
        """Hears that somebody is to be told of a job's end."""
        self.charges = Charges(store, accounts or Accounts({}, Tokenizer()), self._observer)
        """What callers have taken of their limits."""
        self.audience = Audience(store, replica, clock=clock, stop_job=self.stop_job, settle=self.charges.settle)
        self.pools: dict[str, Pool] = {}
        for name, most in router.pools.items():
            slots = min(most or settings.remote_slots, settings.remote_slots) if _is_remote(name) else most
            self.pools[name] = Pool(store.lanes(name, settings), slots, Line(settings.ageing_s), router.targets(name))
        self.control = QueueControl(store, self.lanes_of, clock)
        self.control.on_change = self._obey
        policy = _policy(breaker or BreakerSettings())
        self.gates = Gates(
            store.budgets(replica, lease_s=settings.lease_s),
            store.breakers(replica, policy, lease_s=settings.lease_s),
        )
        self._admission = Admission(router, self.gates, settings.ageing_s)

    async def open(self) -> None:
        self._store.signals.on_work = self.kick
        self._store.signals.on_cancel = self.stop_job
        self._store.signals.on_room = self.make_room
        self._store.memory.on_unread = self._end_unread
        for pool in self.pools.values():
            await self._beat(pool)
        await self.audience.open()
        if any(map(_is_remote, self.pools)):
            self._loops.append(asyncio.create_task(self._watch_targets(), name="heartbeat-targets"))
        for name, pool in self.pools.items():
            self._loops.append(asyncio.create_task(self._claim(name, pool), name=f"claim-{name}"))
            self._loops.append(asyncio.create_task(self._heartbeats(pool), name=f"heartbeat-{name}"))
            self._loops.append(asyncio.create_task(pool.sleepers.run(), name=f"sleepers-{name}"))

    async def close(self, grace_s: float) -> None:
        """Stops claiming. Jobs that others can continue are handed over at once, the rest within ``grace_s``; memory
        jobs that have not ended by then fail."""
        self._closing = True
        for pool in self.pools.values():
            pool.wake.set()
            for job_id in pool.line.ids:
                await self._end(pool, job_id, ShuttingDown(GONE_WITH_US))
        reason = ShuttingDown("This replica shuts down; another one goes on.")
        self._interrupt_all(reason, lambda worker: worker.can_hand_over and not in_memory(worker.job_id))
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=grace_s)
        self._interrupt_all(reason, lambda worker: True)
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=HARD_STOP_S)
        await _cancel(self._tasks)
        await _cancel(self._loops)
        await self.audience.close()
        for pool in self.pools.values():
            try:
                await pool.lanes.leave(self.replica)
            except StoreUnavailable as error:
                logger.warning("could not leave the queue; the lease lapses by itself: %s", error.message)

    def kick(self, pool: str) -> None:
        """Says that there may be work in a pool."""
        if pool in self.pools:
            self.pools[pool].wake.set()

    def make_room(self, target: str) -> None:
        """Says that a target may have room again."""
        self.gates.budgets.wake(target)
        for pool in self.pools.values():
            if any(each.name == target for each in pool.targets):
                pool.full_until, pool.rooms = 0.0, pool.rooms + 1
                pool.wake.set()

    def stop_job(self, job_id: str) -> None:
        """Stops a job that was ended from outside, if it runs here."""
        for pool in self.pools.values():
            pool.line.remove(job_id)
            worker = pool.running.get(job_id)
            if worker is not None:
                worker.interrupt(Fenced(f"Job {job_id} was ended from outside."))

    def run_here(self, job: Job) -> None:
        """Runs a memory job as soon as its turn comes. Raises Overloaded, ShuttingDown, Draining."""
        pool = self.pools[job.pool]
        self.control.refuse(job)
        if self._closing:
            raise ShuttingDown("This replica is shutting down; try again, another one will answer.", retry_after=1)
        if len(pool.line) >= self._settings.max_waiting:
            raise Overloaded(
                f"{len(pool.line)} memory jobs wait here already, which is the limit (scheduler.max_waiting).",
                retry_after=1,
            )
        self._store.memory.create(job)
        if pool.free > 0 and not pool.more and not pool.targets and not self.control.pauses(job):
            self._start(job.pool, pool, job.id, NO_CLAIM)
        else:
            pool.line.push(job, asyncio.get_running_loop().time() * 1000 + pool.store_ahead_ms)
            pool.more = True
            pool.wake.set()

    def expect(self, job: Job) -> None:
        """A job was put beside the line until its time comes."""
        if job.not_before is not None and (pool := self.pools.get(job.pool)) is not None:
            pool.sleepers.expect(job.not_before - self.store_time(job.pool))

    def store_time(self, pool: str) -> float:
        """Seconds since the epoch by the store's clock, about."""
        known = self.pools.get(pool)
        return self._clock() if known is None else asyncio.get_running_loop().time() + known.store_ahead_ms / 1000

    async def standing(self, job: Job) -> Standing:
        """Where a memory job stands, logged ones counted."""
        pool = self.pools[job.pool]
        if job.id in pool.line.aside:
            return Standing(None, None, pool.slots, paused=True)
        ahead, urgency = pool.line.standing(job.id) or (0, math.inf)
        found = await pool.lanes.standing(job.id, urgency)
        return found if found.ahead is None else found._replace(ahead=ahead + found.ahead)

    def takes(self, pool: str) -> bool:
        """Whether this replica is about to look after a new job of a pool itself; else all have to be told of it."""
        own = self.pools.get(pool)
        return own is not None and own.free > own.claiming and not own.yielding and not self._closing

    @property
    def running(self) -> int:
        return sum(len(pool.running) for pool in self.pools.values())

    async def _claim(self, name: str, pool: Pool) -> None:
        while not self._closing:
            await pool.wake.wait()
            pool.wake.clear()
            try:
                # A job that seems to wait may be running where its claim is about to be written again.
                await self._store.presence.recovered()
                await self._fill(name, pool)
            except StoreUnavailable as error:
                pool.unsure = True
                logger.warning("cannot claim jobs: %s", error.message)
                if not pool.targets:
                    self._start_own(name, pool, math.inf)
            except Exception:  # a replica that keeps its lease but claims nothing would be worse
                pool.unsure = True
                logger.exception("claiming jobs failed")

    async def _fill(self, name: str, pool: Pool) -> None:
        """Claims this replica's share at once, and a moment later what nobody else took; memory jobs have their turn
        among them."""
        pool.more, patient = True, True
        while pool.free > 0 and not self._closing and not self._full(pool):
            count = min(pool.free, LIMITED_BATCH if pool.targets else CLAIM_BATCH)
            claimed = await self._take(pool, count, patient)
            if pool.targets:
                await self._admit_all(name, pool, claimed)
            else:
                for job_id in claimed.ids:
                    self._start(name, pool, job_id, claimed.number)
                self._start_own(name, pool, claimed.first_left)
            if len(claimed.ids) == count or 0 < claimed.first_left < math.inf:
                continue
            if not claimed.left:
                pool.more = bool(pool.line)
                return
            patient, pool.yielding = False, True
            await asyncio.sleep(PATIENCE_S)
            pool.yielding = False

    async def _admit_all(self, name: str, pool: Pool, claimed: Claimed) -> None:
        """Starts the claimed jobs, then own ones, as long as their targets have room; the rest goes back in line."""
        states = {state.job.id: state.job for state in await self._store.jobs.find_all(claimed.ids)}
        left = list(claimed.ids)
        try:
            while left and await self._admit(name, pool, states.get(left[0]), left[0], claimed.number):
                del left[0]
        finally:
            for job_id in left:
                await pool.lanes.release(job_id, self.replica, wake=False)
        while pool.free > 0 and pool.line.urgency < claimed.first_left and not self._full(pool):
            job_id = pool.line.first
            if await self._admit(name, pool, self._store.memory.job(job_id), job_id, NO_CLAIM):
                pool.line.take(job_id)

    async def _admit(self, name: str, pool: Pool, job: Job | None, job_id: str, claim: int) -> bool:
        """Starts a job if its targets have room; if not, asks again later."""
        told = pool.rooms
        found = await self._admission.admit(job) if job is not None else None
        if isinstance(found, Wait):
            if pool.rooms == told:  # else there may be room since we were refused
                self._wait_for_room(pool, found.after_s)
            return False
        self._start(name, pool, job_id, claim, found, self._admission.urgency(job) if job is not None else 0.0)
        return True

    def _wait_for_room(self, pool: Pool, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        pool.full_until = loop.time() + min(seconds, POLL_S)
        loop.call_at(pool.full_until, pool.wake.set)

    @staticmethod
    def _full(pool: Pool) -> bool:
        return bool(pool.targets) and asyncio.get_running_loop().time() < pool.full_until

    def _start_own(self, name: str, pool: Pool, first_left: float) -> None:
        """Starts the memory jobs whose turn comes before that of the first job left in the store."""
        while pool.free > 0 and pool.line.urgency < first_left:
            self._start(name, pool, pool.line.pop(), NO_CLAIM)

    async def _take(self, pool: Pool, count: int, patient: bool) -> Claimed:
        pool.claiming = count
        try:
            if patient:
                held = len(pool.running) - len(pool.unclaimed)
                return await pool.lanes.claim_share(self.replica, count, held, pool.line.urgency)
            return await pool.lanes.claim(self.replica, count, pool.line.urgency)
        finally:
            pool.claiming = 0

    def _start(
        self,
        name: str,
        pool: Pool,
        job_id: str,
        claim: int,
        granted: Crossing | None = None,
        urgency: float = 0.0,
    ) -> None:
        if granted is not None and (self._closing or job_id in pool.running):
            self.gates.give_back(granted)
        if self._closing:  # it came too late and goes back when we leave
            return
        if job_id in pool.running:
            # Taken back and claimed again while it still runs here: it goes on, and its claim is looked after.
            pool.unsure = True
            return
        memory = self._store.memory if in_memory(job_id) else None
        if memory is not None:
            pool.unclaimed.add(job_id)
        worker = Worker(
            job_id,
            claim,
            replica=self.replica,
            jobs=memory or self._store.jobs,
            log=memory or self._store.log,
            router=self._router,
            gates=self.gates,
            granted=granted,
            urgency=urgency,
            deadlines=self._deadlines,
            max_attempts=self._settings.max_attempts,
            backoff=self._backoff,
            clock=self._clock,
            accounts=self._accounts,
            observer=self._observer,
            filters=self._filters,
        )
        pool.running[job_id] = worker
        task = asyncio.create_task(self._work(pool, worker), name=f"job-{name}-{job_id}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _work(self, pool: Pool, worker: Worker) -> None:
        try:
            await self._run(pool, worker)
        except StoreUnavailable as error:
            logger.error("the job waits for the store: %s", error.message, extra={"job_id": worker.job_id})
            pool.unsure = True
        except Exception:
            logger.exception("the job could not be ended", extra={"job_id": worker.job_id})
            pool.unsure = True
        finally:
            del pool.running[worker.job_id]
            pool.unclaimed.discard(worker.job_id)
            if pool.more:
                pool.wake.set()

    async def _run(self, pool: Pool, worker: Worker) -> None:
        try:
            result = await worker.run()
        except StoreUnavailable:
            raise
        except Exception:  # a defect of ours must not leave a job without an end
            logger.exception("the job broke the worker", extra={"job_id": worker.job_id})
            error = LLMStreamError("Something went wrong inside llmstream; its log has the details.")
            await self._end(pool, worker.job_id, error)
            result = "done"
        if in_memory(worker.job_id):
            if result == "release":
                await self._end(pool, worker.job_id, ShuttingDown(GONE_WITH_US))
            else:
                await self._settle(worker)
        elif result == "release":
            await pool.lanes.release(worker.job_id, self.replica)
        else:
            # Before the claim is given back: should we die in between, somebody else does both.
            await self._settle(worker)
            settling = pool.lanes.settle(worker.job_id, self.replica, worker.claim, dead=result == "dead")
            settling.add_done_callback(partial(self._settled, pool))
            if self.on_over is not None:
                self.on_over(worker.job_id)

    def _settled(self, pool: Pool, settling: asyncio.Future[Any]) -> None:
        error = None if settling.cancelled() else settling.exception()
        if error is not None:
            logger.warning("a job is over, but its claim may not be given back: %s", error)
            pool.unsure = True
        elif not settling.cancelled():
            if self.on_announced is not None and settling.result() & ANNOUNCED:
                self.on_announced()
            if settling.result() & OTHERS_MAY:
                pool.wake.set()

    async def _settle(self, worker: Worker) -> None:
        try:
            await self.charges.settle(worker.job_id, worker.job, worker.finished)
        except StoreUnavailable:
            raise
        except Exception:  # a defect of ours must not keep a job for ever
            logger.exception("what the job used is not counted", extra={"job_id": worker.job_id})

    async def _end(self, pool: Pool, job_id: str, error: LLMStreamError) -> None:
        finished = Finished(status="failed", at=self._clock(), failure=error.failure())
        with contextlib.suppress(NotFound):
            ended = await self._store.records(job_id).end(job_id, finished)
            self._store.log.note_end(job_id, ended)
            await self.charges.settle(job_id)
        if in_memory(job_id):
            pool.line.remove(job_id)
        else:
            await pool.lanes.remove(job_id)

    def _end_unread(self, job_id: str) -> None:
        """Cancels a memory job that nobody reads any more."""
        logger.info("nobody reads the job any more; it is cancelled", extra={"job_id": job_id})
        ended = self._store.memory.stop(job_id, Finished(status="cancelled", at=self._clock()))
        self.stop_job(job_id)
        self._store.log.note_end(job_id, ended)
        settling = asyncio.create_task(self._settle_ended(job_id), name=f"settle-{job_id}")
        self._tasks.add(settling)
        settling.add_done_callback(self._tasks.discard)

    async def _settle_ended(self, job_id: str) -> None:
        try:
            await self.charges.settle(job_id)
        except StoreUnavailable as error:
            logger.warning("what a memory job used is not counted: %s", error.message, extra={"job_id": job_id})

    async def _heartbeats(self, pool: Pool) -> None:
        loop, lag = asyncio.get_running_loop(), self._observer.metrics.loop_lag.of()
        while True:
            asleep = loop.time()
            await asyncio.sleep(self._beat_s)
            lag.add(max(0.0, loop.time() - asleep - self._beat_s))
            try:
                # When we were away ourselves, what came meanwhile is to be read before anybody is called silent.
                if loop.time() - asleep < 2 * self._beat_s:
                    for worker in pool.running.values():
                        worker.check_deadlines()
                for job_id in pool.line.overdue(self._clock()):
                    await self._end(pool, job_id, DeadlineExceeded(OVERDUE))
                self._store.memory.sweep()
                self._store.recent.let_go()
                await self._beat(pool)
            except StoreUnavailable as error:
                pool.unsure = True
                logger.warning("heartbeat failed: %s", error.message)
            except Exception:  # without a heartbeat the replica would lose all its jobs
                pool.unsure = True
                logger.exception("heartbeat failed")

    async def _watch_targets(self) -> None:
        """Keeps what is reserved of targets, and learns how their breakers are."""
        while True:
            await asyncio.sleep(self._beat_s)
            try:
                await self.gates.refresh()
            except StoreUnavailable as error:
                logger.warning("heartbeat of targets failed: %s", error.message)
            except Exception:  # without it slots of targets would lapse while they are used
                logger.exception("heartbeat of targets failed")

    def _obey(self) -> None:
        """The rules have changed: for logged jobs the store sees to them, for memory jobs we do."""
        for pool in self.pools.values():
            pool.line.hold(self.control.pauses)
            pool.more = True
            pool.wake.set()

    def lanes_of(self, pool: str) -> Lanes:
        """The queue of any pool, served here or not."""
        known = self.pools.get(pool)
        return known.lanes if known is not None else self._store.lanes(pool, self._settings)

    async def _beat(self, pool: Pool) -> None:
        asked = asyncio.get_running_loop().time()
        pulse = await pool.lanes.heartbeat(
            self.replica, 0 if self._closing else pool.slots, self._settings.lease_s, pool.cancelled_since_ms
        )
        pool.store_ahead_ms = pulse.now_ms - asked * 1000
        pool.cancelled_since_ms = pulse.now_ms - math.ceil(self._beat_s * 2000)
        if pulse.next_ms is not None:
            pool.sleepers.expect((pulse.next_ms - pulse.now_ms) / 1000)
        for job_id in pulse.cancelled:
            self.stop_job(job_id)
        await self.control.follow(pool.lanes, pulse)
        await self._reclaim(pool)
        if not self._store.presence.recovering:  # what seems to wait may run, and who seems to be gone may read
            for job_id in pulse.overdue:
                await self._end(pool, job_id, DeadlineExceeded(OVERDUE))
            await asyncio.gather(*(self.audience.look(job_id, pool.lanes) for job_id in pulse.unread))
        lapsed = asked - pool.last_beat > self._settings.lease_s
        pool.last_beat, pool.beats = asked, pool.beats + 1
        if pool.unsure or lapsed or pool.beats % RECONCILE_BEATS == 0:
            await self._reconcile(pool)
        pool.wake.set()

    async def _reclaim(self, pool: Pool) -> None:
        """After another server has answered: claims of running jobs may be among what it lost."""
        life = self._store.presence.life
        if pool.life != life:
            running = [(worker.job, worker.claim) for worker in pool.claimed.values() if worker.job is not None]
            await pool.lanes.reclaim(self.replica, running)
            pool.life, pool.unsure = life, True

    async def _reconcile(self, pool: Pool) -> None:
        """Gives back what the store counts as ours but nobody here runs: a lost answer must not strand a job. Stops
        what runs here but was taken over meanwhile."""
        pool.unsure = False
        known = set(pool.claimed)
        claimed = await pool.lanes.claimed_by(self.replica)
        for job_id in claimed - known - pool.running.keys():
            await pool.lanes.release(job_id, self.replica)
        for job_id in known - claimed:
            if worker := pool.running.get(job_id):
                worker.interrupt(Fenced(f"Job {job_id} was taken back while this replica was away."))

    def _interrupt_all(self, reason: ShuttingDown, chosen: Callable[[Worker], bool]) -> None:
        for pool in self.pools.values():
            for worker in pool.running.values():
                if chosen(worker):
                    worker.interrupt(reason)


def _is_remote(pool: str) -> bool:
    return pool == REMOTE or pool.startswith(f"{REMOTE}:")


def _policy(settings: BreakerSettings) -> Policy:
    return Policy(
        failures=settings.failures,
        window_s=settings.window_s,
        open_s=settings.open_s,
        max_open_s=settings.max_open_s,
    )


async def _cancel(tasks: set[asyncio.Task[None]] | list[asyncio.Task[None]]) -> None:
    pending = list(tasks)
    for task in pending:
        task.cancel()
    await asyncio.gather(*pending, return_exceptions=True)
