"""What is taken from inside redis-py still stands there."""

from __future__ import annotations

import pytest

from llmstream.errors import ConfigError
from llmstream.store.connection import Refusal, connector, pack
from llmstream.store.store import Store


async def test_the_socket_is_where_it_is_looked_for(store: Store) -> None:
    """A connected redis-py connection has the transport that batches are sent over, and lets go of what comes back."""
    assert store.embedded is not None
    connection = connector(store.embedded.url, 5.0)()
    await connection.connect()
    try:
        assert connection._link._writer is not None
        assert connection._link._writer.transport is connection._transport
        assert connection._transport is not None
        assert connection._transport.get_protocol() is connection
        connection.write([pack(("ECHO", "a")), pack(("NOSUCH",)), pack(("ECHO", "b"))])
        replies: list[object] = []
        while len(replies) < 3:
            replies += await connection.receive(3 - len(replies))
        assert (replies[0], replies[2]) == (b"a", b"b")
        assert isinstance(replies[1], Refusal)
        assert not connection.closed_by_server
    finally:
        await connection.close()
    with pytest.raises(ConnectionError, match="not open"):
        connection.write([pack(("PING",))])


def test_a_bad_url_is_a_configuration_error() -> None:
    """What is no store URL is refused with the forms that are allowed."""
    with pytest.raises(ConfigError, match="redis://"):
        connector("http://example.com", 1.0)
