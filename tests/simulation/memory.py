"""The dozen commands that the service uses, over plain dictionaries, with the replies of the real server."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from redis.exceptions import ResponseError

_TOO_SMALL = "ERR The ID specified in XADD is equal or smaller than the target stream top item"
_INFINITY = float("inf")

Hash = dict[bytes, bytes]
Ranking = dict[bytes, float]
Stream = list[tuple[tuple[int, int], list[bytes]]]


class Contents(NamedTuple):
    """Keys with their values, and when they expire."""

    data: dict[bytes, Any]
    expires: dict[bytes, int]


class Memory:
    """Hashes, sorted sets and streams; keys remember when they would expire but never do."""

    def __init__(self, *, ordered: bool = True) -> None:
        self.data: dict[bytes, Any] = {}
        self.expires: dict[bytes, int] = {}
        self.written: set[tuple[bytes, bytes, bytes]] = set()
        """Every entry that was ever acknowledged: its stream, its id and its value, still there or not."""
        self.now_ms = 0.0
        self.run_id = 1
        """Another one after each start of the server."""
        self.on_publish: Callable[[bytes, bytes], int] = lambda channel, message: 0
        self._ordered = ordered
        """False takes away what fences: streams accept any id."""
        self.commands: dict[bytes, Callable[..., Any]] = {
            name.removeprefix("_do_").upper().encode(): getattr(self, name) for name in _commands()
        }

    def copy(self) -> Contents:
        """What a server would find that started from a copy of the files made now."""
        return Contents(
            {key: value.copy() if type(value) is not bytes else value for key, value in self.data.items()},
            self.expires.copy(),
        )

    def restart(self, contents: Contents | None = None) -> None:
        """Another server takes over, with everything or with what an older copy holds."""
        self.run_id += 1
        if contents is not None:
            self.data, self.expires = contents

    def __call__(self, name: bytes, *args: bytes) -> Any:
        """Runs one command. Raises ResponseError as the server's error reply."""
        return self.commands[name](*args)

    def _hash(self, key: bytes) -> Hash:
        found: Hash = self.data.get(key) or {}
        return found

    def _ranking(self, key: bytes) -> Ranking:
        found: Ranking = self.data.get(key) or {}
        return found

    def _stream(self, key: bytes) -> Stream:
        found: Stream = self.data.get(key) or []
        return found

    def _shrunk(self, key: bytes) -> None:
        if not self.data[key]:
            self._do_del(key)

    def _do_ping(self) -> bytes:
        return b"PONG"

    def _do_info(self, *sections: bytes) -> bytes:
        return b"run_id:%d\r\nmaster_replid:%d\r\nloading:0\r\n" % (self.run_id, self.run_id)

    def _do_set(self, key: bytes, value: bytes, px: bytes, ttl_ms: bytes) -> bytes:
        self.data[key] = value
        self._do_pexpire(key, ttl_ms)
        return b"OK"

    def _do_get(self, key: bytes) -> bytes | None:
        value: bytes | None = self.data.get(key)
        return value

    def _do_time(self) -> list[bytes]:
        return time_of(self.now_ms)

    def _do_publish(self, channel: bytes, message: bytes) -> int:
        return self.on_publish(channel, message)

    def _do_pttl(self, key: bytes) -> int:
        if key not in self.data:
            return -2
        return self.expires[key] - int(self.now_ms) if key in self.expires else -1

    def _do_pexpire(self, key: bytes, ttl_ms: bytes) -> int:
        if key not in self.data:
            return 0
        self.expires[key] = int(self.now_ms) + int(ttl_ms)
        return 1

    def _do_del(self, *keys: bytes) -> int:
        for key in keys:
            self.expires.pop(key, None)
        return sum(self.data.pop(key, None) is not None for key in keys)

    def _do_hget(self, key: bytes, field: bytes) -> bytes | None:
        return self._hash(key).get(field)

    def _do_hmget(self, key: bytes, *fields: bytes) -> list[bytes | None]:
        return [self._hash(key).get(field) for field in fields]

    def _do_hexists(self, key: bytes, field: bytes) -> int:
        return int(field in self._hash(key))

    def _do_hgetall(self, key: bytes) -> list[bytes]:
        return [part for pair in self._hash(key).items() for part in pair]

    def _do_hlen(self, key: bytes) -> int:
        return len(self._hash(key))

    def _do_hkeys(self, key: bytes) -> list[bytes]:
        return list(self._hash(key))

    def _do_hvals(self, key: bytes) -> list[bytes]:
        return list(self._hash(key).values())

    def _do_hset(self, key: bytes, *pairs: bytes) -> int:
        fields = self.data.setdefault(key, {})
        before = len(fields)
        fields.update(zip(pairs[::2], pairs[1::2], strict=True))
        return len(fields) - before

    def _do_hincrby(self, key: bytes, field: bytes, by: bytes) -> int:
        if by == b"-0":
            raise ResponseError("ERR value is not an integer or out of range")
        number = int(self._hash(key).get(field, b"0")) + int(by)
        self._do_hset(key, field, b"%d" % number)
        return number

    def _do_hdel(self, key: bytes, *fields: bytes) -> int:
        found = self._hash(key)
        removed = sum(found.pop(field, None) is not None for field in fields)
        if removed:
            self._shrunk(key)
        return removed

    def _do_zadd(self, key: bytes, *args: bytes) -> int:
        only_new = args[0] == b"NX"
        score, member = args[-2:]
        ranking = self.data.setdefault(key, {})
        new = member not in ranking
        if new or not only_new:
            ranking[member] = float(score)
        return int(new)

    def _do_zrem(self, key: bytes, member: bytes) -> int:
        if self._ranking(key).pop(member, None) is None:
            return 0
        self._shrunk(key)
        return 1

    def _do_zrange(self, key: bytes, first: bytes, last: bytes) -> list[bytes]:
        assert (first, last) == (b"0", b"-1"), "all that the service asks for here"
        return [member for _, member in self._between(key, b"-inf", b"+inf")]

    def _do_zcard(self, key: bytes) -> int:
        return len(self._ranking(key))

    def _do_zscore(self, key: bytes, member: bytes) -> bytes | None:
        score = self._ranking(key).get(member)
        return None if score is None else _number(score)

    def _between(self, key: bytes, low: bytes, high: bytes) -> list[tuple[float, bytes]]:
        ranking = self._ranking(key)
        if not ranking:
            return []
        (bottom, over), (top, under) = _bound(low), _bound(high)
        return sorted(
            (score, member)
            for member, score in ranking.items()
            if (score > bottom if over else score >= bottom) and (score < top if under else score <= top)
        )

    def _do_zcount(self, key: bytes, low: bytes, high: bytes) -> int:
        return len(self._between(key, low, high))

    def _do_zrangebyscore(self, key: bytes, low: bytes, high: bytes, *options: bytes) -> list[bytes]:
        found = self._between(key, low, high)
        if b"LIMIT" in options:
            at = options.index(b"LIMIT")
            start, count = int(options[at + 1]), int(options[at + 2])
            found = found[start : start + count]
        if b"WITHSCORES" in options:
            return [part for score, member in found for part in (member, _number(score))]
        return [member for _, member in found]

    def _within(self, key: bytes, low: bytes, high: bytes) -> list[bytes]:
        members = sorted(self._ranking(key))
        above = [each for each in members if (each >= low[1:] if low[:1] == b"[" else each > low[1:])]
        return [each for each in above if (each <= high[1:] if high[:1] == b"[" else each < high[1:])]

    def _do_zlexcount(self, key: bytes, low: bytes, high: bytes) -> int:
        return len(self._within(key, low, high))

    def _do_zrangebylex(
        self, key: bytes, low: bytes, high: bytes, limit: bytes, start: bytes, count: bytes
    ) -> list[bytes]:
        return self._within(key, low, high)[int(start) : int(start) + int(count)]

    def _do_zremrangebyscore(self, key: bytes, low: bytes, high: bytes) -> int:
        found = self._between(key, low, high)
        for _, member in found:
            self._do_zrem(key, member)
        return len(found)

    def _do_zremrangebyrank(self, key: bytes, start: bytes, end: bytes) -> int:
        ranked = sorted((score, member) for member, score in self._ranking(key).items())
        first, last = (int(rank) + len(ranked) * (int(rank) < 0) for rank in (start, end))
        found = ranked[max(first, 0) : last + 1] if last >= 0 else []
        for _, member in found:
            self._do_zrem(key, member)
        return len(found)

    def _do_xadd(self, key: bytes, *args: bytes) -> bytes | None:
        if args[0] == b"NOMKSTREAM":
            if key not in self.data:
                return None
            args = args[1:]
        stream: Stream = self.data.get(key) or []
        wanted = _entry_id(args[0])
        if self._ordered and stream and wanted <= stream[-1][0]:
            raise ResponseError(_TOO_SMALL)
        self.data.setdefault(key, stream).append((wanted, list(args[1:])))
        self.written.add((key, args[0], args[2]))
        return args[0]

    def _do_xrange(self, key: bytes, start: bytes, end: bytes, *options: bytes) -> list[list[Any]]:
        found = [entry for entry in self._stream(key) if _from(start, entry[0]) and _upto(end, entry[0])]
        return _entries(found, options)

    def _do_xrevrange(self, key: bytes, end: bytes, start: bytes, *options: bytes) -> list[list[Any]]:
        found = [entry for entry in self._stream(key) if _from(start, entry[0]) and _upto(end, entry[0])]
        return _entries(found[::-1], options)


