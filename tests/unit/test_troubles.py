"""An epoch that is not confirmed, and commits that the database has lost, are shown wherever an operator looks."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from seedcore.cli import doctor
from seedcore.cli.findings import Finding, Grade
from seedcore.cli.output import Terminal
from seedcore.cli.render import show_overview
from seedcore.cli.troubles import LOSS_IS_RECENT, troubles
from seedcore.cli.why import reason_of
from seedcore.core.answers import KnownBefore
from seedcore.core.errors import FencedError
from seedcore.core.instances import Epoch, Verdict
from seedcore.discovery.api import LossOut, OverviewAnswer
from seedcore.discovery.overview import Overviews
from seedcore.registry.caller.live_sources import registry_problem
from seedcore.registry.protocol.messages import DatabaseLoss, Health
from seedcore.settings import Settings
from seedcore.store.replication import Durability, Replication, quorum
from tests.builders import START, iid, instance
from tests.unit.callers import World, world_of
from tests.unit.test_cli import agent

LOSS = DatabaseLoss(START, 12, 9, 3, has_whole_history=False)


async def lose_a_flip(world: World) -> None:
    """An agent knows of a flip that the database does not have."""
    await world.registry.beat_many([iid(1)], None, KnownBefore({}, Epoch("green", 7)))


async def overview_of(world: World) -> OverviewAnswer:
    return await Overviews(Settings(namespace="nowhere"), world.reader, timeout_s=60.0, max_age_s=0.0).now()


def printed(capsys: pytest.CaptureFixture[str], overview: OverviewAnswer) -> str:
    show_overview(Terminal(width=400), overview, "here")
    return capsys.readouterr().out


async def test_an_epoch_that_is_not_confirmed_is_a_problem_of_the_registry_with_the_command_to_run(
    capsys: pytest.CaptureFixture[str],
) -> None:
    async with world_of() as world:
        before = await overview_of(world)
        assert (troubles(before), before.sources.registry) == ([], "ok")
        assert "not confirmed" not in printed(capsys, before)
        await lose_a_flip(world)
        problem = registry_problem(await world.registry.health())
        after = await overview_of(world)
        for text in (problem, after.sources.registry, " ".join(troubles(after)), printed(capsys, after)):
            assert "green" in (text or "")
            assert "seedcore epoch flip" in (text or "")
        assert "not confirmed" in printed(capsys, after)
        # it is the only problem, reported once
        assert len(troubles(after)) == 1
        # another source answers
        assert (await world.reader.sources()).is_ready
        await world.registry.set_current_epoch("green")
        assert troubles(await overview_of(world)) == []


def overview_with(overview: OverviewAnswer, loss: DatabaseLoss, since: timedelta) -> OverviewAnswer:
    assert overview.registry is not None
    report = overview.registry.model_copy(update={"last_loss": LossOut.model_validate(loss)})
    return overview.model_copy(update={"registry": report, "as_of_registry": loss.at + since})


async def test_a_loss_is_a_problem_for_as_long_as_its_alert_and_shown_after_that(
    capsys: pytest.CaptureFixture[str],
) -> None:
    async with world_of() as world:
        overview = await overview_of(world)
    recent = overview_with(overview, LOSS, LOSS_IS_RECENT - timedelta(seconds=1))
    old = overview_with(overview, LOSS, LOSS_IS_RECENT)
    assert [len(troubles(one)) for one in (overview, recent, old)] == [0, 1, 0]
    for one in (recent, old):
        shown = printed(capsys, one)
        for part in ("12 commits", "9 changes", "3 refused", "missing", f"{START.astimezone():%H:%M:%S}"):
            assert part in shown
    whole = overview_with(overview, replace(LOSS, refused=0, has_whole_history=True), timedelta())
    assert "none refused" in printed(capsys, whole)
    assert "missing" not in printed(capsys, whole)


async def findings_of(health: Health) -> dict[str, Finding]:
    class Answers:
        async def hello(self) -> Any:
            return health.hello

        async def health(self) -> Health:
            return health

    connection: Any = Answers()
    return {one.check: one for one in await doctor.registry_findings(connection, Settings(namespace="nowhere"))}


async def test_doctor_shows_both_with_what_to_do() -> None:
    async with world_of() as world:
        await lose_a_flip(world)
        health = replace(await world.registry.health(), last_loss=LOSS)
    found = await findings_of(health)
    assert found["epoch"].grade is Grade.FAILED
    assert all(part in found["epoch"].found for part in ("green", "seedcore epoch flip", "no agent is resolved"))
    assert "epoch-unconfirmed.md" in (found["epoch"].remedy or "")
    assert found["lost commits"].grade is Grade.WARNING
    assert all(part in found["lost commits"].found for part in ("12 commits", "9 changes", "3 refused"))
    assert "lost-commits.md" in (found["lost commits"].remedy or "")


async def test_a_loss_before_the_start_of_the_registry_is_shown_too(capsys: pytest.CaptureFixture[str]) -> None:
    async with world_of() as world:
        await world.registry.beat_many([iid(1)], None, KnownBefore({iid(1): 2}))
        assert troubles(await overview_of(world)) == []
        for _ in range(2):
            answer = await world.registry.beat_many([iid(1), iid(2)], None, KnownBefore({iid(1): 5, iid(2): 2}))
            assert answer.behind == (iid(1),)
        await world.registry.set_status(iid(1), "alive", 5)
        for seqs in ({iid(1): 5}, {iid(2): 9}):
            await world.registry.beat_many([*seqs], None, KnownBefore(seqs))
        health = await world.registry.health()
        assert (health.agents_ahead, health.losses, health.last_loss) == (2, 0, None)
        overview = await overview_of(world)
        found = await findings_of(health)
    for text in (" ".join(troubles(overview)), printed(capsys, overview), found["lost commits"].found):
        assert "2 agents" in text
    assert health.agents_ahead_at is not None
    at = health.agents_ahead_at.timestamp() * 1000
    (notice,) = (one for one in problems_of_page(overview, at) if one["key"] == "ahead")
    assert "2 agents" in notice["text"]


async def test_why_explains_that_a_living_agent_is_not_resolved() -> None:
    living, problem = agent([(instance(1), Verdict.FRESH)]), "confirm one of them with `seedcore epoch flip NAME`"
    assert reason_of(living).advice is None
    reason = reason_of(living, problem)
    assert reason.state == "alive"
    assert "no agent is resolved" in reason.why
    assert "seedcore epoch flip" in (reason.advice or "")
    # what a late agent needs is not forgotten
    late = reason_of(agent([(instance(1), Verdict.LATE)]), problem)
    assert "Its next beat" in (late.advice or "")


def problems_of_page(overview: OverviewAnswer, at: float) -> list[dict[str, Any]]:
    """What the page's own code finds, at a time in milliseconds."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("needs node")
    page = Path(doctor.__file__).parents[1] / "discovery" / "page_files" / "problems.js"
    answer = json.dumps(overview.model_dump(mode="json"))
    script = f"""
        const {{ findProblems }} = await import({json.dumps(page.as_uri())});
        const found = findProblems({{
            overview: {answer}, fetch: {{ error: null }}, feed: {{ state: "live" }}, isListFull: false, now: {at},
        }});
        console.log(JSON.stringify(found));
    """
    run = subprocess.run([node, "--input-type=module", "--eval", script], capture_output=True, text=True, check=True)
    found: list[dict[str, Any]] = json.loads(run.stdout)
    return found


