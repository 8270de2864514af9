"""The dashboard page, in a real browser, before a real fleet."""

from __future__ import annotations

import os
import signal
from typing import Any
from urllib.parse import quote

from playwright.async_api import Browser, Page, expect

from seedcore.composition import start_registry
from seedcore.core.lifecycle import Status
from seedcore.core.text import first_unfit
from seedcore.registry import RegistryClient
from seedcore.registry.server.actor import stop_registry
from tests.cluster.agents import Worker
from tests.serving import FLEET, World
from tests.waiting import eventually

PATIENCE_MS = 20_000


async def opened(page: Page, world: World, fragment: str = "") -> None:
    """The page, with the whole fleet in its list and the feed at work."""
    await page.goto(f"{world.url}/{fragment}")
    await expect(page.locator("#live")).to_have_attribute("data-level", "good", timeout=PATIENCE_MS)
    for name in FLEET:
        await expect(row_of(page, name).first).to_be_visible(timeout=PATIENCE_MS)


def row_of(page: Page, logical_id: str) -> Any:
    return page.locator(f'#grid-body .row[data-logical-id="{logical_id}"]')


async def create(world: World, name: str) -> int:
    """An agent that Ray does not restart; its process, which is watched."""
    handle = await world.manager.create_agent(
        name, agent_class=Worker, arguments={"settings": world.settings}, max_restarts=0
    )

    async def is_watched() -> bool:
        health = await world.registry.health()
        return health.watched == sum(health.instances.values())

    await eventually(is_watched)
    pid: int = await handle.execute_task.remote("pid")
    return pid


async def test_an_agent_appears_dies_and_its_timeline_shows_the_cause(page: Page, world: World) -> None:
    await opened(page, world)
    loads: list[str] = []
    page.on("load", lambda _: loads.append("again"))
    pid = await create(world, "mayfly")
    row = row_of(page, "mayfly")
    await expect(row).to_have_attribute("data-status", "alive", timeout=PATIENCE_MS)
    os.kill(pid, signal.SIGKILL)
    await expect(row).to_have_attribute("data-status", "dead", timeout=PATIENCE_MS)
    await expect(row).to_contain_text("SIGKILL")
    await row.click()
    await expect(page.locator("#agent-state")).to_contain_text("Dead", timeout=PATIENCE_MS)
    await expect(page.locator("#agent-headline")).to_contain_text("its process was killed: SIGKILL")
    await expect(page.locator('#timeline li[data-status="dead"]')).to_contain_text("SIGKILL")
    await expect(page.locator("#timeline li")).to_have_count(2)
    # it leaves the list in the end, and its page stays
    await expect(row).to_have_count(0, timeout=PATIENCE_MS)
    assert loads == []
    await page.goto(f"{world.url}/#/agent/mayfly")
    await expect(page.locator("#agent-headline")).to_contain_text("killed: SIGKILL", timeout=PATIENCE_MS)


async def test_who_died_is_listed_with_the_cause_the_last_first(page: Page, world: World) -> None:
    for name in ("moth", "midge"):
        os.kill(await create(world, name), signal.SIGKILL)

        async def is_dead(name: str = name) -> bool:
            return any(item["logical_id"] == name for item in (await world.get("/v1/deaths"))["items"])

        await eventually(is_dead)
    await opened(page, world)
    await page.get_by_role("button", name="Deaths").click()
    lines = page.locator("#deaths-list li")
    await expect(lines.nth(0)).to_contain_text("midge", timeout=PATIENCE_MS)
    await expect(lines.nth(1)).to_contain_text("moth")
    await expect(lines.nth(0)).to_contain_text("killed: SIGKILL")
    await expect(lines.nth(0)).not_to_have_attribute("data-planned", "")
    await lines.nth(1).get_by_role("link").click()
    await expect(page.locator("#deaths-dialog")).to_be_hidden()
    await expect(page.locator("#agent-name")).to_have_text("moth", timeout=PATIENCE_MS)


async def test_who_may_only_read_is_asked_for_a_token_before_anything_is_changed(page: Page, world: World) -> None:
    await opened(page, world, "#/agent/bee")
    await page.locator("#drain").click()
    token, error = page.locator("#token"), page.locator("#sign-in-error")
    await expect(token).to_be_focused()
    await token.fill("sct_wrong")
    await page.keyboard.press("Enter")
    await expect(error).to_have_text("the token is not known", timeout=PATIENCE_MS)
    await token.fill(world.tokens.expired)
    await page.keyboard.press("Enter")
    await expect(error).to_have_text("the token has expired", timeout=PATIENCE_MS)
    await token.fill(world.tokens.read)
    await page.keyboard.press("Enter")
    await expect(page.locator("#sign-in")).to_have_text("reader (read)", timeout=PATIENCE_MS)
    await page.locator("#drain").click()
    await expect(page.locator("#sign-in-why")).to_contain_text("right to write")
    await page.locator("#sign-out").click()
    await expect(page.locator("#sign-in")).to_have_text("Sign in", timeout=PATIENCE_MS)
    assert (await world.get("/v1/agents/bee"))["live"][0]["instance"]["status"] == "alive"


