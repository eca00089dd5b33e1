"""Claims jobs for free slots, keeps this replica's lease alive, and owns every running job."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Callable

from llmstream.config import DeadlineSettings, SchedulerSettings
from llmstream.errors import Fenced, NotFound, ShuttingDown, StoreUnavailable
from llmstream.routing.router import REMOTE, Router
from llmstream.scheduler.audience import Audience
from llmstream.scheduler.worker import Worker
from llmstream.store.lanes import Lanes
from llmstream.store.store import Store
from llmstream.types import Clock, Failure, Finished

CLAIM_BATCH = 64
MAX_BEAT_S = 0.5
RECONCILE_BEATS = 20
"""So often the claims are compared without a reason to doubt them: an answer may get lost after it was looked for."""
HARD_STOP_S = 5.0
"""After the grace time: what a job gets to reach a token boundary and hand over."""

logger = logging.getLogger(__name__)


class Pool:
    """The slots of one pool on this replica and the jobs in them."""

    def __init__(self, lanes: Lanes, slots: int) -> None:
        self.lanes = lanes
        self.slots = slots
        self.running: dict[str, Worker] = {}
        self.wake = asyncio.Event()
        self.cancelled_since_ms = 0
        self.unsure = False
        """True after a lost answer: the store may count jobs as ours that do not run here, or the other way round."""
        self.beats = 0
        self.last_beat = 0.0

    @property
    def free(self) -> int:
        return self.slots - len(self.running)


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
        clock: Clock,
    ) -> None:
        self.replica = replica
        self._store = store
        self._router = router
        self._settings = settings
        self._deadlines = deadlines
        self._clock = clock
        self._beat_s = min(MAX_BEAT_S, settings.lease_s / 4)
        self._tasks: set[asyncio.Task[None]] = set()
        self._loops: list[asyncio.Task[None]] = []
        self._closing = False
        self.audience = Audience(store, replica, clock=clock, stop_job=self.stop_job)
        self.pools: dict[str, Pool] = {}
        for name, providers in router.pools.items():
            slots = settings.remote_slots if name == REMOTE else sum(provider.slots for provider in providers)
            self.pools[name] = Pool(store.lanes(name, settings), slots)

    async def open(self) -> None:
        self._store.signals.on_work = self.kick
        self._store.signals.on_cancel = self.stop_job
        for pool in self.pools.values():
            await self._beat(pool)
        await self.audience.open()
        for name, pool in self.pools.items():
            self._loops.append(asyncio.create_task(self._claim(name, pool), name=f"claim-{name}"))
            self._loops.append(asyncio.create_task(self._heartbeats(pool), name=f"heartbeat-{name}"))

    async def close(self, grace_s: float) -> None:
        """Stops claiming. Jobs that others can continue are handed over at once, the rest within ``grace_s``."""
        self._closing = True
        for pool in self.pools.values():
            pool.wake.set()
        reason = ShuttingDown("This replica shuts down; another one goes on.")
        self._interrupt_all(reason, lambda worker: worker.can_hand_over)
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

    def stop_job(self, job_id: str) -> None:
        """Stops a job that was ended from outside, if it runs here."""
        for pool in self.pools.values():
            worker = pool.running.get(job_id)
            if worker is not None:
                worker.interrupt(Fenced(f"Job {job_id} was ended from outside."))

    @property
    def running(self) -> int:
        return sum(len(pool.running) for pool in self.pools.values())

    async def _claim(self, name: str, pool: Pool) -> None:
        while not self._closing:
            await pool.wake.wait()
            pool.wake.clear()
            try:
                while pool.free > 0 and not self._closing:
                    claimed = await pool.lanes.claim(self.replica, min(pool.free, CLAIM_BATCH))
                    if self._closing or not claimed:  # what came too late goes back when we leave
                        break
                    for job_id in claimed:
                        self._start(name, pool, job_id)
            except StoreUnavailable as error:
                pool.unsure = True
                logger.warning("cannot claim jobs: %s", error.message)
            except Exception:  # a replica that keeps its lease but claims nothing would be worse
                pool.unsure = True
                logger.exception("claiming jobs failed")

    def _start(self, name: str, pool: Pool, job_id: str) -> None:
        if job_id in pool.running:
            # Taken back and claimed again while it still runs here: it goes on, and its claim is looked after.
            pool.unsure = True
            return
        worker = Worker(
            job_id,
            replica=self.replica,
            jobs=self._store.jobs,
            log=self._store.log,
            router=self._router,
            deadlines=self._deadlines,
            max_attempts=self._settings.max_attempts,
            clock=self._clock,
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
            pool.wake.set()

    async def _run(self, pool: Pool, worker: Worker) -> None:
        try:
            result = await worker.run()
        except StoreUnavailable:
            raise
        except Exception:  # a defect of ours must not leave a job without an end
            logger.exception("the job broke the worker", extra={"job_id": worker.job_id})
            await self._end(pool, worker.job_id, "Something went wrong inside llmstream; its log has the details.")
            result = "done"
        if result == "release":
            await pool.lanes.release(worker.job_id, self.replica)
        else:
            await pool.lanes.settle(worker.job_id, self.replica, dead=result == "dead")

    async def _end(self, pool: Pool, job_id: str, message: str, code: str | None = None) -> None:
        failure = Failure(message=message, code=code, status=504 if code == "deadline_exceeded" else 500)
        with contextlib.suppress(NotFound):
            ended = await self._store.jobs.end(job_id, Finished(status="failed", at=self._clock(), failure=failure))
            self._store.log.note_end(job_id, ended)
        await pool.lanes.remove(job_id)

    async def _heartbeats(self, pool: Pool) -> None:
        while True:
            await asyncio.sleep(self._beat_s)
            try:
                for worker in pool.running.values():
                    worker.check_deadlines()
                await self._beat(pool)
            except StoreUnavailable as error:
                pool.unsure = True
                logger.warning("heartbeat failed: %s", error.message)
            except Exception:  # without a heartbeat the replica would lose all its jobs
                pool.unsure = True
                logger.exception("heartbeat failed")

    async def _beat(self, pool: Pool) -> None:
        asked = asyncio.get_running_loop().time()
        pulse = await pool.lanes.heartbeat(
            self.replica, 0 if self._closing else pool.slots, self._settings.lease_s, pool.cancelled_since_ms
        )
        pool.cancelled_since_ms = pulse.now_ms - math.ceil(self._beat_s * 2000)
        for job_id in pulse.cancelled:
            self.stop_job(job_id)
        for job_id in pulse.overdue:
            await self._end(pool, job_id, "The job was still waiting at its deadline.", "deadline_exceeded")
        await asyncio.gather(*(self.audience.look(job_id, pool.lanes) for job_id in pulse.unread))
        lapsed = asked - pool.last_beat > self._settings.lease_s
        pool.last_beat, pool.beats = asked, pool.beats + 1
        if pool.unsure or lapsed or pool.beats % RECONCILE_BEATS == 0:
            await self._reconcile(pool)
        pool.wake.set()

    async def _reconcile(self, pool: Pool) -> None:
        """Gives back what the store counts as ours but nobody here runs: a lost answer must not strand a job. Stops
        what runs here but was taken over meanwhile."""
        pool.unsure = False
        known = set(pool.running)
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


async def _cancel(tasks: set[asyncio.Task[None]] | list[asyncio.Task[None]]) -> None:
    pending = list(tasks)
    for task in pending:
        task.cancel()
    await asyncio.gather(*pending, return_exceptions=True)
