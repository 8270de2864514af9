"""A cluster with Serve, a fleet, and a real browser that looks at it."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from playwright.async_api import Browser, Page, async_playwright

from tests.programs import is_missing
from tests.serving import deployment, server, tokens, world

__all__ = ["browser", "deployment", "page", "server", "tokens", "world"]


def chromium_of(request: pytest.FixtureRequest) -> str:
    """The browser's program, or the test is skipped; CI asks for it and does not skip."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        is_missing(request, "Chromium", "chromium", "--require-browser")
    return found


@pytest_asyncio.fixture
async def browser(request: pytest.FixtureRequest) -> AsyncIterator[Browser]:
    program = chromium_of(request)
    async with async_playwright() as playwright:
        # as root it has no sandbox of its own, and what it shows is ours
        browser = await playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        await browser.close()


@pytest_asyncio.fixture
async def page(browser: Browser) -> AsyncIterator[Page]:
    """A window in which nothing goes wrong unnoticed."""
    page = await browser.new_page(viewport={"width": 1440, "height": 900})
    troubles: list[str] = []
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on(
        "console",
        # the browser itself logs an answer of 404 or 503
        lambda entry: (
            troubles.append(entry.text)
            if entry.type == "error" and "Failed to load resource" not in entry.text
            else None
        ),
    )
    yield page
    assert troubles == []
