"""Takes the picture of the page for the README: `python -m tests.browser.picture docs/images/page.png`.

It starts a registry with `serve run`, creates the demo's agents, and needs the program `chromium`.
"""

from __future__ import annotations

import asyncio
import shutil
import sys
from pathlib import Path

from playwright.async_api import async_playwright, expect

from tests.newcomer import a_newcomer

_PATIENCE_MS = 20_000
_WIDTH, _HEIGHT = 1280, 720


async def take(path: Path, agents: int = 18) -> None:
    """Write the picture of a fleet with live, draining and dead agents to `path`."""
    with a_newcomer() as newcomer:
        newcomer.serve()
        await newcomer.ready()
        newcomer.find_cluster()
        newcomer.run("seedcore", "demo", "--agents", str(agents))
        async with async_playwright() as playwright:
            browser = await playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            page = await browser.new_page(viewport={"width": _WIDTH, "height": _HEIGHT})
            await page.goto(newcomer.url)
            await expect(page.locator("#live")).to_have_attribute("data-level", "good", timeout=_PATIENCE_MS)
            await expect(page.locator("#grid-body .row").first).to_be_visible(timeout=_PATIENCE_MS)
            # the local cache of the replica is up to date
            await expect(page.get_by_text("Not known now")).to_have_count(0, timeout=_PATIENCE_MS)
            await expect(page.locator("#live")).to_have_attribute("data-level", "good", timeout=_PATIENCE_MS)
            await page.screenshot(path=path)
            await browser.close()


if __name__ == "__main__":
    asyncio.run(take(Path(sys.argv[1])))
