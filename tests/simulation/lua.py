"""Runs the service's own Lua scripts over a :class:`Memory`, converting values as the real server does."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping
from typing import Any

from lupa import lua51
from redis.exceptions import ResponseError

from tests.simulation.memory import Memory

Mutate = Callable[[str], str]

_lua = lua51.LuaRuntime(encoding=None, register_eval=False, unpack_returned_tuples=False)


@functools.cache
def _compiled(source: str, mutate: Mutate | None) -> Any:
    return _lua.eval(f"function(KEYS, ARGV) {mutate(source) if mutate else source}\nend".encode())


@functools.cache
def _keys(names: tuple[bytes, ...]) -> Any:
    return _lua.table(*names)


@functools.cache
def _digest(source: bytes) -> bytes:
    return hashlib.sha1(source, usedforsecurity=False).hexdigest().encode()


class Scripts:
    """The script engine of one store."""

    def __init__(self, memory: Memory, mutate: Mutate | None = None) -> None:
        self.sources: dict[bytes, str] = {}
        """Scripts that the server has in its cache, by digest."""
        self._memory = memory
        self._mutate = mutate

    def evalsha(self, digest: bytes, count: bytes, *rest: bytes) -> Any:
        source = self.sources.get(digest)
        if source is None:
            raise ResponseError("NOSCRIPT No matching script. Please use EVAL.")
        return self._run(source, int(count), rest)

    def eval(self, source: bytes, count: bytes, *rest: bytes) -> Any:
        digest = _digest(source)
        self.sources[digest] = source.decode()
        return self._run(self.sources[digest], int(count), rest)

    def _run(self, source: str, count: int, rest: tuple[bytes, ...]) -> Any:
        global _commands
        _commands = self._memory.commands
        return _from_lua(_compiled(source, self._mutate)(_keys(rest[:count]), _lua.table(*rest[count:])))


def _call(name: bytes, *args: Any) -> Any:
    reply = _commands[name](*[arg if type(arg) is bytes else _text(arg) for arg in args])
    return reply if type(reply) in _PLAIN else _to_lua(reply)


def _pcall(name: bytes, *args: Any) -> Any:
    try:
        return _call(name, *args)
    except ResponseError as error:
        return _lua.table_from({b"err": str(error).encode()})


_PLAIN = frozenset((bytes, int))
_commands: Mapping[bytes, Callable[..., Any]] = {}
"""What the running script works on: registering functions anew for every run would cost more than the run."""
_lua.eval(b"function(call, pcall) redis = {call = call, pcall = pcall} end")(_call, _pcall)


def _text(number: float) -> bytes:
    return b"%d" % number if number == int(number) else b"%.17g" % number


def _to_lua(reply: Any) -> Any:
    if type(reply) is list:
        return _lua.table(*[_to_lua(item) for item in reply])
    return False if reply is None else reply


def _from_lua(value: Any) -> Any:
    if value is True:
        return 1
    if value is None or value is False:
        return None
    if isinstance(value, float):
        return int(value)
    if isinstance(value, int | bytes):
        return value
    if error := value[b"err"]:
        raise ResponseError(error.decode())
    items: list[Any] = []
    while (item := value[len(items) + 1]) is not None:
        items.append(_from_lua(item))
    return items
