"""Another core behind the queue: it takes orders out, and stores their results where we look for them.

What it has been given cannot be taken back, and it knows nothing of ours. So an order is posted once for all who ask
for it, and again only when it counts as lost: no result ``broker.result_timeout_s`` after it was posted.
"""

from __future__ import annotations

import asyncio
import logging

from llmstream.broker.messages import ORDER, Order, answer_of, task
from llmstream.broker.rabbitmq import RabbitMQ
from llmstream.config_broker import BrokerSettings
from llmstream.errors import BrokerUnavailable, Conflict, DeadlineExceeded, Overloaded, StoreUnavailable
from llmstream.store.results import Results
from llmstream.store.store import Store
from llmstream.types import Failure, new_id

FIRST_LOOK_S, LONGEST_LOOK_S = 0.02, 0.5
POSTED, REFUSED = "posted", "refused"
"""What became of the order that somebody posted; while they do, their own mark stands there."""

logger = logging.getLogger(__name__)


class OtherCore:
    """Runs orders, and answers with what it stored."""

    def __init__(self, settings: BrokerSettings, store: Store, results: Results, broker: RabbitMQ) -> None:
        self._settings = settings
        self._store = store
        self._results = results
        self._broker = broker

    async def ask(self, order: Order, deadline_s: float | None = None) -> str | Failure:
        """What an order came to. One that has a result, or is on its way, is not posted again.

        Raises Conflict when the id belongs to another order; BrokerUnavailable, Overloaded and StoreUnavailable, after
        which it may be asked for again; DeadlineExceeded.
        """
        known = await self._store.repeats.point(f"order-{order.job_id}", order.fingerprint, self._results.retention_s)
        if known != order.fingerprint:
            raise Conflict(
                f"The job id {order.job_id!r} is taken by a different request; choose another id.", param="job_id"
            )
        limit_s = min(deadline_s or self._settings.result_timeout_s, self._settings.result_timeout_s)
        try:
            async with asyncio.timeout(limit_s):
                return answer_of(await self._result(order))
        except TimeoutError:
            raise DeadlineExceeded(
                f"No core stored a result within {limit_s:g} s; check that one reads the queue "
                f"{self._settings.queue!r} and has the same REDIS_PREFIX. Asking again under the same job_id is fine."
            ) from None

    async def _result(self, order: Order) -> bytes:
        found, posted, pause = await self._results.get(order.job_id), False, FIRST_LOOK_S
        while found is None:
            posted = posted or await self._post(order)
            await asyncio.sleep(pause)
            pause = min(pause * 1.5, LONGEST_LOOK_S)
            try:
                found = await self._results.get(order.job_id)
            except StoreUnavailable as error:
                if not posted:
                    raise
                logger.debug("a result has to wait: %s", error.message)
        return found

    async def _post(self, order: Order) -> bool:
        """Whether the order is in the queue; of all who try at once one posts it."""
        repeats, name, mark = self._store.repeats, f"posted-{order.job_id}", new_id()
        lease_s = self._settings.timeout_s + 1.0
        held = await repeats.point(name, mark, lease_s, instead_of=REFUSED)
        if held != mark:
            return held == POSTED
        try:
            await self._broker.publish(self._settings.queue, task(order), kind=ORDER, message_id=order.job_id)
        except (BrokerUnavailable, Overloaded):
            await repeats.point(name, REFUSED, lease_s, instead_of=mark)
            raise
        try:
            await repeats.point(name, POSTED, self._settings.result_timeout_s, instead_of=mark)
        except StoreUnavailable as error:
            logger.warning("an order may be posted twice: %s", error.message, extra={"job_id": order.job_id})
        return True
