"""``/docs`` and ``/redoc``: seen in a browser that reaches nobody else, and as files."""

from __future__ import annotations

import gzip
import hashlib
import re
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
import pytest_asyncio
from aiohttp import web
from aiohttp.test_utils import TestServer
from playwright.async_api import Browser

from llmstream.api.app import create_app
from llmstream.api.docs.pages import FILES, OURS, THEIRS
from llmstream.server import Server
from tests.api.keyed import client, keyed_settings, secret
from tests.browser import Watched, chromium
from tests.conftest import echo_settings
from tests.docs.reading import Document

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mounted(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[TestServer]:
    """A server below a prefix, where a link that is not relative leads nowhere."""
    outer = web.Application()
    outer.add_subapp("/llm/", create_app(echo_settings(tmp_path_factory.mktemp("pages"))))
    server = TestServer(outer)
    async with server:
        yield server


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Browser]:
    async with chromium() as browser:
        yield browser


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def document(mounted: TestServer) -> Document:
    async with aiohttp.ClientSession() as http, http.get(mounted.make_url("/llm/openapi.json")) as response:
        return Document(await response.json())


async def test_docs_in_a_browser(browser: Browser, mounted: TestServer, document: Document) -> None:
    """Swagger UI lists every operation, and one of them can be tried; nobody else is asked, nothing goes wrong."""
    watched = Watched(await browser.new_page())
    page = watched.page
    await page.goto(str(mounted.make_url("/llm/docs")))
    await page.locator(".opblock").first.wait_for()
    shown = {
        (await block.locator(".opblock-summary-method").inner_text()).strip()
        + " "
        + (await block.locator(".opblock-summary-path").get_attribute("data-path") or "")
        for block in await page.locator(".opblock").all()
    }
    assert shown == {operation.name for operation in document.operations}
    block = page.locator("#operations-Chat-chat_submit_chat")
    await block.locator(".opblock-summary").click()
    await block.get_by_role("button", name="Try it out").click()
    await block.get_by_role("button", name="Execute").click()
    await block.locator(".live-responses-table .response-col_status", has_text="202").wait_for()
    assert '"stream_url": "/llm/stream/' in await block.locator(".live-responses-table").inner_text()
    _well_behaved(watched, mounted)


async def test_redoc_in_a_browser(browser: Browser, mounted: TestServer, document: Document) -> None:
    """Redoc shows every operation, and its search finds one; nobody else is asked, nothing goes wrong."""
    watched = Watched(await browser.new_page())
    page = watched.page
    await page.goto(str(mounted.make_url("/llm/redoc")))
    for operation in document.operations:
        await page.locator(f"[id='operation/{operation.says['operationId']}']").first.wait_for(state="attached")
    assert await page.locator("[id^='operation/']").count() == len(list(document.operations))
    await page.get_by_placeholder("Search...").fill("requeue")
    await page.get_by_role("search").get_by_text("Runs a failed or cancelled job once more").first.wait_for()
    _well_behaved(watched, mounted)


def _well_behaved(watched: Watched, server: TestServer) -> None:
    assert watched.requested
    assert watched.strangers(str(server.make_url("")).rstrip("/")) == []
    assert watched.complaints == []


async def test_what_others_made_is_unchanged() -> None:
    """The bundled files are those that the table names, and come with their licences."""
    table = (FILES / "README.md").read_text()
    sums = dict(re.findall(r"^\| `(.+)` \| ([0-9a-f]{64}) \|$", table, re.MULTILINE))
    assert sums.keys() == THEIRS
    for name, sum_ in sums.items():
        assert hashlib.sha256(gzip.decompress((FILES / f"{name}.gz").read_bytes())).hexdigest() == sum_
    assert {"redoc-LICENSE.txt", "swagger-ui-LICENSE.txt", "swagger-ui-NOTICE.txt"} <= {
        file.name for file in (FILES / "licenses").iterdir()
    }


async def test_files_are_kept_as_long_as_they_are_right(mounted: TestServer) -> None:
    """Files with a version in their name are kept for good, others are asked for again and not sent twice."""
    async with aiohttp.ClientSession() as http:
        for path in ("openapi.json", "docs", "redoc", *(f"docs/{name}" for name in THEIRS | OURS)):
            async with http.get(mounted.make_url(f"/llm/{path}")) as response:
                body, headers = await response.read(), response.headers
                assert response.status == 200
            assert headers["Content-Encoding"] == "gzip"
            assert headers["X-Content-Type-Options"] == "nosniff"
            forever = path.removeprefix("docs/") in THEIRS
            assert headers["Cache-Control"] == ("public, max-age=31536000, immutable" if forever else "no-cache")
            again = {"If-None-Match": headers["ETag"]}
            async with http.get(mounted.make_url(f"/llm/{path}"), headers=again) as response:
                assert (response.status, await response.read()) == (304, b"")
            plain = {"Accept-Encoding": "identity"}
            async with http.get(mounted.make_url(f"/llm/{path}"), headers=plain) as response:
                assert "Content-Encoding" not in response.headers
                assert await response.read() == body
        for path in ("docs/nowhere.js", "docs/README.md", "docs/docs.html", "docs/..%2Fpages.py"):
            async with http.get(mounted.make_url(f"/llm/{path}")) as response:
                assert (response.status, response.content_type) == (404, "application/json")


async def test_pages_may_do_little(mounted: TestServer) -> None:
    """The pages allow no script in the page itself and nothing of others."""
    async with aiohttp.ClientSession() as http:
        for path in ("docs", "redoc"):
            async with http.get(mounted.make_url(f"/llm/{path}")) as response:
                policy = response.headers["Content-Security-Policy"]
                assert "default-src 'none'; script-src 'self'; " in policy
                assert not {"unsafe", "http", "*"} & set(re.findall(r"unsafe|http|\*", policy))


async def test_keys_for_the_documentation(tmp_path: Path) -> None:
    """Where ``security.open`` leaves it out, the documentation needs a key."""
    async with Server(keyed_settings(tmp_path, security={"open": ["health"]})) as server:
        for path in ("/openapi.json", "/docs", "/redoc", "/docs/page.css"):
            async with client(server) as http, http.get(path) as response:
                assert response.status == 401
            async with client(server, secret("reader")) as http, http.get(path) as response:
                assert response.status == 200
