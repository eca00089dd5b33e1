"""The connection to RabbitMQ: declares the queues, publishes with confirmation, hands out what arrives, comes back
after every loss. Knows bytes and queues, and nothing of jobs. The only module that knows aio-pika.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from typing import Any
from urllib.parse import quote

import aio_pika
import aiormq
from aio_pika.abc import AbstractChannel, AbstractConnection, AbstractExchange, AbstractIncomingMessage, AbstractQueue

from llmstream.config_broker import BrokerSettings
from llmstream.config_schema import mask_url
from llmstream.errors import BrokerUnavailable, ConfigError, Overloaded
from llmstream.types import LANES, Lane

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 2.0
LOOK_S = 1.0
"""How old the known length of the queues may be."""
MAX_DEAD = 10_000
MAX_DELIVERIES = 1000
"""A message that comes back so often is a dead letter. Every cut connection counts: this only ends circles."""
CONSUMER_TIMEOUT_MS = 7 * 24 * 3600 * 1000
"""Jobs wait long; RabbitMQ before 3.12 ignores it and takes its own, half an hour, after which messages come again."""
REASON = "x-reason"

LOST = (aiormq.exceptions.AMQPError, RuntimeError, OSError, TimeoutError)
"""What aio-pika raises once a connection or channel is closed."""

logger = logging.getLogger(__name__)
for _library in ("aio_pika", "aiormq"):
    # What matters of it is said here; without a handler it would go to stderr in no form at all.
    logging.getLogger(_library).addHandler(logging.NullHandler())


class Delivery:
    """A message that RabbitMQ keeps until it is acknowledged, and gives to somebody else when we are gone."""

    def __init__(self, session: Session, message: AbstractIncomingMessage) -> None:
        self._session = session
        self._message = message

    @property
    def body(self) -> bytes:
        return self._message.body

    @property
    def kind(self) -> str | None:
        return self._message.type

    @property
    def message_id(self) -> str | None:
        return self._message.message_id

    @property
    def void(self) -> bool:
        """True once the message belongs to somebody else."""
        return self._session.lost.is_set()

    async def ack(self) -> None:
        """Takes the message off the queue. Where that gets lost it comes again."""
        try:
            await self._message.ack()
        except LOST as error:
            logger.debug("a message comes again, for it could not be acknowledged: %s", error)

    async def bury(self, reason: str) -> None:
        """Puts the message among the dead letters, with a reason. Raises BrokerUnavailable."""
        message = aio_pika.Message(
            self.body,
            headers={**self._message.headers, REASON: reason[:1000], "x-queue": self._message.routing_key or ""},
            content_type=self._message.content_type,
            delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
            message_id=self.message_id,
            type=self.kind,
        )
        try:
            with _losses():
                await self._session.bury(message)
        except LOST as error:
            raise BrokerUnavailable(f"The dead letter could not be posted: {error}", retry_after=1) from error
        await self.ack()


class Session:
    """One connection, from its beginning to its loss."""

    def __init__(self, connection: AbstractConnection, settings: BrokerSettings) -> None:
        self.name = settings.queue
        self.lost = asyncio.Event()
        self._connection = connection
        self._timeout_s = settings.timeout_s
        self._posting: AbstractChannel
        self._taking: AbstractChannel
        self._looking: AbstractChannel
        self._dead: AbstractExchange
        self._tags: list[tuple[AbstractQueue, str]] = []
        connection.close_callbacks.add(self._lose)

    def _lose(self, *_: object) -> None:
        self.lost.set()

    async def open(self) -> None:
        dead = f"{self.name}.dead"
        arguments = {
            "x-dead-letter-exchange": dead,
            "x-delivery-limit": MAX_DELIVERIES,
            "x-consumer-timeout": CONSUMER_TIMEOUT_MS,
        }
        for lane in LANES:
            await self._declare(queue_of(self.name, lane), arguments)
        await self._declare(dead, {"x-max-length": MAX_DEAD})
        self._posting, self._taking, self._looking = [await self._channel() for _ in range(3)]
        self._dead = await self._posting.declare_exchange(dead, aio_pika.ExchangeType.FANOUT, durable=True)
        await (await self._posting.get_queue(dead, ensure=False)).bind(self._dead)

    async def take(self, prefetch: int, callback: Callable[[Delivery], Awaitable[None]]) -> None:
        """Begins to hand messages to ``callback``, up to ``prefetch`` unacknowledged ones of each lane."""

        async def arrived(message: AbstractIncomingMessage) -> None:
            await callback(Delivery(self, message))

        (await self._taking.get_underlay_channel()).on_consumer_cancel_callbacks.add(self._lose)
        await self._taking.set_qos(prefetch_count=prefetch)
        for lane in LANES:
            queue = await self._taking.get_queue(queue_of(self.name, lane), ensure=False)
            self._tags.append((queue, await queue.consume(arrived)))

    async def stop_taking(self) -> None:
        """What was handed out stays ours until it is acknowledged or the session ends."""
        tags, self._tags = self._tags, []
        with suppress(*LOST):
            for queue, tag in tags:
                await queue.cancel(tag, timeout=self._timeout_s)

    async def publish(self, queue: str, message: aio_pika.Message) -> None:
        await self._posting.default_exchange.publish(message, routing_key=queue, mandatory=True)

    async def bury(self, message: aio_pika.Message) -> None:
        await self._dead.publish(message, routing_key="", mandatory=True)

    async def ready(self) -> int:
        """Messages that wait in all lanes and nobody has taken out."""
        found = [
            await self._looking.declare_queue(queue_of(self.name, lane), passive=True, timeout=self._timeout_s)
            for lane in LANES
        ]
        return sum(queue.declaration_result.message_count or 0 for queue in found)

    async def close(self) -> None:
        with suppress(*LOST):
            async with asyncio.timeout(self._timeout_s):
                await self._connection.close()

    async def _channel(self) -> AbstractChannel:
        channel = await self._connection.channel(on_return_raises=True)
        channel.close_callbacks.add(self._lose)
        return channel

    async def _declare(self, name: str, arguments: dict[str, Any]) -> None:
        """A queue that exists is used as it is, whoever made it; a new one is a durable quorum queue."""
        channel = await self._connection.channel()
        try:
            await channel.declare_queue(name, passive=True)
        except aiormq.exceptions.ChannelNotFoundEntity:
            channel = await self._connection.channel()
            await channel.declare_queue(name, durable=True, arguments={"x-queue-type": "quorum", **arguments})
        await channel.close()


class RabbitMQ:
    """RabbitMQ as it is there for us, over any number of sessions."""

    def __init__(
        self, settings: BrokerSettings, prefetch: int, on_message: Callable[[Delivery], Awaitable[None]] | None
    ) -> None:
        self.trouble: BrokerUnavailable | None = None
        """Set while RabbitMQ is away."""
        self.ready = 0
        """Messages nobody has taken out, as of the last look, and those posted since."""
        self._settings = settings
        self._prefetch = prefetch
        self._on_message = on_message
        self._session: Session | None = None
        self._connected = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Raises ConfigError when RabbitMQ cannot be used."""
        try:
            first = await self._begin()
        except LOST as error:
            raise ConfigError(
                f"RabbitMQ cannot be used: {self._said(error)} Check RABBITMQ_URL (broker.url) or RABBIT_MQ_HOST, "
                "RABBIT_MQ_PORT, RABBIT_MQ_LOGIN and RABBIT_MQ_PASSWORD, and that the server runs."
            ) from error
        self._task = asyncio.create_task(self._run(first), name="rabbitmq")

    async def stop_taking(self) -> None:
        """Takes no new messages, also not after another loss."""
        self._on_message = None
        if self._session is not None:
            await self._session.stop_taking()

    async def close(self) -> None:
        """Ends the session; what was not acknowledged goes to others."""
        while self._task is not None and not self._task.done():
            self._task.cancel()  # which asyncio.wait_for loses when what it waits for ends just then (Python 3.11)
            await asyncio.wait([self._task], timeout=0.1)
        if self._session is not None:
            await self._session.close()

    async def publish(self, queue: str, body: bytes, *, kind: str, message_id: str) -> None:
        """Posts a message and waits until RabbitMQ has it on its disks; after a loss posts it again.

        So it may be there twice; its id tells. Raises BrokerUnavailable, after which it may be there as well, and
        Overloaded when the queue refuses it.
        """
        message = aio_pika.Message(
            body,
            content_type="application/json",
            delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
            message_id=message_id,
            type=kind,
        )
        limit_s = self._settings.timeout_s
        try:
            async with asyncio.timeout(limit_s):
                while True:
                    if await self._posted(queue, message):
                        return
                    await asyncio.sleep(FIRST_PAUSE_S)
        except TimeoutError:
            raise BrokerUnavailable(
                f"RabbitMQ did not confirm the job within {limit_s:g} s (broker.timeout_s); try again.", retry_after=1
            ) from None

    async def _posted(self, queue: str, message: aio_pika.Message) -> bool:
        await self._connected.wait()
        session = self._session
        assert session is not None
        try:
            with _losses():
                await session.publish(queue, message)
        except aiormq.exceptions.PublishError:  # there is no such queue any more; another session makes it
            session.lost.set()
        except aiormq.exceptions.DeliveryError:
            raise Overloaded(f"RabbitMQ's queue {queue!r} takes no more messages; try again.", retry_after=1) from None
        except LOST as error:
            logger.debug("a message is posted again: %s", error)
        else:
            self.ready += 1
            return True
        return False

    def health(self) -> dict[str, Any]:
        if self.trouble is not None:
            return {"status": "error", "error": self.trouble.message}
        return {"status": "ok", "queue": self._settings.queue, "ready": self.ready}

    async def _run(self, session: Session) -> None:
        while True:
            await self._watch(session)
            self._connected.clear()
            self.trouble = BrokerUnavailable("RabbitMQ cannot be reached; try again.", retry_after=1)
            logger.warning("the connection to RabbitMQ is lost")
            await session.close()
            session = await self._reconnect()
            logger.info("RabbitMQ is back")

    async def _watch(self, session: Session) -> None:
        """Until the session is lost."""
        while not session.lost.is_set():
            try:
                with _losses():
                    self.ready = await session.ready()
            except LOST:
                return
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await session.lost.wait()

    async def _reconnect(self) -> Session:
        pause = FIRST_PAUSE_S
        while True:
            await asyncio.sleep(pause)
            pause = min(pause * 2, LONGEST_PAUSE_S)
            try:
                with _losses():
                    return await self._begin()
            except LOST as error:
                logger.warning("RabbitMQ cannot be reached: %s", self._said(error))

    async def _begin(self) -> Session:
        async with AsyncExitStack() as stack, asyncio.timeout(self._settings.timeout_s):
            connection = await aio_pika.connect(url_of(self._settings))
            session = Session(connection, self._settings)
            stack.push_async_callback(session.close)
            await session.open()
            if self._on_message is not None:
                await session.take(self._prefetch, self._on_message)
            self._session, self.trouble = session, None
            self._connected.set()
            stack.pop_all()
            return session

    def _said(self, error: BaseException) -> str:
        url = mask_url(url_of(self._settings))
        return f"{url}: {str(error) or type(error).__name__}".rstrip(".") + "."


@contextmanager
def _losses() -> Iterator[None]:
    """A closing connection cancels what waits for it, which is not meant for us."""
    try:
        yield
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise ConnectionError("the connection was closed") from None


def queue_of(name: str, lane: Lane) -> str:
    """The queue of a lane: that of ``default`` bears the bare name."""
    return name if lane == "default" else f"{name}.{lane}"


def url_of(settings: BrokerSettings) -> str:
    """Where RabbitMQ is, with the password."""
    if settings.url is not None:
        return settings.url.get_secret_value()
    password = settings.password.get_secret_value() if settings.password is not None else "guest"
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return f"amqp://{quote(settings.login, safe='')}:{quote(password, safe='')}@{host}:{settings.port}/"


@asynccontextmanager
async def open_rabbitmq(
    settings: BrokerSettings, prefetch: int, on_message: Callable[[Delivery], Awaitable[None]] | None
) -> AsyncIterator[RabbitMQ]:
    """RabbitMQ, connected; without ``on_message`` it is only posted to. Raises ConfigError."""
    broker = RabbitMQ(settings, prefetch, on_message)
    await broker.open()
    try:
        yield broker
    finally:
        await broker.close()
