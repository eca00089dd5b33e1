"""What requests and jobs cost the limits of whoever asks: taken when they come, set right when the job ends."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextvars import ContextVar

from llmstream.errors import BadRequest, LLMStreamError, RateLimited
from llmstream.routing.tokens import ANSWER_TOKENS, most_tokens
from llmstream.scheduler.accounts import Accounts
from llmstream.store.memory import in_memory
from llmstream.store.rate_limits import Charge, Rate, Taken, Verdict
from llmstream.store.store import Store
from llmstream.telemetry.observer import Observer
from llmstream.transcript import Transcript
from llmstream.types import CallerLimits, Counted, Finished, GenerateRequest, Job, JobState, Metered, Usage

REQUESTS, TOKENS = "requests", "tokens"
WINDOW_S = 60.0
EXCEEDED = "rate_limit_exceeded"


CHARGED: ContextVar[Sequence[Verdict]] = ContextVar("charged", default=())
"""How the caller's buckets are after the request of the running task; empty where it was not charged."""


class Charges:
    """Asks the buckets of callers, and tells them what was used."""

    def __init__(self, store: Store, accounts: Accounts, observer: Observer) -> None:
        self._store = store
        self._limits = store.rate_limits
        self._accounts = accounts
        self._observer = observer

    async def request(self, metered: Metered | None) -> None:
        """Charges a request that needs no generation. Raises RateLimited, StoreUnavailable."""
        if metered is not None and (rate := _requests(metered.limits)) is not None:
            self._judge(await self._limits.take(metered.who, Charge(rate)))

    async def job(self, job: Job, metered: Metered, *, again: bool = False) -> Taken | None:
        """Charges a request and the tokens that its job may use; ``again``: the job was charged before.

        Raises RateLimited, BadRequest for a job that needs more tokens than are ever there, StoreUnavailable.
        """
        limits = metered.limits
        charges = [Charge(rate) for rate in (_requests(limits),) if rate is not None]
        rate = _tokens(limits)
        if rate is not None:
            charges.append(Charge(rate, 0 if again else _most_tokens(job.request, rate.burst)))
        if not charges:
            return None
        taken = await self._limits.take(metered.who, *charges, job_id=job.id if rate is not None else None)
        self._judge(taken)
        return taken

    async def give_back(self, taken: Taken) -> None:
        """Nothing came of a request. Raises StoreUnavailable."""
        await self._limits.give_back(taken)

    async def settle(self, job_id: str, job: Job | None = None, finished: Finished | None = None) -> None:
        """Sets right what a job that is over has taken, as far as it was charged: by ``job`` and ``finished``, or else
        by its record. Repeating it changes nothing. Raises StoreUnavailable."""
        if job is not None and not _charged(job):
            return
        usage = finished.usage if finished is not None else None
        if job is None or usage is None:
            state = await self._store.records(job_id).find(job_id)
            if state is None or not state.done or not _charged(state.job):
                return
            job, usage = state.job, state.usage or await self._used(state)
        assert job.counted is not None
        await self._limits.settle(job.counted.who, TOKENS, job_id, usage.total_tokens)

    def _judge(self, taken: Taken) -> None:
        CHARGED.set(taken.verdicts)
        for verdict, charge in zip(taken.verdicts, taken.charges, strict=True):
            if not verdict.allowed and verdict.retry_after_s == math.inf:
                self.refused("too_large")
                raise BadRequest(
                    f"The request may use {charge.cost} tokens, prompt and answer, and no more than {verdict.size} a "
                    "minute are allowed to this caller: it can never be accepted. Shorten it, or ask for a smaller "
                    "max_tokens.",
                    param="max_tokens",
                    code=EXCEEDED,
                )
        refused = [verdict for verdict in taken.verdicts if not verdict.allowed]
        if refused:
            last = max(refused, key=lambda verdict: verdict.retry_after_s)
            self.refused(last.name)
            raise _limited(last, next(charge for charge in taken.charges if charge.rate.name == last.name))

    def refused(self, reason: str) -> None:
        """Counts a refusal."""
        self._observer.metrics.rate_limited.add(reason)

    async def _used(self, state: JobState) -> Usage:
        """What a job used that ended without anybody's telling."""
        transcript, log = Transcript(), self._store.memory if in_memory(state.job.id) else self._store.log
        while entries := await log.read(state.job.id, transcript.position):
            for entry in entries:
                transcript.extend(entry.payloads, entry.last)
        if transcript.empty:
            return Usage()
        return transcript.usage or await self._accounts.counted(state.job.request, transcript)


def counted(metered: Metered | None) -> Counted | None:
    """What a job of theirs keeps of the limits; None where it needs nothing."""
    if metered is None:
        return None
    limits = metered.limits
    found = Counted(
        metered.who,
        tokens=limits.tokens_per_minute is not None,
        concurrent=limits.concurrent_jobs,
        queued=limits.queued_jobs,
    )
    return None if found == Counted(metered.who) else found


def _charged(job: Job) -> bool:
    return job.counted is not None and job.counted.tokens


def _requests(limits: CallerLimits) -> Rate | None:
    limit = limits.requests_per_minute
    return None if limit is None else Rate(REQUESTS, limit, WINDOW_S, limits.burst_size or limit)


def _tokens(limits: CallerLimits) -> Rate | None:
    limit = limits.tokens_per_minute
    return None if limit is None else Rate(TOKENS, limit, WINDOW_S, limit)


def _most_tokens(request: GenerateRequest, most: int) -> int:
    """Tokens of the prompt and of the longest answer; one without a limit is taken for 1024 of them, or a quarter of
    the ``most`` that there are where that is less."""
    return most_tokens(request, min(ANSWER_TOKENS, max(1, most // 4)))


def _limited(verdict: Verdict, charge: Charge) -> LLMStreamError:
    after_s, rate = verdict.retry_after_s, charge.rate
    asked = f", and this request may use {charge.cost}" if verdict.name == TOKENS else ""
    return RateLimited(
        f"Too many {verdict.name}: {rate.limit} a minute are allowed to this caller, {rate.burst} of them at once; "
        f"{verdict.remaining} are left{asked}. Try again in {after_s:.1f} s.",
        retry_after=after_s,
    )
