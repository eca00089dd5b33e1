"""From a request that names a webhook to its receiver: a real server, a real receiver, and what may go wrong."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from llmstream.config import Settings
from llmstream.gateway import Gateway
from llmstream.opening import open_gateway
from llmstream.server import Server
from llmstream.types import GenerateRequest, Webhook
from llmstream.webhooks import dispatcher
from tests.api.reading import Json, finished, status, submit
from tests.conftest import assert_every_key_expires, echo_settings
from tests.scrape import scrape
from tests.waiting import wait_until
from tests.webhooks.receiver import SECRET, Receiver, hang, new_secret

LOCAL = {"secret": SECRET, "allow": ["127.0.0.0/8"], "base_s": 0.02, "cap_s": 0.05}


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with Receiver() as receiver:
        yield receiver
        assert not receiver.bad


def hook_settings(data_dir: Path, webhooks: dict[str, object] | None = None, **sections: Any) -> Settings:
    return echo_settings(data_dir, webhooks={**LOCAL, **(webhooks or {})}, **sections)


@asynccontextmanager
async def serving(settings: Settings) -> AsyncIterator[tuple[Server, aiohttp.ClientSession]]:
    async with Server(settings) as server, aiohttp.ClientSession(server.url) as http:
        yield server, http
        await assert_every_key_expires(server.gateway._store)


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[tuple[Server, aiohttp.ClientSession]]:
    async with serving(hook_settings(tmp_path)) as both:
        yield both


Service = tuple[Server, aiohttp.ClientSession]


async def listed(http: aiohttp.ClientSession, kind: str = "waiting") -> list[Json]:
    async with http.get("/webhooks/deliveries", params={"status": kind}) as response:
        body = await response.json()
        assert response.status == 200, body
        rows: list[Json] = body["data"]
        return rows


async def test_each_end_has_its_event(service: Service, receiver: Receiver) -> None:
    """Completed, incomplete, failed and cancelled jobs are told of with what ``GET /chat/{id}`` says of them."""
    _, http = service
    echoes = {
        "response.completed": {"tokens": 3},
        "response.failed": {"tokens": 3, "fault": "crash", "at": 1, "attempts": 9},
        "response.incomplete": {"tokens": 9},
        "response.cancelled": {"tokens": 9, "fault": "stall", "at": 2},
    }
    jobs: dict[str, Json] = {}
    for kind, echo in echoes.items():
        more = {"max_tokens": 2} if kind == "response.incomplete" else {}
        jobs[kind] = await submit(http, webhook=receiver.url, session_id=kind, echo=echo, **more)
    async with http.delete(f"/chat/{jobs['response.cancelled']['task_id']}") as response:
        assert response.status == 200
    await wait_until(lambda: len(receiver.events) == 4)
    for kind, job in jobs.items():
        (event,) = receiver.of(job["task_id"])
        known = await status(http, job["task_id"])
        del known["last_event_id"]
        assert (event["type"], event["data"]) == (kind, {"id": job["task_id"], "text_truncated": False, **known})
        assert event["created_at"] == int(known["timings"]["finished_at"])
    assert len(set(receiver.ids)) == 4
    assert await listed(http) == []


ROUTES: dict[str, Json] = {
    "/chat": {"message": "hi"},
    "/chat/async": {"message": "hi"},
    "/v1/chat/completions": {"model": "echo", "messages": [{"role": "user", "content": "hi"}]},
    "/v1/chat/stream": {"model": "echo", "messages": [{"role": "user", "content": "hi"}]},
    "/v1/chat": {"messages": [{"role": "user", "content": "hi"}]},
    "/v1/generate": {"prompt": "hi"},
    "/generate": {"content": "hi"},
    "/chat_completion": {"messages": [{"role": "user", "content": "hi"}]},
    "/question": {"text": "hi"},
    "/v1/embeddings": {"model": "echo", "input": "hi"},
    "/embeddings": {"model": "echo", "texts": ["hi"]},
}


async def test_every_route_that_makes_a_job_takes_it(tmp_path: Path, receiver: Receiver) -> None:
    """Asking twice makes two jobs also where answers are cached, since of a cached one nobody would be told."""
    made = []
    async with serving(hook_settings(tmp_path, cache={"everywhere": True})) as (_, http):
        for path, body in ROUTES.items():
            for _ in range(2):
                async with http.post(path, json={**body, "webhook": {"url": receiver.url}}) as response:
                    assert response.status in (200, 202), await response.text()
                    await response.read()
                    made.append(response.headers["x-job-id"])
        assert len(set(made)) == len(made)
        await wait_until(lambda: {event["data"]["id"] for event in receiver.events} == set(made))
        vectors = {event["data"]["id"] for event in receiver.events if "text" not in event["data"]}
        assert vectors == set(made[-4:])


async def test_what_is_to_be_delivered_is_shown(tmp_path: Path) -> None:
    """An event whose receiver cannot be reached waits for its next try, and the gauge says so."""
    async with serving(hook_settings(tmp_path)) as (_, http):
        await submit(http, webhook="http://127.0.0.1:9/")

        async def shown() -> bool:
            return (await scrape(http)).value("llmstream_webhooks_waiting") == 1

        await wait_until(shown)


async def test_nobody_waits_for_the_next_look(
    tmp_path: Path, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An event is sent as soon as its job has ended, by itself or by a cancellation, or somebody wants it again."""
    monkeypatch.setattr(dispatcher, "POLL_S", 3600.0)
    async with serving(hook_settings(tmp_path, models={"echo": {"engine": "echo", "slots": 1}})) as (_, http):
        job = await submit(http, webhook=receiver.url)
        await wait_until(lambda: len(receiver.events) == 1)
        await submit(http, echo={"tokens": 9, "fault": "stall", "at": 1})
        waiting = await submit(http, webhook=receiver.url)
        await http.delete(f"/chat/{waiting['task_id']}")
        await wait_until(lambda: bool(receiver.of(waiting["task_id"])))
        await http.post(f"/webhooks/deliveries/{job['task_id']}/retry")
        await wait_until(lambda: len(receiver.of(job["task_id"])) == 2)


