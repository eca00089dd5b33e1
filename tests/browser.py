"""A headless Chromium for tests, and what a page did that it should not have."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from playwright.async_api import Browser, Page, async_playwright

REQUIRED = "TEST_BROWSER_REQUIRED"
"""Set where a missing browser is a failure and no reason to skip."""
NAMES = ("chromium", "chromium-browser", "google-chrome")


class Watched:
    """A page with all that it asked for and complained of."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.requested: list[str] = []
        self.complaints: list[str] = []
        page.on("request", lambda request: self.requested.append(request.url))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("console", lambda message: self.complaints.append(message.text) if message.type == "error" else None)

    def strangers(self, url: str) -> list[str]:
        """Requests to anybody but the server at ``url``. A ``blob:`` or ``data:`` URL leads to nobody."""
        return [each for each in self.requested if not each.startswith((f"{url}/", f"blob:{url}/", "data:"))]


@asynccontextmanager
async def chromium() -> AsyncIterator[Browser]:
    """A browser. Skips the test where there is none."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        assert not os.environ.get(REQUIRED), "there is no Chromium: install it (apt-get install chromium)"
        pytest.skip("there is no Chromium: the pages were not seen (apt-get install chromium)")
    async with async_playwright() as playwright:
        started = await playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        try:
            yield started
        finally:
            await started.close()
