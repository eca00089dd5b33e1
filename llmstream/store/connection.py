"""Makes connections to the store. Whoever asks for one owns it, so their number is known."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol, cast

from redis.asyncio.connection import ConnectionPool
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from llmstream.errors import ConfigError

READ_BYTES = 1 << 18


class Connection(Protocol):
    """The part of redis-py's connection that is used here."""

    @property
    def is_connected(self) -> bool: ...
    async def connect(self) -> None: ...
    async def can_read(self) -> bool: ...
    async def disconnect(self, nowait: bool = False) -> None: ...
    async def send_command(self, *args: Any, check_health: bool = True) -> None: ...
    async def send_packed_command(self, command: Iterable[bytes], check_health: bool = True) -> None: ...
    def pack_commands(self, commands: Iterable[Iterable[Any]]) -> list[bytes]: ...
    async def read_response(
        self,
        disable_decoding: bool = False,
        timeout: float | None = None,
        *,
        disconnect_on_error: bool = True,
        push_request: bool | None = False,
    ) -> Any: ...


Connect = Callable[[], Connection]


def connector(url: str, timeout_s: float) -> Connect:
    """Returns a function that makes unconnected connections to ``url``. Raises ConfigError for a bad URL.

    Deadlines are set where commands are sent; a socket timeout would also end reads that block on purpose.
    """
    try:
        pool = ConnectionPool.from_url(
            url,
            socket_timeout=None,
            socket_connect_timeout=timeout_s,
            retry=Retry(NoBackoff(), 0),
            protocol=2,
            socket_read_size=READ_BYTES,
        )
    except ValueError as error:
        raise ConfigError(
            "store.url (REDIS_URL) is not a store URL; expected redis://, rediss:// or unix://, "
            "for example redis://localhost:6379/0."
        ) from error
    return cast(Connect, pool.make_connection)