WRONG: list[tuple[object, str]] = [
    ("http://example.com/", "webhook.url"),
    ("https://user:hunter2@example.com/", "webhook.url"),
    ({"url": "https://169.254.169.254/"}, "webhook.url"),
    ({"url": 5}, "webhook.url"),
    ({}, "webhook.url"),
    ({"url": "https://example.com/", "events": ["completed"]}, "webhook.events.0"),
    ({"url": "https://example.com/", "event": []}, "webhook.event"),
    (5, "webhook"),
]


async def test_a_wrong_webhook_is_refused(service: Service) -> None:
    """On every route: 400 with the name of the field, and no word of a password, before there is a job."""
    server, http = service
    for path, body in ROUTES.items():
        for webhook, param in WRONG:
            async with http.post(path, json={**body, "webhook": webhook}) as response:
                answer = await response.json()
            assert (response.status, answer["error"]["param"]) == (400, param), (path, answer)
            assert "hunter2" not in str(answer)
    assert await server.gateway.recent() == []


async def test_without_a_secret_requests_may_name_none(server: Server, http: aiohttp.ClientSession) -> None:
    """The error says what to configure; nothing runs that could deliver, and nothing is listed."""
    async with http.post("/chat", json={"message": "hi", "webhook": "https://example.com/"}) as response:
        assert (response.status, (await response.json())["error"]["param"]) == (400, "webhook")
    assert server.gateway.webhooks is None
    assert await listed(http) == []
    async with http.get("/webhooks/secret") as response:
        assert (response.status, "webhooks.secret" in await response.text()) == (404, True)


async def test_memory_jobs_have_none(service: Service, receiver: Receiver) -> None:
    """There would be nothing on record to tell of."""
    _, http = service
    body = {"message": "hi", "webhook": receiver.url, "durability": "memory"}
    async with http.post("/chat/async", json=body) as response:
        assert (response.status, (await response.json())["error"]["param"]) == (400, "webhook")