async def test_caller_without_the_read_right_is_asked_for_a_token(page: Page, world: World) -> None:
    await opened(page, world)
    await page.evaluate("token => sessionStorage.setItem('seedcore:token', token)", world.tokens.expired)
    await page.reload()
    await expect(page.locator("#banners")).to_contain_text("Sign in to see the fleet", timeout=PATIENCE_MS)
    await expect(page.locator("#live-text")).to_have_text("Not signed in")
    await expect(page.locator("#empty-title")).to_have_text("Not signed in")
    await expect(page.locator("#sign-in-error")).to_have_text("the token has expired")
    await expect(page.locator("#token")).to_be_focused()
    await page.locator("#token").fill(world.tokens.read)
    await page.keyboard.press("Enter")
    await expect(page.locator("#sign-in")).to_have_text("reader (read)", timeout=PATIENCE_MS)
    await expect(page.locator("#live-text")).to_have_text("Live", timeout=PATIENCE_MS)
    await expect(page.locator("#banners")).not_to_contain_text("Sign in")


async def signed_in(page: Page, world: World) -> None:
    await page.locator("#sign-in").click()
    await page.locator("#token").fill(world.tokens.write)
    await page.locator("#sign-in-confirm").click()
    await expect(page.locator("#sign-in")).to_have_text("writer (write)", timeout=PATIENCE_MS)


async def test_an_agent_is_drained_and_undrained_by_buttons(page: Page, world: World) -> None:
    await opened(page, world, "#/agent/ant")
    await signed_in(page, world)
    await page.locator("#drain").click()
    await page.locator("#drain-reason").fill("a new disk")
    await page.get_by_label("15 min").check()
    await page.locator("#drain-confirm").click()
    await expect(row_of(page, "ant")).to_have_attribute("data-status", "draining", timeout=PATIENCE_MS)
    await expect(page.locator("#agent-headline")).to_contain_text("a new disk")
    agent = await world.get("/v1/agents/ant")
    (hold,) = agent["live"][0]["instance"]["holds"]
    assert (hold["kind"], hold["reason"], hold["by"]) == ("operator", "a new disk", "writer")
    shown = page.locator('#agent-live [data-hold="operator"]')
    for part in ("a new disk", "writer", "in 15 min"):
        await expect(shown).to_contain_text(part, timeout=PATIENCE_MS)
    await page.locator("#undrain").click()
    await expect(row_of(page, "ant")).to_have_attribute("data-status", "alive", timeout=PATIENCE_MS)
    assert (await world.get("/v1/agents/ant"))["live"][0]["instance"]["status"] == "alive"


async def test_a_planned_end_is_shown_as_no_failure(page: Page, world: World) -> None:
    await opened(page, world)
    client = RegistryClient("planned", settings=world.settings)
    await client.set_status(Status.ALIVE)
    row = row_of(page, "planned")
    await expect(row).to_be_visible(timeout=PATIENCE_MS)
    await client.set_status(Status.DEAD, "its work is done")
    await expect(row).to_have_attribute("data-status", "dead", timeout=PATIENCE_MS)
    await expect(row).to_have_attribute("data-planned", "")
    await row.click()
    await expect(page.locator("#agent-headline")).to_have_attribute("data-planned", "", timeout=PATIENCE_MS)
    await expect(page.locator('#timeline li[data-status="dead"]')).to_have_attribute("data-planned", "")
    await expect(page.locator("#agent-headline")).to_contain_text("its work is done")


async def test_it_shows_that_the_database_is_away_and_that_it_is_back(page: Page, world: World) -> None:
    await opened(page, world)
    world.server.stop()
    banner = page.locator('#banners [data-problem="database"]')
    await expect(banner).to_be_visible(timeout=PATIENCE_MS)
    await expect(banner).to_contain_text("The registry cannot use PostgreSQL")
    # what the registry knows goes on
    client = RegistryClient("born-meanwhile", settings=world.settings)
    await client.set_status(Status.ALIVE)
    await expect(row_of(page, "born-meanwhile")).to_be_visible(timeout=PATIENCE_MS)
    world.server.start()
    await expect(banner).to_have_count(0, timeout=PATIENCE_MS)
    await client.set_status(Status.DEAD)


async def test_it_shows_that_the_registry_is_away_and_keeps_the_last_list(page: Page, world: World) -> None:
    await opened(page, world, "#/agent/ant")
    await stop_registry(world.settings.namespace)
    banner = page.locator('#banners [data-problem="registry"]')
    await expect(banner).to_be_visible(timeout=PATIENCE_MS)
    await expect(row_of(page, "ant")).to_be_visible()
    await expect(page.locator("#drain")).to_be_disabled()
    await start_registry(world.settings)
    await expect(banner).to_have_count(0, timeout=PATIENCE_MS)
    await expect(page.locator("#live")).to_have_attribute("data-level", "good", timeout=PATIENCE_MS)
    await expect(page.locator("#drain")).to_be_enabled(timeout=PATIENCE_MS)