async def test_the_page_shows_both_and_a_loss_of_long_ago_as_a_notice() -> None:
    async with world_of() as world:
        await lose_a_flip(world)
        overview = overview_with(await overview_of(world), LOSS, timedelta())
    at = LOSS.at.timestamp() * 1000
    levels = []
    for after in (timedelta(seconds=1), LOSS_IS_RECENT):
        found = {one["key"]: one for one in problems_of_page(overview, at + after.total_seconds() * 1000)}
        assert "seedcore epoch flip" in found["epoch"]["text"]
        assert found["epoch"]["level"] == "bad"
        assert all(part in found["loss"]["text"] for part in ("12 commits", "9 changes", "refused 3", "missing"))
        levels.append(found["loss"]["level"])
    assert levels == ["warn", "info"]


ASYNCHRONOUS = Replication(False, "", "on", 0, 0, 0, is_visible=True)
SYNCHRONOUS = Replication(False, "ANY 1 (a, b)", "on", 2, 2, 0, is_visible=True)


@pytest.mark.parametrize(
    ("state", "grade", "found"),
    [
        (ASYNCHRONOUS, "ok", "no standby"),
        (replace(ASYNCHRONOUS, standbys=1), "warning", "a failover can lose"),
        (SYNCHRONOUS, "ok", "waits for 1 standby"),
        (replace(SYNCHRONOUS, confirming=1), "ok", "waits for 1 standby"),
        (replace(SYNCHRONOUS, is_visible=False), "ok", "pg_monitor"),
        (replace(SYNCHRONOUS, confirming=0), "failed", "0 of the 1"),
        (replace(SYNCHRONOUS, confirming=0, is_visible=False), "failed", "0 of the 1"),
        (replace(SYNCHRONOUS, names="2 (a, b)", confirming=1), "failed", "1 of the 2"),
        (replace(SYNCHRONOUS, waiting=3), "failed", "3 commits waiting"),
        (replace(SYNCHRONOUS, commit="remote_write"), "warning", "a failover can lose"),
        (replace(SYNCHRONOUS, commit="remote_write", confirming=0), "failed", "0 of the 1"),
        (replace(SYNCHRONOUS, commit="local", confirming=0), "warning", "a failover can lose"),
        (replace(SYNCHRONOUS, is_standby=True, confirming=0), "skipped", "is a standby"),
    ],
)
def test_doctor_shows_whether_commits_reach_a_standby(state: Replication, grade: str, found: str) -> None:
    finding = doctor.replication(state)
    assert finding.grade is Grade(grade)
    assert found in finding.found
    assert ("database-away.md" in (finding.remedy or "")) == (grade == "failed")
    assert ("synchronous_commit" in (finding.remedy or "")) == (grade == "warning")