async def hang_up(request: web.Request) -> web.StreamResponse:
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


async def redirect(request: web.Request) -> web.StreamResponse:
    raise web.HTTPFound("/elsewhere")


async def endless(request: web.Request) -> web.StreamResponse:
    """An answer that is larger than anybody wants to read."""
    response = web.StreamResponse(status=503)
    await response.prepare(request)
    for _ in range(64 * 1024):
        await response.write(b"x" * 4096)
    return response


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (500, "the receiver answered 500"),
        (404, "the receiver answered 404"),
        (hang_up, "the connection broke, or the answer was not HTTP"),
        (redirect, "a redirect (302), which is not followed"),
        (endless, "the receiver answered 503"),
        (hang, "no answer within 0.5 s"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
async def test_whatever_goes_wrong_is_tried_again(
    tmp_path: Path, receiver: Receiver, answer: int | Callable[[web.Request], Awaitable[web.StreamResponse]], said: str
) -> None:
    """Until the receiver says that it has the event: under the same id, with the same bytes."""
    receiver.answers = [answer, answer]
    async with serving(hook_settings(tmp_path, {"timeout_s": 0.5, "base_s": 0.2})) as (_, http):
        job = await submit(http, webhook=receiver.url)
        seen: list[Json] = []

        async def tried() -> bool:
            seen[:] = [row for row in await listed(http) if row["attempts"]]
            return bool(seen)

        await wait_until(tried)
        assert (seen[0]["task_id"], seen[0]["receiver"], seen[0]["error"]) == (job["task_id"], "request", said)
        assert str(receiver.port) not in str(seen)
        await wait_until(lambda: len(receiver.ids) == 3)
        assert len(set(receiver.ids)) == 1
        assert len({body for body, _ in receiver.raw}) == 1
        assert receiver.requests == {"/hook": 3}

        async def counted() -> bool:
            found, name = await scrape(http), "llmstream_webhook_deliveries_total"
            by_outcome = [found.value(name, receiver="request", outcome=each) for each in ("failed", "delivered")]
            return by_outcome == [2, 1]

        await wait_until(counted)


async def test_410_is_the_end_of_it(service: Service, receiver: Receiver) -> None:
    """A receiver that is gone is not asked again; the event is listed, and can be sent once more."""
    _, http = service
    receiver.answers = [410]
    job = await submit(http, webhook=receiver.url)

    async def given_up() -> bool:
        return bool(await listed(http, "dead"))

    await wait_until(given_up)
    (row,) = await listed(http, "dead")
    assert (row["task_id"], row["last_status"], row["attempts"]) == (job["task_id"], 410, 1)
    assert await listed(http) == []
    assert len(receiver.ids) == 1
    async with http.post(f"/webhooks/deliveries/{job['task_id']}/retry") as response:
        assert (response.status, (await response.json())["receivers"]) == (202, ["request"])
    await wait_until(lambda: len(receiver.events) == 2)
    assert len(set(receiver.ids)) == 1
    assert await listed(http, "dead") == []


async def test_what_cannot_be_sent_again(service: Service, receiver: Receiver) -> None:
    """A job without a webhook, one that is not over, and one that is not there."""
    _, http = service
    without = await submit(http)
    running = await submit(http, webhook=receiver.url, echo={"tokens": 9, "fault": "stall", "at": 1})
    for job_id, code in ((without["task_id"], 404), (running["task_id"], 409), ("nothing", 404)):
        async with http.post(f"/webhooks/deliveries/{job_id}/retry") as response:
            assert response.status == code
    for query in ({"status": "all"}, {"limit": "0"}):
        async with http.get("/webhooks/deliveries", params=query) as response:
            assert (response.status, (await response.json())["error"]["param"]) == (400, next(iter(query)))


async def test_only_the_events_asked_for_without_their_text(service: Service, receiver: Receiver) -> None:
    """``events`` and ``include_text`` of the request."""
    server, http = service
    hook = {"url": receiver.url, "events": ["response.failed"], "include_text": False}
    fine = await submit(http, webhook=hook)
    broken = await submit(http, webhook=hook, echo={"tokens": 3, "fault": "crash", "at": 1, "attempts": 9})
    await finished(server, fine["task_id"])
    await wait_until(lambda: bool(receiver.events))
    assert [event["data"]["id"] for event in receiver.events] == [broken["task_id"]]
    assert "text" not in receiver.events[0]["data"]
    assert receiver.events[0]["data"]["error"]["code"]


async def test_long_texts_are_cut(tmp_path: Path, receiver: Receiver) -> None:
    """An event is no larger than the settings allow."""
    async with serving(hook_settings(tmp_path, {"max_text_chars": 5})) as (_, http):
        await submit(http, message="a long message", webhook=receiver.url)
        await wait_until(lambda: bool(receiver.events))
    assert (receiver.events[0]["data"]["text"], receiver.events[0]["data"]["text_truncated"]) == ("a lon", True)


async def test_a_slow_host_does_not_hold_up_others(tmp_path: Path, receiver: Receiver) -> None:
    """No host has more requests at once than it may have, and the rest goes on meanwhile."""
    async with (
        Receiver() as slow,
        serving(hook_settings(tmp_path, {"concurrency": 3, "host_concurrency": 2})) as (_, http),
    ):
        slow.answers = [hang] * 20
        for _ in range(10):
            await submit(http, webhook=slow.url)
        await wait_until(lambda: slow.open == 2)
        quick = [await submit(http, webhook=receiver.url) for _ in range(5)]
        await wait_until(lambda: all(receiver.of(job["task_id"]) for job in quick))
        assert slow.most_open == 2


async def test_receivers_of_the_configuration(tmp_path: Path, receiver: Receiver) -> None:
    """Hear of all jobs, of some, or of some ends, each signed with its own secret; also where requests name none."""
    async with Receiver(new_secret("b")) as other:
        receivers = {
            "audit": {"url": other.url, "secret": new_secret("b"), "include_text": False},
            "failures": {"url": receiver.url, "secret": SECRET, "events": "response.failed"},
            "nobodys": {"url": receiver.url, "secret": SECRET, "principals": ["team-*"]},
        }
        async with serving(echo_settings(tmp_path, webhook_receivers=receivers)) as (_, http):
            fine = await submit(http)
            broken = await submit(http, echo={"tokens": 3, "fault": "crash", "at": 1, "attempts": 9})
            await wait_until(lambda: len(other.events) == 2 and len(receiver.events) == 1)
            assert {event["data"]["id"] for event in other.events} == {fine["task_id"], broken["task_id"]}
            assert "text" not in other.events[0]["data"]
            assert receiver.events[0]["data"]["id"] == broken["task_id"]
            assert receiver.events[0]["id"] == other.of(broken["task_id"])[0]["id"]
            async with http.post("/chat", json={"message": "hi", "webhook": receiver.url}) as response:
                assert response.status == 400


async def test_the_end_of_a_requeued_job_is_told_too(service: Service, receiver: Receiver) -> None:
    """The new job has the old one's webhook, and an event of its own."""
    server, http = service
    job = await submit(http, webhook=receiver.url, echo={"tokens": 3, "fault": "crash", "at": 1, "attempts": 3})
    await finished(server, job["task_id"])
    async with http.post(f"/jobs/{job['task_id']}/requeue") as response:
        new_id = (await response.json())["task_id"]
    await wait_until(lambda: bool(receiver.of(new_id)))
    assert len(set(receiver.ids)) == 2


class Clock:
    """Time that the test owns; the store's is not asked."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


@asynccontextmanager
async def gateway_at(clock: Clock, settings: Settings) -> AsyncIterator[Gateway]:
    async with open_gateway(settings, clock=clock) as gateway:
        yield gateway


async def ask(gateway: Gateway, port: int) -> str:
    request = GenerateRequest.of("chat", "echo", {"messages": [{"role": "user", "content": "hi"}]})
    hook = Webhook(f"http://127.0.0.1:{port}/hook")
    return (await gateway.submit(request, webhook=hook)).id


async def tries(gateway: Gateway, kind: Any = "waiting") -> list[int]:
    assert gateway.webhooks is not None
    return [row["attempts"] for row in await gateway.webhooks.deliveries(kind, 10, None)]


async def test_a_receiver_that_is_down_for_hours_gets_its_event(tmp_path: Path) -> None:
    """Tries become rarer, up to one an hour, and go on until the receiver is back."""
    clock, port = Clock(), free_port()
    settings = hook_settings(tmp_path, {"base_s": 5.0, "cap_s": 3600.0})
    async with gateway_at(clock, settings) as gateway:
        assert gateway.webhooks is not None
        job_id = await ask(gateway, port)
        waits = []
        for count in range(1, 14):
            await wait_until(lambda count=count: _is(tries(gateway), [count]))  # type: ignore[misc]
            (row,) = await gateway.webhooks.deliveries("waiting", 10, None)
            waits.append(row["next_attempt_at"] - clock())
            clock.ahead += max(0.0, waits[-1])
            gateway.webhooks.wake()
        longest = [min(3600, 5 * 2**number) for number in range(13)]
        assert all(0.75 * most - 2 <= wait <= most for wait, most in zip(waits, longest, strict=True)), waits
        assert sum(waits) > 2 * 3600
        await wait_until(lambda: _is(tries(gateway), [14]))
        async with Receiver(port=port) as receiver:
            clock.ahead += 3600
            gateway.webhooks.wake()
            await wait_until(lambda: bool(receiver.ids))
            assert receiver.raw[0][1]["webhook-timestamp"] >= str(int(time.time() + 2 * 3600))
            assert job_id.encode() in receiver.raw[0][0]


async def test_after_half_a_day_it_is_given_up(tmp_path: Path) -> None:
    """Then it is listed, with what came of its tries."""
    clock, port = Clock(), free_port()
    async with gateway_at(clock, hook_settings(tmp_path, {"base_s": 60.0, "cap_s": 3600.0})) as gateway:
        await ask(gateway, port)
        await wait_until(lambda: _is(tries(gateway), [1]))
        clock.ahead += 12 * 3600 - 30
        assert gateway.webhooks is not None
        gateway.webhooks.wake()
        await wait_until(lambda: _is(tries(gateway, "dead"), [2]))
        assert await tries(gateway) == []
        (row,) = await gateway.webhooks.deliveries("dead", 10, None)
        assert (row["error"], row["last_status"]) == ("no connection", None)


async def _is(found: Awaitable[list[int]], expected: list[int]) -> bool:
    return await found == expected


async def test_a_public_name_may_not_lead_inside(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that leads to a private address when it is connected to, whatever it led to before, is given up."""
    _, http = service
    look_up = socket.getaddrinfo

    def attackers_dns(host: Any, *more: Any, **named: Any) -> Any:
        return look_up("10.0.0.1" if host == "hooks.example.com" else host, *more, **named)

    monkeypatch.setattr(socket, "getaddrinfo", attackers_dns)
    await submit(http, webhook="https://hooks.example.com/hook")

    async def given_up() -> bool:
        return bool(await listed(http, "dead"))

    await wait_until(given_up)
    (row,) = await listed(http, "dead")
    assert row["error"] == "the host's address is not a public one (webhooks.allow)"


async def test_a_shutdown_leaves_what_is_under_way_to_the_next(tmp_path: Path, receiver: Receiver) -> None:
    """A request that hangs is cut off, and the next server sends the event at once, not after a lease."""
    receiver.answers = [hang]
    settings = hook_settings(tmp_path, server={"port": 0, "shutdown_grace_s": 0.1})
    async with serving(settings) as (_, http):
        await submit(http, webhook=receiver.url)
        await wait_until(lambda: receiver.open == 1)
    async with serving(settings):
        async with asyncio.timeout(5):
            await wait_until(lambda: len(receiver.ids) == 2)
    assert len(set(receiver.ids)) == 1
