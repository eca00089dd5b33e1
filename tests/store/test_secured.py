"""A store that wants TLS and a user with few rights."""

from __future__ import annotations

import asyncio
import re
import shutil
import socket
import time
from pathlib import Path

import pytest

import llmstream.store
from llmstream.access.credentials import issue
from llmstream.config import StoreSettings
from llmstream.errors import ConfigError
from llmstream.scheduler.scheduler import Scheduler
from llmstream.store.rate_limits import Charge, Rate
from llmstream.store.store import Store, open_store
from llmstream.types import Counted, GenerateRequest, Job, new_id
from tests.conftest import assert_every_key_expires
from tests.logs import drain, finished, text_of
from tests.replica import FAST, echo, replica, submit, tokens
from tests.test_readme import README
from tests.valkey import Valkey, stores, valkey
from tests.waiting import wait_until

REDIS = shutil.which("redis-server")
REQUEST = GenerateRequest.of("chat", "echo", {})


def documented_rights(server_has_waitaof: bool) -> list[str]:
    """The words of the README's ACL user."""
    (found,) = re.findall(r"ACL SETUSER llmstream on >PASSWORD ([^`]+)```", README)
    return [word for word in found.split() if server_has_waitaof or word != "+waitaof"]


async def openssl(*words: str) -> None:
    process = await asyncio.create_subprocess_exec("openssl", *words, stderr=asyncio.subprocess.DEVNULL)
    assert await process.wait() == 0


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


async def run_jobs(url: str) -> None:
    """Leads jobs through their lives: submitted, run, followed from another replica, cancelled."""
    async with stores(url, 2) as (store, other), replica(store, echo(delay_ms=5)) as scheduler:
        job, endless = await submit(store, tokens=5), await submit(store, tokens=100_000)
        log = await drain(other.log.follow(job.id))
        assert text_of(log) == tokens(5)
        await wait_until(lambda: scheduler.running == 1)
        await other.jobs.end(endless.id, finished("cancelled"))
        await other.lanes("echo", FAST).remove(endless.id)
        await wait_until(lambda: scheduler.running == 0)
        await store.jobs.join_session("s", job)
        assert await store.jobs.session_jobs("s") == [job.id]
        store.owned.note(job)
        assert await store.owned.latest(job.principal) == [job.id]
        key = issue("alice", scopes=["read"], models=None, now=0.0, expires_at=60.0)[1]
        await store.api_keys.add(key, 0.0)
        assert await store.api_keys.find(key.id) == key
        assert await store.api_keys.all() == [key]
        assert await store.api_keys.revoke(key.id)
        assert await store.api_keys.keep_secret(b"secret") == b"secret"
        assert (await store.lanes("echo", FAST).standing(job.id)).ahead is None
        assert (await store.lanes("echo", FAST).census()).served == 2
        assert await store.lanes("echo", FAST).recent(5)
        await limit_a_caller(store)
        assert store.presence.trouble is None
        await hold_back(store, other, scheduler)


async def hold_back(store: Store, other: Store, scheduler: Scheduler) -> None:
    """Pauses everything, schedules a job, looks at it from another replica, and lets it go on."""
    await scheduler.control.hold("paused", None, None, "admin")
    job = await submit(other, tokens=2, not_before=time.time() + 0.1)
    assert [lives.id async for page in other.lanes("echo", FAST).alive() for lives in page] == [job.id]

    async def aside() -> bool:
        return (await other.lanes("echo", FAST).standing(job.id)).paused

    await wait_until(aside)
    assert (await other.control.read()).rules == scheduler.control.rules.rules
    await scheduler.control.resume_all()
    assert text_of(await drain(other.log.follow(job.id))) == tokens(2)