@pytest.mark.parametrize(
    ("fsync", "pages", "commit", "off"),
    [
        (True, True, "on", ""),
        (False, True, "on", "fsync"),
        (True, False, "on", "full_page_writes"),
        (True, True, "off", "synchronous_commit"),
        (False, False, "off", "fsync, full_page_writes, synchronous_commit"),
    ],
)
def test_doctor_warns_of_settings_with_which_a_crash_loses_commits(
    fsync: bool, pages: bool, commit: str, off: str
) -> None:
    finding = doctor.crash_safety(Durability(fsync, pages, replace(ASYNCHRONOUS, commit=commit)))
    assert finding.grade is (Grade.WARNING if off else Grade.OK)
    assert finding.remedy == (f"set {off} to on" if off else None)


@pytest.mark.parametrize(
    ("names", "number", "listed"),
    [
        ("*", 1, {"*"}),
        ("One, two", 1, {"one", "two"}),
        ("2 (a, b, c)", 2, {"a", "b", "c"}),
        ('ANY 1 ("pod-1","pod-2")', 1, {"pod-1", "pod-2"}),
        ('first 2 (a, "b ""c"" d, e")', 2, {"a", 'b "c" d, e'}),
    ],
)
def test_the_names_of_synchronous_standbys_are_read_as_the_server_reads_them(
    names: str, number: int, listed: set[str]
) -> None:
    assert quorum(names) == (number, frozenset(listed))


def test_a_fenced_registry_of_the_same_term_names_another_process() -> None:
    assert "has the same term" in str(FencedError(2, 2))
    assert "has term 3" in str(FencedError(2, 3))
