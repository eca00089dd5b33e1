"""``/openapi.json``, and ``/docs`` and ``/redoc``, which show it without asking any other host."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
from pathlib import Path

import msgspec
from aiohttp import web

from llmstream.api.access import open_as
from llmstream.api.keys import GATEWAY

FILES = Path(__file__).parent / "static"
MEDIA = {".css": "text/css", ".js": "text/javascript"}
THEIRS = {"redoc-2.5.4.js", "swagger-ui-5.35.0.css", "swagger-ui-5.35.0.js"}
"""Packed, and with their version in the name."""
OURS = {"page.css", "redoc.js", "swagger-ui.js"}
ASK_AGAIN, FOREVER = "no-cache", "public, max-age=31536000, immutable"

# Redoc adds empty style elements, which it fills by script, and one that it always fills with the same rules.
REDOC_STYLES = (
    "'sha256-47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=' 'sha256-QMIg+bpjm3JdElJ388KYke01izlUW0UoNOeKjpMxdgc='"
)
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'{styles}; img-src 'self' data:; connect-src 'self'; "
    "worker-src blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

OPENAPI = "openapi"

routes = web.RouteTableDef()


class Document:
    """The OpenAPI document of one application, made when somebody first asks for it."""

    def __init__(self, app: web.Application) -> None:
        self._app = app
        self._lock = asyncio.Lock()
        self._made: bytes | None = None

    async def packed(self) -> bytes:
        async with self._lock:
            if self._made is None:
                self._made = await asyncio.to_thread(self._make)
        return self._made

    def _make(self) -> bytes:
        from llmstream.api.docs.document import document

        settings = self._app[GATEWAY].settings
        base = str(self._app.router[OPENAPI].url_for()).removesuffix("/openapi.json")
        open_groups = frozenset(settings.security.open)
        made = document(self._app, authenticated=settings.authenticated, open_groups=open_groups, base=base)
        return _pack(msgspec.json.encode(made))


DOCUMENT = web.AppKey("document", Document)


@routes.get("/openapi.json", name=OPENAPI)
@open_as("docs")
async def openapi(request: web.Request) -> web.Response:
    """The OpenAPI document of this server."""
    return _answer(request, await request.app[DOCUMENT].packed(), "application/json")


@routes.get("/docs")
@open_as("docs")
async def docs(request: web.Request) -> web.Response:
    """The document as a page from which requests can be sent."""
    return await _page(request, "docs.html", POLICY.format(styles=""))


@routes.get("/redoc")
@open_as("docs")
async def redoc(request: web.Request) -> web.Response:
    """The document as a page to read."""
    return await _page(request, "redoc.html", POLICY.format(styles=f" {REDOC_STYLES}"))


@routes.get("/docs/{file}")
@open_as("docs")
async def file(request: web.Request) -> web.Response:
    """Scripts and styles of both pages."""
    name = request.match_info["file"]
    if name in THEIRS:
        packed = await asyncio.to_thread((FILES / f"{name}.gz").read_bytes)
        return _answer(request, packed, MEDIA[Path(name).suffix], cache=FOREVER)
    if name in OURS:
        return _answer(request, _pack(await _read(name)), MEDIA[Path(name).suffix])
    raise web.HTTPNotFound


async def _page(request: web.Request, name: str, policy: str) -> web.Response:
    response = _answer(request, _pack(await _read(name)), "text/html")
    response.headers["Content-Security-Policy"] = policy
    response.headers["Referrer-Policy"] = "no-referrer"
    return response


async def _read(name: str) -> bytes:
    return await asyncio.to_thread((FILES / name).read_bytes)


def _pack(body: bytes) -> bytes:
    return gzip.compress(body, mtime=0)


def _answer(request: web.Request, packed: bytes, media: str, *, cache: str = ASK_AGAIN) -> web.Response:
    etag = hashlib.sha256(packed).hexdigest()[:16]
    if any(known.value in {etag, "*"} for known in request.if_none_match or ()):
        response = web.Response(status=304)
    elif "gzip" in request.headers.get("Accept-Encoding", ""):
        response = web.Response(body=packed, content_type=media, charset="utf-8", headers={"Content-Encoding": "gzip"})
    else:
        response = web.Response(body=gzip.decompress(packed), content_type=media, charset="utf-8")
    response.etag = etag
    response.headers.update({"Cache-Control": cache, "Vary": "Accept-Encoding", "X-Content-Type-Options": "nosniff"})
    return response