@functools.cache
def _commands() -> list[str]:
    return [name for name in dir(Memory) if name.startswith("_do_")]


def time_of(now_ms: float) -> list[bytes]:
    """A moment as TIME tells it: seconds and microseconds."""
    seconds, rest = divmod(int(now_ms * 1000), 1_000_000)
    return [b"%d" % seconds, b"%d" % rest]


def _number(score: float) -> bytes:
    return b"%d" % score if score.is_integer() else repr(score).encode()


def _bound(text: bytes) -> tuple[float, bool]:
    """A bound of a range of scores, and whether it is excluded."""
    exclusive = text.startswith(b"(")
    return {b"-inf": -_INFINITY, b"+inf": _INFINITY}.get(text) or float(text[exclusive:]), exclusive


def _entry_id(text: bytes) -> tuple[int, int]:
    attempt, _, seq = text.partition(b"-")
    return int(attempt), int(seq)


def _from(start: bytes, entry_id: tuple[int, int]) -> bool:
    if start == b"-":
        return True
    return entry_id > _entry_id(start[1:]) if start.startswith(b"(") else entry_id >= _entry_id(start)


def _upto(end: bytes, entry_id: tuple[int, int]) -> bool:
    return end == b"+" or entry_id <= _entry_id(end)


def _entries(found: Stream, options: Sequence[bytes]) -> list[list[Any]]:
    count = int(options[1]) if options else len(found)
    return [[b"%d-%d" % entry_id, fields] for entry_id, fields in found[:count]]
