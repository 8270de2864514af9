"""The page reads kinds, never messages: with other words in every answer its state is the same (law 2)."""

from __future__ import annotations

import json
import os
import signal
from typing import Any

import pytest
from playwright.async_api import Browser, Page, Route, expect

from seedcore.core.lifecycle import Status
from seedcore.registry.server.actor import stop_registry
from tests.browser.test_page import create, row_of
from tests.serving import World
from tests.waiting import eventually

PATIENCE_MS = 20_000
FOR_PEOPLE = frozenset({"detail", "why", "title", "problem", "registry_problem", "store_problem", "watch_problem"})
SOURCES = frozenset({"registry", "postgres", "ray"})
# the feed never ends, so that its answer cannot be replaced: its events are reworded on their way
REWORDED_FEED = """(() => {
    const forPeople = new Set(FOR_PEOPLE);
    const reworded = (value) => {
        if (Array.isArray(value)) return value.map(reworded);
        if (value === null || typeof value !== "object") return value;
        return Object.fromEntries(Object.entries(value).map(([key, each]) => [
            key,
            typeof each === "string" && (forPeople.has(key) || (key === "reason" && "since" in value))
                ? "completely different words"
                : reworded(each),
        ]));
    };
    const fetched = window.fetch;
    window.fetch = async (...args) => {
        const answer = await fetched(...args);
        if (!String(args[0]).includes("v1/watch") || !answer.ok) return answer;
        let rest = "";
        const lines = new TransformStream({
            transform(text, controller) {
                const parts = (rest + text).split("\\n");
                rest = parts.pop();
                for (const line of parts) {
                    const isData = line.startsWith("data: ");
                    const shown = isData ? `data: ${JSON.stringify(reworded(JSON.parse(line.slice(6))))}` : line;
                    controller.enqueue(`${shown}\\n`);
                }
            },
        });
        const body = answer.body.pipeThrough(new TextDecoderStream()).pipeThrough(lines);
        return new Response(body.pipeThrough(new TextEncoderStream()), { headers: answer.headers });
    };
})()""".replace("FOR_PEOPLE", json.dumps(sorted(FOR_PEOPLE)))


def reworded(value: Any) -> Any:
    """A JSON answer with other words wherever it has text for people."""
    if isinstance(value, dict):
        is_hold = "since" in value
        return {key: _reworded_field("detail" if is_hold and key == "reason" else key, value[key]) for key in value}
    return [reworded(each) for each in value] if isinstance(value, list) else value


def _reworded_field(key: str, value: Any) -> Any:
    is_text = isinstance(value, str) and (key in FOR_PEOPLE or (key in SOURCES and value != "ok"))
    return "completely different words" if is_text else reworded(value)


async def _reword(route: Route) -> None:
    answer = await route.fetch()
    await route.fulfill(response=answer, body=json.dumps(reworded(json.loads(await answer.body()))))


@pytest.fixture
async def pages(browser: Browser) -> Any:
    """Two windows; the second one gets every answer and every event reworded."""
    plain, other = await browser.new_page(), await browser.new_page()
    await other.add_init_script(REWORDED_FEED)
    await other.route(lambda url: "/v1/" in url and "/v1/watch" not in url, _reword)
    yield plain, other
    # an answer that is under way is given before its page goes
    await other.unroute_all(behavior="wait")
    await plain.close()
    await other.close()


async def state_of(page: Page) -> Any:
    """What the page shows, without its texts."""
    return await page.evaluate(
        """() => ({
            banners: [...document.querySelectorAll("[data-problem]")].map(({ dataset }) => ({ ...dataset })),
            headline: { ...document.querySelector("#agent-headline").dataset },
            title: document.title,
            mayDrain: !document.querySelector("#drain").disabled,
            buttons: ["drain", "undrain"].map((id) => document.querySelector(`#${id}`).hidden),
            rows: [...document.querySelectorAll("#grid-body .row")].map(({ dataset, classList }) => (
                { ...dataset, classes: [...classList].filter((name) => name !== "is-new") }
            )),
            holds: [...document.querySelectorAll("#agent-live [data-hold]")].map(({ dataset }) => ({ ...dataset })),
            timeline: [...document.querySelectorAll("#timeline li")].map((one) => (
                { ...one.dataset, move: one.querySelector(".move").textContent }
            )),
            earlier: [...document.querySelectorAll("#earlier li")].map(({ dataset }) => ({ ...dataset })),
            deaths: [...document.querySelectorAll("#deaths-list li")].map(({ dataset }) => ({ ...dataset })),
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


async def shown_alike(pages: tuple[Page, Page]) -> None:
    """Both windows come to show the same state: the second one reads the same events a moment later."""

    async def is_alike() -> bool:
        plain, other = [await state_of(page) for page in pages]
        assert plain == other
        return True

    await eventually(is_alike)


async def test_rewording_every_cause_and_hold_changes_no_class_of_the_page(
    pages: tuple[Page, Page], world: World
) -> None:
    clients = {name: await world.join(name) for name in ("ends", "drains", "is-removed")}
    pid = await create(world, "crashes")
    agents = (*clients, "crashes")
    for page in pages:
        await page.goto(world.url)
        for name in agents:
            await expect(row_of(page, name)).to_be_visible(timeout=PATIENCE_MS)
    await world.ask("POST", "/v1/agents/drains/drain", json={"reason": "a new disk", "duration_s": 3600})
    await clients["ends"].set_status(Status.DEAD, "its work is done")
    await world.ask("DELETE", "/v1/agents/is-removed?reason=no+longer+needed")
    os.kill(pid, signal.SIGKILL)
    for page in pages:
        for name in ("ends", "is-removed", "crashes"):
            await expect(row_of(page, name)).to_have_attribute("data-status", "dead", timeout=PATIENCE_MS)
    await shown_alike(pages)
    for name, text in (("drains", "draining"), ("ends", "dead"), ("is-removed", "dead"), ("crashes", "dead")):
        for page in pages:
            await page.goto(f"{world.url}/#/agent/{name}")
            await expect(page.locator("#agent-headline")).to_have_attribute("data-status", text, timeout=PATIENCE_MS)
            await expect(page.locator("#timeline li").first).to_be_visible(timeout=PATIENCE_MS)
        await shown_alike(pages)
        assert "completely different words" in await pages[1].locator("#agent").inner_text()
        is_failure = await pages[0].locator("#agent-headline").get_attribute("data-planned") is None
        assert is_failure is (name in {"crashes", "drains"})
    for page in pages:
        await page.get_by_role("button", name="Deaths").click()
        await expect(page.locator("#deaths-list li").nth(2)).to_be_visible(timeout=PATIENCE_MS)
    await shown_alike(pages)
