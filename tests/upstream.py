"""An OpenAI-compatible API on a real socket that misbehaves on request."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from base64 import b64encode
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from aiohttp import web

Fault = Literal["cut", "reset", "stall", "malformed", "error", "done", "no_finish", "end"]
"""``cut`` closes and ``reset`` resets the connection; ``error`` is an error object inside the 200; ``done`` is a
``[DONE]`` and ``end`` a clean end too early; ``no_finish`` leaves out only the finish reason."""


@dataclass(frozen=True)
class Reply:
    """What one request gets."""

    pieces: Sequence[str | Mapping[str, Any]] = ("Hello", " there", " you")
    """Contents, or whole ``delta`` objects, one for each chunk."""
    fault: Fault | None = None
    at: int = 0
    """The fault happens before this piece; at the number of pieces, in place of the finishing chunk."""
    gates: Mapping[int, asyncio.Event] = field(default_factory=dict)
    """Events to wait for before a piece; -1 stands for the first byte of the answer, the number of pieces for the
    finishing chunk, and one more for the end behind ``[DONE]``."""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: Any = None
    """Sent in place of an answer: text as it is, anything else as JSON."""
    choices: int = 1
    finish_reason: str = "stop"
    usage: Mapping[str, Any] | None = field(
        default_factory=lambda: {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
    )
    logprobs: bool = False
    done: bool = True
    newline: str = "\n"
    split: int | None = None
    """Sends the stream in writes of this many bytes."""
    delay_s: float = 0.0
    """Pause before each piece."""
    whole: bool = False
    """Answers with one JSON object although a stream was asked for."""
    counts: bool = False
    """Tells as usage what it really took and gave: 7 tokens, and one for each piece."""
    vectors: Sequence[Sequence[float]] | None = None
    """Embeddings; without any each input gets its number and its length."""
    numbers: bool = False
    """Sends embeddings as numbers although base64 was asked for."""
    prefill: bool = False
    """Goes on behind a last message of the assistant; without it such a message counts as any other."""


@dataclass
class Seen:
    """A request as it arrived, and what became of its answer."""

    path: str
    headers: Mapping[str, str]
    body: dict[str, Any]
    raw: bytes
    connection: object
    answered: bool = False
    hung_up: asyncio.Event = field(default_factory=asyncio.Event)


class Upstream:
    """Answers by what the user said, then by ``replies`` in turn, then by the model's entry in ``models``, then
    plainly."""

    def __init__(self) -> None:
        self.url = ""
        self.scripts: dict[str, deque[Reply]] = {}
        """Replies in turn for each last message of a user."""
        self.replies: deque[Reply] = deque()
        self.models: dict[str, Reply] = {}
        self.requests: list[Seen] = []
        self.busy = self.most_busy = 0
        """Answers under way, now and at most."""
        self.listings: list[Mapping[str, str]] = []
        """Headers of the requests for the list of models."""
        self._closing = asyncio.Event()

    async def __aenter__(self) -> Upstream:
        """Listens on a free port of this machine."""
        app = web.Application()
        app.router.add_get("/v1/models", self._list)
        app.router.add_post("/v1/chat/completions", self._generate)
        app.router.add_post("/v1/completions", self._generate)
        app.router.add_post("/v1/embeddings", self._generate)
        app.router.add_post("/beta/chat/completions", self._generate)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=1, access_log=None)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}/v1"
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._closing.set()
        await self._runner.cleanup()

    async def _list(self, request: web.Request) -> web.Response:
        self.listings.append(dict(request.headers))
        reply = self.models.get("GET /models", Reply())
        await self._gate(reply, -1)
        if reply.status != 200 or reply.body is not None:
            return _refuse(reply)
        names = [{"id": name, "object": "model", "created": 0, "owned_by": "test"} for name in self.models]
        return web.json_response({"object": "list", "data": names})

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        seen = Seen(request.path, dict(request.headers), body, await request.read(), request.transport)
        self.requests.append(seen)
        reply = self._next_reply(body)
        self.busy += 1
        self.most_busy = max(self.busy, self.most_busy)
        try:
            await self._gate(reply, -1)
            if reply.status != 200 or reply.body is not None:
                return _refuse(reply)
            if request.path.endswith("/embeddings"):
                return web.json_response(_vectors(reply, body), headers=reply.headers)
            pieces = _rest(reply, body) if reply.prefill else reply.pieces
            if reply.counts:
                prompt = 7 + len(reply.pieces) - len(pieces)
                counts = {"prompt_tokens": prompt, "completion_tokens": len(pieces)}
                reply = replace(reply, usage={**counts, "total_tokens": prompt + len(pieces)})
            chunks = Chunks(body["model"], reply, chat=request.path.endswith("/chat/completions"))
            if reply.whole:
                return web.json_response(chunks.whole(pieces), headers=reply.headers)
            return await self._stream(request, reply, pieces, chunks)
        except (asyncio.CancelledError, ConnectionError):
            seen.hung_up.set()
            raise
        finally:
            self.busy -= 1
            seen.answered = True

    def _next_reply(self, body: dict[str, Any]) -> Reply:
        said = [message["content"] for message in body.get("messages", ()) if message["role"] == "user"]
        script = self.scripts.get(str(said[-1])) if said else None
        for replies in (script, self.replies):
            if replies:
                return replies.popleft()
        return self.models.get(body["model"], Reply())

    async def _stream(
        self, request: web.Request, reply: Reply, pieces: Sequence[str | Mapping[str, Any]], chunks: Chunks
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", **reply.headers})
        await response.prepare(request)
        for position in range(len(pieces) + 1):
            await self._gate(reply, position)
            if reply.fault and reply.fault != "no_finish" and reply.at == position:
                return await self._fail(request, response, reply)
            last = position == len(pieces)
            await asyncio.sleep(reply.delay_s)
            data = chunks.end() if last else chunks.piece(pieces[position], first=position == 0)
            for start in range(0, len(data), reply.split or len(data) or 1):
                await response.write(data[start : start + (reply.split or len(data))])
        await self._gate(reply, len(pieces) + 1)
        await response.write_eof()
        return response

    async def _fail(self, request: web.Request, response: web.StreamResponse, reply: Reply) -> web.StreamResponse:
        transport = request.transport
        assert transport is not None
        match reply.fault:
            case "stall":
                await self._closing.wait()
            case "malformed":
                await response.write(_frame(b'{"choices": [{"index": 0, "delta": {"content": "x', reply))
                await self._closing.wait()
            case "error":
                error = {"error": {"message": "the model is on fire", "type": "server_error", "code": "fire"}}
                await response.write(_frame(json.dumps(error).encode(), reply))
            case "done":
                await response.write(_frame(b"[DONE]", reply))
            case "reset":
                connection = transport.get_extra_info("socket")
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                transport.abort()
            case "cut":
                transport.abort()
        return response

    async def _gate(self, reply: Reply, position: int) -> None:
        """Waits for the test to let the answer go on, or for the end of the test."""
        if (gate := reply.gates.get(position)) is None:
            return
        waits = [asyncio.create_task(event.wait()) for event in (gate, self._closing)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()


class Chunks:
    """The bytes of a reply."""

    def __init__(self, model: str, reply: Reply, *, chat: bool) -> None:
        self._head = {"id": "chatcmpl-1", "created": 1700000000, "model": model, "system_fingerprint": "fp"}
        self._reply = reply
        self._chat = chat

    def piece(self, piece: str | Mapping[str, Any], *, first: bool) -> bytes:
        delta = {"content": piece} if isinstance(piece, str) else dict(piece)
        if first:
            delta = {"role": "assistant", **delta}
        logprobs = {"content": [{"token": piece, "logprob": -0.5}]} if self._reply.logprobs else None
        member = {"delta": delta} if self._chat else {"text": piece}
        return self._choices(lambda i: {"index": i, **member, "logprobs": logprobs, "finish_reason": None})

    def end(self) -> bytes:
        reason = None if self._reply.fault == "no_finish" else self._reply.finish_reason
        member: dict[str, Any] = {"delta": {}} if self._chat else {"text": ""}
        data = self._choices(lambda i: {"index": i, **member, "logprobs": None, "finish_reason": reason})
        if self._reply.usage is not None:
            data += self._chunk({"choices": [], "usage": self._reply.usage})
        return data + _frame(b"[DONE]", self._reply) if self._reply.done else data

    def whole(self, pieces: Sequence[str | Mapping[str, Any]]) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": "".join(p for p in pieces if isinstance(p, str))}
        for piece in pieces:
            message |= piece if isinstance(piece, Mapping) else {}
        choices = [
            {"index": i, "message": message, "logprobs": None, "finish_reason": self._reply.finish_reason}
            for i in range(self._reply.choices)
        ]
        return {**self._head, "object": "chat.completion", "choices": choices, "usage": self._reply.usage}

    def _choices(self, choice: Callable[[int], dict[str, Any]]) -> bytes:
        return b"".join(self._chunk({"choices": [choice(index)]}) for index in range(self._reply.choices))

    def _chunk(self, members: Mapping[str, Any]) -> bytes:
        chunk = {**self._head, "object": "chat.completion.chunk", **members}
        return _frame(json.dumps(chunk).encode(), self._reply)


def _frame(data: bytes, reply: Reply) -> bytes:
    newline = reply.newline.encode()
    return b"data: " + data + newline + newline


def _vectors(reply: Reply, body: Mapping[str, Any]) -> dict[str, Any]:
    """The embeddings of a request, the last input first."""
    inputs = body["input"] if isinstance(body["input"], list) else [body["input"]]
    found = reply.vectors or [[float(number), float(len(value))] for number, value in enumerate(inputs)]
    base64 = body.get("encoding_format") == "base64" and not reply.numbers
    data = [
        {
            "object": "embedding",
            "index": number,
            "embedding": b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode() if base64 else vector,
        }
        for number, vector in enumerate(found)
    ]
    return {"object": "list", "data": data[::-1], "model": body["model"], "usage": reply.usage}


def _refuse(reply: Reply) -> web.Response:
    if isinstance(reply.body, str):
        return web.Response(
            status=reply.status, headers={"Content-Type": "text/plain", **reply.headers}, text=reply.body
        )
    return web.json_response(reply.body, status=reply.status, headers=reply.headers)


def _rest(reply: Reply, body: Mapping[str, Any]) -> Sequence[str]:
    """What is left of the reply behind the text that the client sent as the assistant's last message."""
    last = body["messages"][-1]
    said = last["content"] if last["role"] == "assistant" else ""
    pieces = [piece for piece in reply.pieces if isinstance(piece, str)]
    while pieces and said:
        piece = pieces.pop(0)
        if not said.startswith(piece):
            pieces.insert(0, piece[len(said) :])
            break
        said = said[len(piece) :]
    return pieces
