"""`seedcore wait` ends with the ready agents, or at the deadline with the reason of each that is missing."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import pytest
import typer

from seedcore.cli import wait as module
from seedcore.cli.backend import ListQuery, every_page
from seedcore.cli.errors import EXIT_CANNOT_KNOW, EXIT_USAGE, NeverRegisteredError
from seedcore.cli.output import Terminal
from seedcore.cli.wait import WaitAnswer, wait, wait_command
from seedcore.core.backoff import Backoff
from seedcore.core.changes import Registration
from seedcore.core.lifecycle import Status
from seedcore.core.limits import MAX_PAGE
from seedcore.discovery.api import AgentAnswer, InstancePage, ResolveAnswer
from seedcore.discovery.pages import resolve_json
from seedcore.discovery.rendering import agent_answer, page_of
from seedcore.registry.caller.awaited import awaited
from tests.builders import iid
from tests.commands import command
from tests.unit.callers import World, world_of

LONG_S, SHORT_S = 30.0, 0.05


class Here:
    """A backend of a registry in this process."""

    place = "here"

    def __init__(self, world: World) -> None:
        self.world = world
        self.answers = 0

    async def resolve(self, logical_ids: Sequence[str]) -> ResolveAnswer:
        self.answers += 1
        answer = await self.world.reader.resolve(logical_ids)
        return ResolveAnswer.model_validate_json(resolve_json(logical_ids, answer))

    async def listing(self, query: ListQuery) -> InstancePage:
        self.answers += 1

        async def page(cursor: str | None) -> InstancePage:
            return page_of(await self.world.reader.list_instances(query.filter(), MAX_PAGE, cursor))

        return await every_page(page)

    async def agent(self, logical_id: str) -> AgentAnswer:
        described = await self.world.reader.describe(logical_id)
        if not described.live and not described.instances:
            raise NeverRegisteredError(logical_id, "Ray has no actor of that name")
        return agent_answer(described)

    async def deaths(self, limit: int, within_s: float | None) -> InstancePage:
        return page_of(await self.world.reader.deaths(limit, None, None))


@pytest.fixture
async def here() -> AsyncIterator[Here]:
    async with world_of() as world:
        yield Here(world)


async def waited(
    backend: Any,
    ids: Sequence[str] | None = None,
    count: int | None = None,
    *,
    organ: str | None = None,
    selector: str | None = None,
    endpoint: str | None = None,
    timeout_s: float = LONG_S,
    lines: list[str] | None = None,
) -> WaitAnswer:
    of = awaited(ids, organ, selector, count, endpoint)
    query = ListQuery(statuses=(), organ=organ, selector=selector or "", with_lapsed=True, endpoint=endpoint)
    shown = lines if lines is not None else []
    return await wait(backend, of, query, timeout_s, shown.append, Backoff(0.002, 0.01))


async def test_wait_ends_as_soon_as_enough_agents_are_ready(here: Here) -> None:
    registry, lines = here.world.registry, list[str]()
    by_ids = asyncio.create_task(waited(here, ["alive", "late-comer"], lines=lines))
    by_filter = asyncio.create_task(waited(here, count=2, organ="eye", selector="tier=a"))
    await asyncio.sleep(0.05)
    assert not by_ids.done()
    for number, (name, tier) in enumerate((("late-comer", "a"), ("other", "b"), ("third", "a"))):
        labels = {"tier": tier}
        await registry.register(Registration(iid(100 + number), name, organ_id="eye", labels=labels), 1)
        await registry.set_status(iid(100 + number), Status.ALIVE, 2)
    assert (await by_ids).ready == ["alive", "late-comer"]
    assert (await by_filter).ready == ["late-comer", "third"]
    assert lines[0].startswith("1 of 2 ready, 1 not registered, ")


async def test_deadline_has_a_reason_for_each_missing_agent(here: Here) -> None:
    ids = ["alive", "starting", "held", "killed", "never-was"]
    answer = await waited(here, ids, timeout_s=SHORT_S)
    assert (answer.wanted, answer.ready, answer.others) == (5, ["alive"], 0)
    assert [(one.logical_id, one.state, one.why) for one in answer.missing] == [
        ("starting", "starting", "it has registered, but not reported alive yet"),
        ("held", "draining", answer.missing[1].why),
        ("killed", "dead", "process killed: SIGKILL (pid 7)"),
        ("never-was", "never_registered", "Ray has no actor of that name"),
    ]
    assert answer.missing[1].why.startswith("operator hold (ann): a new disk, until ")


async def test_deadline_of_a_filter_counts_agents_that_are_not_there_and_names_dead_ones(here: Here) -> None:
    registry = here.world.registry
    for number, name in enumerate(("w1", "w2", "w3")):
        await registry.register(Registration(iid(100 + number), name, organ_id="eye"), 1)
    await registry.set_status(iid(100), Status.ALIVE, 2)
    await registry.deregister(["w3"], "broken", "ann")
    answer = await waited(here, count=4, organ="eye", timeout_s=SHORT_S)
    assert answer.ready == ["w1"]
    assert [(one.logical_id, one.state) for one in answer.missing] == [
        ("w2", "starting"),
        (None, "never_registered"),
        ("w3", "dead"),
    ]
    assert [one.why for one in answer.missing[1:]] == ["2 have not registered", "operator (ann): broken"]


async def test_deadline_of_an_endpoint_names_agents_that_had_it(here: Here) -> None:
    registry, at = here.world.registry, {"http": "http://10.0.0.1:8000"}
    for number, name in enumerate(("w1", "w2", "w3")):
        await registry.register(Registration(iid(100 + number), name, endpoints={} if name == "w3" else at), 1)
        await registry.set_status(iid(100 + number), Status.ALIVE, 2)
    await registry.deregister(["w2"], "broken", "ann")
    answer = await waited(here, count=2, endpoint="http", timeout_s=SHORT_S)
    assert answer.ready == ["w1"]
    assert [(one.logical_id, one.why) for one in answer.missing] == [
        (None, "1 has not registered with endpoint 'http'"),
        ("w2", "operator (ann): broken"),
    ]


async def test_many_missing_agents_are_counted(here: Here) -> None:
    answer = await waited(here, [f"never-{number}" for number in range(30)], timeout_s=SHORT_S)
    assert (len(answer.missing), answer.others) == (20, 10)


async def test_wait_asks_the_database_while_the_registry_is_away_and_outlives_an_outage_of_both(here: Here) -> None:
    here.world.take_away("connection")
    assert (await waited(here, ["alive"])).ready == ["alive"]
    here.world.take_away("connection", "database", "listing")
    waiting = asyncio.create_task(waited(here, count=1, selector="!spot"))
    answer = await waited(here, ["alive", "never-was"], timeout_s=SHORT_S)
    assert [(one.logical_id, one.state) for one in answer.missing] == [("alive", "unknown"), ("never-was", "unknown")]
    assert "cannot know now" in answer.missing[0].why
    assert not waiting.done()
    here.world.take_away()
    assert len((await waiting).ready) == 1


def ended(backend: Any, monkeypatch: pytest.MonkeyPatch, **arguments: Any) -> tuple[int, str]:
    """The exit code and the output of the command with this backend."""
    shown = StringIO()
    monkeypatch.setattr(module, "backend_of", lambda _settings: backend)
    monkeypatch.setattr(module, "out", Terminal(file=shown, width=200))
    with redirect_stdout(shown):
        try:
            wait_command(**arguments)
        except typer.Exit as exit_:
            return exit_.exit_code, shown.getvalue()
    return 0, shown.getvalue()


async def test_command_prints_ids_with_brackets_as_they_are(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "[red]w[/red][0]"
    await here.world.registry.register(Registration(iid(100), name), 1)
    given: dict[str, Any] = {"agents": [name], "timeout": "1s"}

    def run(**more: Any) -> tuple[int, str]:
        return ended(here, monkeypatch, **given, **more)

    def in_thread(**more: Any) -> Any:
        # the command runs an event loop of its own, and the registry belongs to this one
        there = asyncio.get_running_loop()
        monkeypatch.setattr(
            module, "answered", lambda work: asyncio.run_coroutine_threadsafe(work, there).result(LONG_S)
        )
        return asyncio.to_thread(run, **more)

    code, shown = await in_thread()
    assert code == EXIT_CANNOT_KNOW
    assert "0 of 1 agents ready after 1s" in shown
    assert f"{name}  starting" in shown
    code, shown = await in_thread(as_json=True)
    assert code == EXIT_CANNOT_KNOW
    assert json.loads(shown)["missing"][0]["logical_id"] == name
    await here.world.registry.set_status(iid(100), Status.ALIVE, 2)
    assert await in_thread() == (0, f"{name}\n")
    code, shown = await in_thread(as_json=True)
    assert (code, json.loads(shown)["ready"]) == (0, [name])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["wait"], "ID: name the agents to wait for, by ids, organ_id, selector or endpoint"),
        (["wait", "a", "--organ", "eye"], "ID: give ids, or organ_id, selector and endpoint, not both"),
        (["wait", "a", "a"], "ID: name each agent once, not 'a' again"),
        (["wait", "a", "--count", "0"], "--count: must be a whole number from 1 to 1000, not 0"),
        (["wait", "--organ", "eye"], "--count: must be given where no ids are"),
        (["wait", "--selector", "a in (", "-n", "1"], "--selector: cannot be read from"),
        (["wait", "a", "--timeout", "0"], "--timeout: must be finite and more than 0 seconds, not 0"),
        (["wait", "a", "--timeout", "soon"], "--timeout: must be a duration like 90s, 15m, 1h or 2d, not 'soon'"),
    ],
)
def test_bad_input_is_refused_by_its_option(words: list[str], message: str) -> None:
    ended = command(*words)
    assert (ended.code, ended.stdout) == (EXIT_USAGE, "")
    assert ended.stderr.startswith(f"seedcore: {message}")