async def test_it_is_used_by_keyboard_alone(page: Page, world: World) -> None:
    await opened(page, world)
    await page.keyboard.press("/")
    await expect(page.locator("#search")).to_be_focused()
    await page.keyboard.type("ant")
    await expect(page.locator("#grid-body .row")).to_have_count(1)
    await page.keyboard.press("ArrowDown")
    await page.keyboard.press("Enter")
    await expect(page.locator("#agent-name")).to_have_text("ant")
    await expect(page.locator("#timeline li").first).to_be_visible(timeout=PATIENCE_MS)
    await page.keyboard.press("Escape")
    await expect(page.locator("#agent")).to_be_hidden()
    assert "q=ant" in page.url
    await page.go_back()
    await expect(page.locator("#agent")).to_be_visible()


async def test_what_agents_say_of_themselves_is_text_and_nothing_else(page: Page, world: World) -> None:
    hostile = '<img src=x onerror="document.title=1">/../%2e é 漢'
    client = RegistryClient(
        hostile,
        organ_id="<b>organ</b>",
        labels={"<i>": "</script>"},
        metadata={"a": "<u>"},
        endpoints={"<s>": "javascript://h/%0aalert(1)"},
        settings=world.settings,
    )
    await client.set_status(Status.ALIVE)
    await opened(page, world)
    await page.locator("#search").fill("onerror")
    await expect(page.locator("#grid-body .row .c-agent")).to_contain_text(hostile)
    await page.goto(f"{world.url}/#/agent/{quote(hostile, safe='')}")
    await expect(page.locator("#agent-name")).to_have_text(hostile)
    await expect(page.locator("#timeline li").first).to_be_visible(timeout=PATIENCE_MS)
    assert await page.locator("#agent img, #grid-body img, #agent b b, #agent a, #agent s").count() == 0
    await expect(page.locator("#agent .endpoints")).to_have_text("<s> javascript://h/%0aalert(1)")
    assert "SeedCore" in await page.title()
    await client.set_status(Status.DEAD)


async def test_on_a_phone_nothing_is_wider_than_the_screen(browser: Browser, world: World) -> None:
    page = await browser.new_page(viewport={"width": 390, "height": 844}, has_touch=True, color_scheme="dark")
    await opened(page, world)
    widths = "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    wide, screen = await page.evaluate(widths)
    assert wide <= screen
    await row_of(page, "ant").click()
    await expect(page.locator("#agent-name")).to_have_text("ant")
    await expect(page.locator("#drain")).to_be_visible(timeout=PATIENCE_MS)
    box = await page.locator("#agent").bounding_box()
    assert box is not None
    assert (box["x"], box["width"]) == (0, 390)
    for button in ("#agent-close", "#drain"):
        target = await page.locator(button).bounding_box()
        assert target is not None
        assert min(target["width"], target["height"]) >= 44
    await page.close()


async def test_the_page_of_the_api_works_under_its_policy(page: Page, world: World) -> None:
    refused: list[str] = []
    page.on("console", lambda told: refused.append(told.text) if "Content Security Policy" in told.text else None)
    answer = await page.goto(f"{world.url}/docs")
    assert answer is not None
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    operation = page.locator("#operations-health-healthz_healthz_get")
    await expect(operation).to_be_visible(timeout=PATIENCE_MS)
    await operation.click()
    await operation.get_by_role("button", name="Try it out").click()
    await operation.get_by_role("button", name="Execute").click()
    await expect(operation.locator(".live-responses-table tbody .response-col_status").first).to_contain_text(
        "200", timeout=PATIENCE_MS
    )
    await expect(operation.locator(".live-responses-table")).to_contain_text('"status": "ok"')
    assert refused == []


async def test_a_name_that_hides_or_reorders_is_shown_as_what_it_is(page: Page, world: World) -> None:
    hostile = "owl\x9b\u202etxt.exe\u200b"
    await stop_registry(world.settings.namespace)
    query = "select register_instance(p_instance_id => gen_random_uuid(), p_logical_id => %s, p_organ_id => %s)"
    world.rows(query, hostile, hostile)
    await start_registry(world.settings)
    await page.goto(f"{world.url}/#/agent/{quote(hostile, safe='')}")
    await expect(page.locator("#agent-name")).to_have_text("owl\\u009b\\u202etxt.exe\\u200b", timeout=PATIENCE_MS)
    seen = await page.evaluate(
        """() => [document.title, document.body.innerText,
            ...[...document.querySelectorAll("[title]")].map((one) => one.title)].join("\\n")"""
    )
    assert first_unfit(seen.replace("\n", "").replace("\t", "")) is None
    assert "\\u202etxt.exe" in seen
