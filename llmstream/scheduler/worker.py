"""One job's life on this replica, top to bottom."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, Literal, TypeVar

from llmstream.config import DeadlineSettings
from llmstream.errors import (
    DeadlineExceeded,
    Fenced,
    LLMStreamError,
    ShuttingDown,
    StoreUnavailable,
    UpstreamBroken,
    UpstreamTimeout,
)
from llmstream.filters.answer import AnswerFilter
from llmstream.filters.filters import Filters
from llmstream.providers.tokens import Tokenizer
from llmstream.routing.gates import Crossing, Gates
from llmstream.routing.retry import Backoff
from llmstream.routing.router import Router
from llmstream.routing.targets import Target
from llmstream.scheduler.accounts import Accounts
from llmstream.scheduler.asking import Asking
from llmstream.scheduler.intake import EVENT_BYTES, FilteredWriter, Intake
from llmstream.store.jobs import Begun, Jobs
from llmstream.store.log import Log
from llmstream.store.memory import AnyWriter, Memory
from llmstream.store.recent import RETRY_S
from llmstream.store.writer import SUPERSEDED
from llmstream.telemetry.observer import Attempt, Observer
from llmstream.telemetry.origin import ORIGIN, Origin
from llmstream.transcript import Transcript
from llmstream.types import (
    BEGINNING,
    Clock,
    Delta,
    Failure,
    Finished,
    Job,
    Restart,
    Started,
    Status,
    Usage,
)

Result = Literal["done", "dead", "release"]
"""What becomes of the claim: the job needs no more work, or was given up, or somebody else shall go on."""

FLUSH_S = 2.0

T = TypeVar("T")
logger = logging.getLogger(__name__)


class Worker:
    """Runs one claimed job: begin an attempt, generate, log, finish; again while attempts are left."""

    def __init__(
        self,
        job_id: str,
        claim: int,
        *,
        replica: str,
        jobs: Jobs | Memory,
        log: Log | Memory,
        router: Router,
        gates: Gates,
        granted: Crossing | None = None,
        urgency: float = 0.0,
        deadlines: DeadlineSettings,
        max_attempts: int,
        backoff: Backoff,
        clock: Clock,
        accounts: Accounts | None = None,
        observer: Observer | None = None,
        filters: Filters | None = None,
    ) -> None:
        self.job_id = job_id
        self.claim = claim
        self._replica = replica
        self._jobs = jobs
        self._log = log
        self._router = router
        self._gates = gates
        self._granted = granted
        self._urgency = urgency
        self._deadlines = deadlines
        self._max_attempts = max_attempts
        self._backoff = backoff
        self._clock = clock
        self._accounts = accounts or Accounts({}, Tokenizer())
        self._observer = observer or Observer()
        self._filters = filters
        self._screen: AnswerFilter | None = None
        self.finished: Finished | None = None
        """The end of the job, where it was written here."""
        self._whole = True
        """Whether all attempts so far were made here."""
        self._begun: Begun | None = None
        self._interruption: LLMStreamError | None = None
        self._scope: asyncio.Task[Any] | None = None
        self._asking: Asking | None = None
        self._answered = False
        self._intake: Intake | None = None

    async def run(self) -> Result:
        """Leads the job to a terminal state, or to the point where another replica has to go on.

        Raises StoreUnavailable when the store stays away for too long.
        """
        try:
            result = await self._live()
            if result != "release" and not self._answered:
                await self._router.stop(self.job_id)
            return result
        finally:
            if self._asking is not None:
                self._asking.close()
            elif self._granted is not None:
                self._gates.give_back(self._granted)

    async def _live(self) -> Result:
        while True:
            started = Started(replica=self._replica, at=self._clock())
            begun = await self._jobs.begin(self.job_id, started, self._max_attempts, self.claim)
            if begun == "done":
                # Whoever ended it may have died before the claim was settled.
                return await self._over()
            if begun == "exhausted":
                await self._give_up()
                return await self._over()
            if begun == "superseded":
                return "release"
            ORIGIN.set(Origin(begun.job.request_id, self.job_id))
            again = self._begun is not None
            self._whole = begun.attempt == 1 or (again and self._whole)
            seen = self._observer.begun(begun.job, begun.attempt, self._replica, started.at, again=again)
            self._begun, self._intake = begun, None
            writer = self._log.writer(begun)
            writer.on_lost = self.interrupt
            try:
                result = await self._attempt(begun, writer, seen)
            except Fenced as fenced:
                result = await self._superseded(fenced, seen)
            except ShuttingDown:
                result = await self._hand_over(begun, writer, seen)
            finally:
                seen.end("interrupted", self._intake)
                writer.close()
            if result == "release":
                writer.channel.upstream_s = None
            if result is not None:
                return result

    def interrupt(self, reason: LLMStreamError) -> None:
        """Stops the generation at the next token boundary; ``reason`` decides what follows."""
        before = self._interruption
        if before is None or isinstance(reason, Fenced) or isinstance(before, UpstreamBroken):
            self._interruption = reason
        if before is None and self._scope is not None:
            self._scope.cancel()

    @property
    def job(self) -> Job | None:
        """What is run; None before the first attempt has begun."""
        return self._begun.job if self._begun is not None else None

    @property
    def can_hand_over(self) -> bool:
        """Whether another replica could go on where this one stops."""
        continuable = self._asking is None or self._asking.continuable
        if self._screen is not None and not self._screen.faithful:
            return False
        return continuable and (self._intake is None or self._intake.text_only)

    def check_deadlines(self) -> None:
        """Called at every heartbeat: one timer for all jobs."""
        if self._begun is None or self._scope is None:
            return
        job, now = self._begun.job, self._clock()
        got_token = self._intake is not None and self._intake.got_token
        since = self._intake.silent_since if self._intake is not None else None
        silent = 0.0 if since is None else asyncio.get_running_loop().time() - since
        limits = self._deadlines
        if now > self._begun.started_at + limits.total_s:
            self.interrupt(DeadlineExceeded(f"The job did not finish within {limits.total_s:g} s of its start."))
        elif job.expires_at is not None and now > job.expires_at:
            self.interrupt(DeadlineExceeded("The job did not finish within the request's deadline_s."))
        elif not got_token and silent > limits.first_token_s:
            self.interrupt(UpstreamTimeout(f"The model gave no first token within {limits.first_token_s:g} s."))
        elif got_token and silent > limits.stall_s:
            self.interrupt(UpstreamTimeout(f"The model stalled: no token for {limits.stall_s:g} s."))

    async def _attempt(self, begun: Begun, writer: AnyWriter, seen: Attempt) -> Result | None:
        """One attempt. None: it failed in a way that another attempt may mend."""
        failed: LLMStreamError | None = None
        try:
            finished = await self._interruptible(self._generate(begun, writer, seen))
        except (Fenced, ShuttingDown, StoreUnavailable):
            raise
        except LLMStreamError as error:
            self._interruption = None
            if self._asking is not None and isinstance(error, UpstreamBroken):
                self._asking.blame(error)
            if error.retryable and begun.tries < self._max_attempts and await self._may_try_again(begun, writer):
                seen.end("retried", self._intake, error)
                return await self._pause(begun, writer, error)
            failed, finished = error, self._failed(error)
        except Exception:
            logger.exception("the provider broke", extra={"job_id": self.job_id})
            failed = LLMStreamError("Something went wrong inside llmstream; its log has the details.")
            finished = self._failed(failed)
        await writer.finish(finished)
        self.finished = finished
        seen.end(finished.status, self._intake, failed)
        return "dead" if finished.failure is not None and finished.failure.retryable else "done"

    async def _over(self) -> Result:
        state = await self._jobs.find(self.job_id)
        return "dead" if state is not None and state.dead else "done"

    async def _generate(self, begun: Begun, writer: AnyWriter, seen: Attempt) -> Finished:
        job, clock = begun.job, asyncio.get_running_loop().time
        screen = self._screen = self._filters.outward(job.request) if self._filters is not None else None
        outlet = writer if screen is None else FilteredWriter(writer, screen, self.interrupt)
        self._intake = intake = Intake(outlet, clock, seen)
        asking = self._asking = self._asking or Asking(job, self._router, self._gates, self._granted, self._urgency)
        seen.provider = asking.asked.provider.name
        transcript = await self._history(begun)
        if begun.attempt > 1 and begun.previous == BEGINNING:
            writer.append(Restart("the store lost what the earlier attempts wrote"), EVENT_BYTES)
        if job.continues is not None and (transcript is None or transcript.empty):
            transcript = await self._inherit(job.continues, job, asking, writer)
        shown = transcript is not None and not transcript.empty
        seen.fresh = not shown
        if transcript is not None and shown and self._complete(transcript, job):
            usage = await self._settled(writer, transcript.usage, job, asking.asked)
            return self._finished(usage, _reasons(transcript))
        if screen is not None:
            screen.begin(transcript.text if transcript is not None else "")
        if transcript is not None and asking.can_continue(transcript):
            seen.earlier_tokens = transcript.produced

        def restart() -> None:
            writer.append(Restart("the earlier attempt cannot be continued"), EVENT_BYTES)
            if screen is not None:
                screen.begin()

        # What a replica left when it died may start over, whatever becomes of answers that their model broke off.
        may_restart = job.restarts or asking.fault is None
        steps = asking.plan(transcript, may_restart=may_restart)
        start = clock()
        try:
            await asking.answer(steps, intake, restart if shown and may_restart else None)
            if screen is not None and screen.slow:
                await outlet.flush()
        finally:
            seen.provider = asking.asked.provider.name
            if self._whole:  # for the reader who compares it with their own time
                channel = writer.channel
                channel.upstream_s = (channel.upstream_s or 0.0) + clock() - start - intake.held_s
        self._answered = True
        usage = asking.hedged(await self._settled(writer, intake.usage, job, asking.asked))
        return self._finished(usage, intake.reasons)

    async def _settled(self, writer: AnyWriter, usage: Usage | None, job: Job, target: Target) -> Usage:
        """What the whole answer used and costs, also where nobody told."""
        if usage is None:
            await writer.flush()
            usage = await self._accounts.counted(job.request, await self._logged())
        return self._accounts.priced(usage, target.provider.name, target.model or job.request.model)

    async def _logged(self) -> Transcript:
        transcript = Transcript(said=True)
        while entries := await self._log.recall(self.job_id, transcript.position):
            for entry in entries:
                transcript.extend(entry.payloads, entry.last)
        return transcript

    async def _history(self, begun: Begun) -> Transcript | None:
        """The answer as earlier attempts left it. The log is fenced by now, so it cannot grow any more."""
        if begun.attempt == 1:
            return None
        transcript = Transcript(said=True)
        position = BEGINNING
        while position < begun.entry.last:
            entries = await self._log.recall(self.job_id, position)
            if not entries:  # a store that forgot it gets it back soon
                await asyncio.sleep(RETRY_S)
            for entry in entries:
                position = entry.last
                for event in entry.events:
                    if event.id < begun.entry.last:
                        transcript.add(event)
        return transcript

    async def _may_try_again(self, begun: Begun, writer: AnyWriter) -> bool:
        """Whether nothing was shown, or the next attempt can go on from it, or may start over visibly."""
        untouched = begun.attempt == 1 and begun.job.continues is None
        if begun.job.restarts or self._asking is None or self._asking.fault is None:
            return True
        if untouched and not (self._intake and self._intake.got_token):
            return True
        await writer.flush()
        transcript = await self._logged()
        return transcript.empty or self._complete(transcript, begun.job) or self._asking.can_continue(transcript)

    async def _inherit(self, old_id: str, job: Job, asking: Asking, writer: AnyWriter) -> Transcript | None:
        """Copies the answer of the job that this one was requeued from, as far as it can be continued."""
        transcript = Transcript(said=True)
        deltas: list[Delta] = []
        while entries := await self._log.recall(old_id, transcript.position):
            for event in (event for entry in entries for event in entry.events):
                transcript.add(event)
                if isinstance(event.data, Restart):
                    deltas.clear()
                elif isinstance(event.data, Delta):
                    deltas.append(event.data)
        if not asking.can_continue(transcript) and not self._complete(transcript, job):
            return None
        for delta in deltas:
            writer.append(delta, len(delta.text) + EVENT_BYTES)
        await writer.flush()
        return transcript

    @staticmethod
    def _complete(transcript: Transcript, job: Job) -> bool:
        """True when an earlier attempt logged the whole answer and only its terminal event is missing."""
        return len(_reasons(transcript)) >= job.request.choices

    def _finished(self, usage: Usage | None, reasons: dict[int, str]) -> Finished:
        cut = next((reason for reason in reasons.values() if reason in {"length", "content_filter"}), None)
        status: Status = "incomplete" if cut else "completed"
        return Finished(status=status, at=self._clock(), usage=usage, reason=cut)

    def _failed(self, error: LLMStreamError) -> Finished:
        logger.warning("job failed: %s", error.message, extra={"job_id": self.job_id})
        return Finished(status="failed", at=self._clock(), failure=error.failure())

    async def _pause(self, begun: Begun, writer: AnyWriter, error: LLMStreamError) -> Result | None:
        """Waits before the next attempt, still cancellable."""
        logger.warning("attempt failed: %s", error.message, extra={"job_id": self.job_id})
        untried = self._asking is not None and self._asking.untried
        delay = 0.0 if untried else self._backoff.delay(begun.tries, error.retry_after)
        if self._intake is not None:
            self._intake.silent_since = None
        try:
            await self._interruptible(self._rest(writer, delay))
        except DeadlineExceeded as overdue:
            await writer.finish(self._failed(overdue))
            return "done"
        return None

    @staticmethod
    async def _rest(writer: AnyWriter, delay: float) -> None:
        await writer.flush()
        await asyncio.sleep(delay)
        await writer.flush()  # a store that came back meanwhile may be getting the attempt again

    async def _superseded(self, fenced: Fenced, seen: Attempt) -> Result:
        """The log moved on: the job is over, or it belongs to whoever holds the claim now."""
        logger.info("attempt stopped: %s", fenced.message, extra={"job_id": self.job_id})
        if fenced.error_code == SUPERSEDED:
            self._observer.metrics.fenced.add()
        state = await self._jobs.find(self.job_id)
        over = state is None or state.done
        seen.end("cancelled" if over else "superseded", self._intake)
        return "done" if over else "release"

    async def _hand_over(self, begun: Begun, writer: AnyWriter, seen: Attempt) -> Result:
        try:
            async with asyncio.timeout(FLUSH_S):
                await writer.flush()
                await self._jobs.hand_over(self.job_id, begun.attempt)
            seen.end("handed_over", self._intake)
        except Fenced as fenced:
            return await self._superseded(fenced, seen)
        except (StoreUnavailable, TimeoutError) as error:
            logger.warning("the hand-over costs an attempt: %s", error, extra={"job_id": self.job_id})
        return "release"

    async def _give_up(self) -> None:
        failure = Failure(
            message=f"The job was tried {self._max_attempts} times and did not finish; what it produced is kept.",
            code="attempts_exhausted",
            retryable=True,
        )
        ended = await self._jobs.end(self.job_id, Finished(status="failed", at=self._clock(), failure=failure))
        self._log.note_end(self.job_id, ended)

    async def _interruptible(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs ``work`` so that :meth:`interrupt` can stop it without stopping us."""
        task = asyncio.current_task()
        assert task is not None
        cancelling = task.cancelling()
        self._scope, failure = task, None
        if self._interruption is not None:
            task.cancel()
        try:
            return await work
        except (Exception, asyncio.CancelledError) as error:
            failure = error
            raise
        finally:
            self._scope = None
            if self._interruption is not None and task.cancelling() > cancelling:
                await _absorb(task)
                if task.cancelling() > cancelling:
                    raise asyncio.CancelledError
                raise self._interruption from None
            if isinstance(failure, asyncio.CancelledError) and task.cancelling() == cancelling:
                raise UpstreamBroken("The model's side cancelled the generation.") from None


async def _absorb(task: asyncio.Task[Any]) -> None:
    """Takes one cancellation back, also where it has not come through yet."""
    with suppress(asyncio.CancelledError):
        await asyncio.sleep(0)
    task.uncancel()


def _reasons(transcript: Transcript) -> dict[int, str]:
    return {index: choice.finish_reason for index, choice in transcript.choices.items() if choice.finish_reason}