async def limit_a_caller(store: Store) -> None:
    """Takes from a caller's buckets, and lets one of its jobs wait for another."""
    taken = await store.rate_limits.take("key", Charge(Rate("tokens", 10, 60.0, 10), 5), job_id="j")
    await store.rate_limits.settle("key", "tokens", "j", 1)
    await store.rate_limits.give_back(taken)
    lanes, one = store.lanes("p", FAST), Counted("key", concurrent=1)
    jobs = [Job(new_id(), REQUEST, "p", 0.0, counted=one) for _ in range(3)]
    for job in jobs:
        await lanes.push(job)
    found = await lanes.claim("r", 3)
    assert len(found.ids) == 1
    assert (await lanes.standing(jobs[2].id)).ahead is not None
    await lanes.settle(found.ids[0], "r", found.number)
    for job in jobs:
        await lanes.remove(job.id)


async def add_user(server: Valkey, *, waitaof: bool) -> None:
    rights = documented_rights(waitaof)
    assert await server.ask("ACL", "SETUSER", "llmstream", "on", ">secret/1", *rights) == b"+OK\r\n"


async def denials(server: Valkey) -> bytes:
    """How many commands were refused for want of rights."""
    async with stores(server.url) as (store,):
        return bytes(repr(await store.writes.call("ACL", "LOG")), "ascii")


async def test_the_documented_rights_are_enough(tmp_path: Path) -> None:
    """A user with the rights in the README, and no others, does everything that replicas do."""
    async with valkey(tmp_path) as server:
        await add_user(server, waitaof=True)
        await server.ask("ACL", "LOG", "RESET")
        await run_jobs(f"unix://llmstream:secret%2F1@{server.socket}")
        assert await denials(server) == b"[]"
        async with stores(server.url) as (store,):
            await assert_every_key_expires(store)


def test_every_command_is_documented() -> None:
    """The rights in the README name every command that the store's modules spell out."""
    given = {word.removeprefix("+").partition("|")[0] for word in documented_rights(True) if word.startswith("+")}
    source = "".join(path.read_text() for path in Path(llmstream.store.__path__[0]).glob("*.py"))
    used = set(re.findall(r"""(?:call|pack|ask|defer)\(+["']([A-Z]{3,})["']""", source)) | {"WAITAOF", "XREAD"}
    assert len(used) > 20
    optional, in_connection = {"config"}, {"client", "ping", "asking"}
    assert {command.lower() for command in used} - given <= optional | in_connection


async def test_a_wrong_password_is_explained(tmp_path: Path) -> None:
    """Starting with a wrong password is a ConfigError that names the setting, not the password."""
    async with valkey(tmp_path) as server:
        await add_user(server, waitaof=True)
        settings = StoreSettings.model_validate({"url": f"unix://llmstream:hunter2@{server.socket}"})
        with pytest.raises(ConfigError, match="REDIS_URL") as refused:
            async with open_store(settings, tmp_path):
                pass
        assert "hunter2" not in str(refused.value)


@pytest.mark.skipif(REDIS is None, reason="the packaged Valkey speaks no TLS; needs a redis-server on the PATH")
async def test_tls(tmp_path: Path) -> None:
    """A rediss:// URL with a certificate authority works as any other; without the authority it is refused."""
    key, certificate, port = tmp_path / "key.pem", tmp_path / "cert.pem", free_port()
    await openssl(
        *("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"),
        *("-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(certificate)),
    )
    tls = ["--tls-port", str(port), "--tls-cert-file", str(certificate), "--tls-key-file", str(key)]
    tls += ["--tls-ca-cert-file", str(certificate), "--tls-auth-clients", "no"]
    async with valkey(tmp_path, *tls, binary=Path(REDIS or "")) as server:
        await add_user(server, waitaof=False)
        url = f"rediss://llmstream:secret%2F1@localhost:{port}/0"
        await run_jobs(f"{url}?ssl_ca_certs={certificate}")
        with pytest.raises(ConfigError, match="certificate"):
            async with open_store(StoreSettings.model_validate({"url": url}), tmp_path):
                pass
