"""The page reads kinds, never messages: with other words in every answer its state is the same (law 2)."""

from __future__ import annotations

import json
from typing import Any

import pytest
from playwright.async_api import Browser, Page, Route, expect

from seedcore.registry.server.actor import stop_registry
from tests.serving import World

PATIENCE_MS = 20_000
FOR_PEOPLE = frozenset({"detail", "why", "title", "problem", "registry_problem", "store_problem", "watch_problem"})
SOURCES = frozenset({"registry", "postgres", "ray"})


def reworded(value: Any) -> Any:
    """A JSON answer with other words wherever it has text for people."""
    if isinstance(value, dict):
        return {key: _reworded_field(key, value[key]) for key in value}
    return [reworded(each) for each in value] if isinstance(value, list) else value


def _reworded_field(key: str, value: Any) -> Any:
    is_text = isinstance(value, str) and (key in FOR_PEOPLE or (key in SOURCES and value != "ok"))
    return "completely different words" if is_text else reworded(value)


async def _reword(route: Route) -> None:
    answer = await route.fetch()
    await route.fulfill(response=answer, body=json.dumps(reworded(json.loads(await answer.body()))))


@pytest.fixture
async def pages(browser: Browser) -> Any:
    """Two windows; the second one gets every answer reworded, but for the feed, which has no messages."""
    plain, other = await browser.new_page(), await browser.new_page()
    await other.route(lambda url: "/v1/" in url and "/v1/watch" not in url, _reword)
    yield plain, other
    await plain.close()
    await other.close()


async def state_of(page: Page) -> Any:
    """What the page shows, without its texts."""
    return await page.evaluate(
        """() => ({
            banners: [...document.querySelectorAll("[data-problem]")].map(({ dataset }) => ({ ...dataset })),
            headline: document.querySelector("#agent-headline").dataset.status,
            state: document.querySelector("#agent-state").textContent,
            title: document.title,
            mayDrain: !document.querySelector("#drain").disabled,
            rows: [...document.querySelectorAll("#grid-body .row")].map((one) => one.dataset.logicalId),
        })"""
    )


async def test_rewording_every_answer_changes_no_state_of_the_page(pages: tuple[Page, Page], world: World) -> None:
    for page in pages:
        await page.goto(f"{world.url}/#/agent/never-was")
        await expect(page.locator("#agent-state")).to_have_text(
            "No agent has registered under this id.", timeout=PATIENCE_MS
        )
        await expect(page.locator("#live")).to_have_attribute("data-level", "good", timeout=PATIENCE_MS)
    plain, other = [await state_of(page) for page in pages]
    assert plain == other
    await stop_registry(world.settings.namespace)
    for page in pages:
        await expect(page.locator('[data-problem="registry"]')).to_be_visible(timeout=PATIENCE_MS)
    plain, other = [await state_of(page) for page in pages]
    assert plain == other
    assert "completely different words" in await pages[1].locator("#banners").inner_text()
