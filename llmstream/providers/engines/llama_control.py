"""llama.cpp's own service routes, on a Unix socket in a private folder: templates and tokens."""

from __future__ import annotations

import http.client
import shutil
import socket
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

_DEADLINE_S = 60.0


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=_DEADLINE_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class Control:
    """A client of the routes that the library offers only over HTTP. Safe to use from any thread."""

    def __init__(self) -> None:
        # mkdtemp gives mode 700, so only this user can reach the socket.
        self._folder = Path(tempfile.mkdtemp(prefix="llama-"))
        self.path = str(self._folder / "s.sock")  # the ending tells llama.cpp what it is

    def close(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def slot_context(self) -> int:
        """Tokens that fit one slot."""
        return int(self._call("GET", "/props")["default_generation_settings"]["n_ctx"])

    def template_traits(self) -> tuple[str, dict[str, bool]]:
        """The chat template's source and what it can do."""
        props = self._call("GET", "/props")
        return str(props.get("chat_template") or ""), dict(props.get("chat_template_caps") or {})

    def render(self, messages: Sequence[dict[str, Any]]) -> str:
        """Puts a conversation into the model's chat template. Raises ValueError when it does not fit."""
        return str(self._call("POST", "/apply-template", {"messages": messages})["prompt"])

    def chat_tokens(self, body: dict[str, Any]) -> int:
        """Counts the prompt of a chat request, its tools included."""
        return int(self._call("POST", "/chat/completions/input_tokens", body)["input_tokens"])

    def tokenize(self, text: str, *, prompt: bool) -> list[int]:
        """Token ids of a text; ``prompt`` adds what begins a text and reads the names of special tokens as these."""
        body = {"content": text, "add_special": prompt, "parse_special": prompt}
        return [int(token) for token in self._call("POST", "/tokenize", body)["tokens"]]

    def detokenize(self, tokens: Sequence[int]) -> str:
        return str(self._call("POST", "/detokenize", {"tokens": list(tokens)})["content"])

    def tokenize_behind(self, text: str) -> tuple[int, ...]:
        """Token ids of a text that stands in the middle of another; empty where that is ambiguous."""
        # SentencePiece vocabularies put a space before a text that stands alone, so it is put behind another.
        for before in ("", "\n"):
            pieces = self._pieces(before + text)
            wanted, tail = text.encode(), b""
            for start in range(len(pieces) - 1, -1, -1):
                tail = pieces[start][1] + tail
                if tail == wanted:
                    return tuple(token for token, _ in pieces[start:])
        return ()

    def _pieces(self, text: str) -> list[tuple[int, bytes]]:
        body = {"content": text, "add_special": False, "parse_special": False, "with_pieces": True}
        tokens = self._call("POST", "/tokenize", body)["tokens"]
        return [
            (int(t["id"]), t["piece"].encode() if isinstance(t["piece"], str) else bytes(t["piece"])) for t in tokens
        ]

    def _call(self, method: str, route: str, body: object = None) -> dict[str, Any]:
        connection = _UnixConnection(self.path)
        try:
            data = None if body is None else msgspec.json.encode(body)
            connection.request(method, route, data, {"Content-Type": "application/json"})
            response = connection.getresponse()
            answer: dict[str, Any] = msgspec.json.decode(response.read())
        finally:
            connection.close()
        if response.status != 200:
            error = answer.get("error", {})
            kind = ValueError if response.status < 500 or "emplate" in str(error) else RuntimeError
            raise kind(str(error.get("message") or answer))
        return answer
