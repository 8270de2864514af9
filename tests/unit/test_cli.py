"""What the command decides by itself: whether an epoch may be flipped to, and when an agent was first refused."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from seedcore.bench.death import Watcher, first_refusal_after
from seedcore.cli.app import app, exit_code_of, message_of
from seedcore.cli.backend import HttpProblemError, NobodyError
from seedcore.cli.cluster import NoClusterError, NotServedError, SeveralClustersError
from seedcore.cli.fleet import FleetFile, read_fleet, specs_of
from seedcore.cli.output import parse_duration
from seedcore.cli.registry_commands import objection_to_flip
from seedcore.cli.why import reason_of
from seedcore.core.answers import NotResolved, Origin
from seedcore.core.errors import (
    AgentCallError,
    CannotKnowError,
    InvalidInputError,
    NotResolvableError,
    RegistryError,
    RegistryUnavailableError,
    StoreUnavailableError,
    UnknownInstanceError,
)
from seedcore.core.instances import EpochRecord, Instance, Verdict
from seedcore.core.lifecycle import Status
from seedcore.core.limits import check_duration_s
from seedcore.core.paging import check_within_s
from seedcore.discovery.api import AgentAnswer
from seedcore.discovery.problems import ProblemCode
from seedcore.discovery.rendering import agent_answer
from seedcore.discovery.tokens import Right, new_token
from seedcore.registry.protocol.messages import Description, Observed
from seedcore.settings import Settings
from tests.builders import START, instance


def epoch(name: str, state: str, live: int = 0) -> EpochRecord:
    shown = START if state != "staged" else None
    return EpochRecord(name, 1, START, shown, START if state == "retired" else None, live)


@pytest.mark.parametrize(
    ("records", "objection"),
    [
        ([epoch("blue", "current", 3)], "epoch green is not staged.*its 3 agents ended.*--force"),
        ([epoch("blue", "current")], "epoch green is not staged.*retired for good"),
        ([], "epoch green is not staged"),
        ([epoch("green", "staged"), epoch("blue", "current", 3)], "nobody lives in epoch green.*its 3 agents ended"),
    ],
)
def test_a_flip_that_would_end_the_fleet_for_nothing_is_objected_to(records: list[EpochRecord], objection: str) -> None:
    with pytest.raises(AssertionError, match=objection):
        raise AssertionError(objection_to_flip("green", records))


@pytest.mark.parametrize(
    "records",
    [
        [epoch("green", "staged", 1), epoch("blue", "current", 3)],
        [epoch("green", "staged"), epoch("blue", "current")],
        [epoch("green", "current", 3)],
        # the registry says why not
        [epoch("green", "retired"), epoch("blue", "current", 3)],
    ],
)
def test_nothing_speaks_against_a_flip_to_a_fleet_that_is_there(records: list[EpochRecord]) -> None:
    assert objection_to_flip("green", records) is None


class Told:
    """A manager that resolves as told, the last word again and again."""

    def __init__(self, *outcomes: Exception | None) -> None:
        self._outcomes = list(outcomes)

    async def resolve(self, logical_id: str) -> None:
        outcome = self._outcomes.pop(0) if len(self._outcomes) > 1 else self._outcomes[0]
        if outcome is not None:
            raise outcome


def watcher(*outcomes: Exception | None) -> Watcher:
    made = Watcher(Settings())
    manager: Any = Told(*outcomes)
    made._manager = manager
    return made


async def test_who_cannot_be_asked_is_not_gone() -> None:
    silent, gone = CannotKnowError("a", "away"), NotResolvableError("a", NotResolved.DIED, "dead")
    assert await watcher(None, silent, silent, gone).until_gone("a", 10.0) <= time.time()
    with pytest.raises(AgentCallError, match="not known to be gone"):
        await watcher(silent).until_gone("a", 0.05)
    await watcher(gone, silent, None).until_resolved("a", 10.0)
    with pytest.raises(AgentCallError, match="not resolvable within"):
        await watcher(gone).until_resolved("a", 0.05)


async def test_a_refusal_before_the_kill_is_not_measured() -> None:
    refusals = [9.0, 12.0]

    def refused(at: float) -> Callable[[], Awaitable[float]]:
        async def answer() -> float:
            return at

        return answer

    assert await first_refusal_after(10.0, refused(8.0)(), lambda: refused(refusals.pop(0))()) == 12.0
    assert await first_refusal_after(10.0, refused(11.0)(), refused(99.0)) == 11.0


def test_the_command_needs_no_extra_and_imports_no_benchmark_until_one_is_asked_for() -> None:
    script = (
        "import sys; sys.modules['matplotlib'] = None; import seedcore.cli\n"
        "print(sorted(name for name in sys.modules if name.startswith('seedcore.bench')))\n"
        "import seedcore.bench.run"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['seedcore.bench']"


# What is read of a command's words and files


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("90s", 90), ("15m", 900), ("1h", 3600), ("1.5d", 129_600)])
def test_durations_are_read(text: str, seconds: float) -> None:
    assert parse_duration("--for", text, check_duration_s) == seconds
    assert parse_duration("--for", None, check_duration_s) is None


@pytest.mark.parametrize("text", ["", "soon", "-1h", "1w", "1 h", "h", "nan", "-5"])
def test_what_is_no_duration_is_refused_with_examples(text: str) -> None:
    with pytest.raises(InvalidInputError, match="90s, 15m, 1h or 2d"):
        parse_duration("--for", text, check_duration_s)


@pytest.mark.parametrize(("option", "check"), [("--for", check_duration_s), ("--expires", check_within_s)])
def test_a_duration_out_of_bounds_is_told_by_its_option(option: str, check: Any) -> None:
    with pytest.raises(InvalidInputError) as caught:
        parse_duration(option, "99999999d", check)
    assert message_of(caught.value).startswith(f"{option}: must be ")


def test_a_wrong_value_is_told_as_it_was_typed() -> None:
    assert message_of(InvalidInputError("organ_id", "must not be empty")) == "--organ: must not be empty"
    assert message_of(InvalidInputError("FILE", "f is not YAML")) == "FILE: f is not YAML"
    assert message_of(StoreUnavailableError("away")) == str(StoreUnavailableError("away"))


def fleet(tmp_path: Path, text: str) -> FleetFile:
    file = tmp_path / "fleet.yaml"
    file.write_text(text)
    return read_fleet(file)


def test_a_fleet_file_names_each_agent(tmp_path: Path) -> None:
    text = (
        "agents:\n - {id: 'a-{n}', count: 2}\n - {ids: [b, c], organ: x}\n - {id: d, class: 'seedcore.agents:RayAgent'}"
    )
    assert [spec.agent_id for spec in specs_of(fleet(tmp_path, text))] == ["a-1", "a-2", "b", "c", "d"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("agents: [", "is not YAML"),
        ("[]", "the file: input should be"),
        ("agents: 5", "agents: input should be a valid list"),
        ("agents: [{id: a, colour: red}]", "agents.0.colour: extra inputs are not permitted"),
        ("agents: [{organ: x}]", "either id or ids"),
        ("agents: [{id: a, ids: [b]}]", "either id or ids"),
        ("agents: [{id: a, count: 2}]", r"must have \{n\} in it"),
        ("agents: [{ids: [a], count: 2}]", "goes with id"),
        ("agents: [{id: a}, {ids: [b, a]}]", r"not \['a'\] again"),
        ("agents: [{id: 'a{n}', count: 99999}]", "count: input should be less than or equal to 10000"),
        ("agents: [{id: a, class: nowhere}]", "must be written module:Class"),
        ("agents: [{id: a, class: 'nowhere:Nothing'}]", "cannot be imported: No module named 'nowhere'"),
        ("agents: [{id: a, class: 'json:JSONDecoder'}]", "is no subclass of RayAgent"),
        ("agents: [{id: a, num_cpus: -1}]", "agents.0.num_cpus: input should be greater than or equal to 0"),
    ],
)
def test_a_wrong_fleet_file_is_refused_before_anything_is_made(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(InvalidInputError, match=says):
        specs_of(fleet(tmp_path, text))


def test_a_fleet_file_that_is_not_there_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="cannot be read"):
        read_fleet(tmp_path / "none.yaml")


# Exit codes


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (NotResolvableError("a", NotResolved.DIED, "gone"), 3),
        (NobodyError("a", "nor does Ray"), 3),
        (UnknownInstanceError("a"), 3),
        (CannotKnowError("a", "away"), 4),
        (RegistryUnavailableError("away"), 4),
        (StoreUnavailableError("away"), 4),
        (HttpProblemError(404, "none", ProblemCode.NOT_RESOLVABLE), 3),
        (HttpProblemError(404, "Not Found: GET /v1/v1/instances", ProblemCode.NO_SUCH_ROUTE), 4),
        (HttpProblemError(503, "away", ProblemCode.CANNOT_KNOW), 4),
        (HttpProblemError(409, "no", ProblemCode.FORBIDDEN_TRANSITION), 1),
        (HttpProblemError(422, "wrong", ProblemCode.INVALID_INPUT), 2),
        (InvalidInputError("a", "wrong"), 2),
        (NoClusterError("Could not find any running Ray instance"), 4),
        (SeveralClustersError("2 Ray clusters"), 2),
        (NotServedError(), 2),
    ],
)
def test_a_script_is_told_by_the_exit_code_what_went_wrong(error: RegistryError, code: int) -> None:
    assert exit_code_of(error) == code


# Why


def agent(live: list[tuple[Instance, Verdict]], *history: Instance) -> AgentAnswer:
    observed = tuple(Observed(row, verdict, 0.5) for row, verdict in live)
    return agent_answer(Description("agent", observed, history, Origin.REGISTRY, START, 1, complete=True))


def test_of_several_instances_the_one_nearest_to_being_handed_out_is_told_of() -> None:
    draining = instance(1, status=Status.DRAINING, cause="upkeep")
    late, fresh = (instance(2), Verdict.LATE), (instance(3), Verdict.FRESH)
    assert reason_of(agent([(draining, Verdict.FRESH), late, fresh])).state == "alive"
    assert reason_of(agent([(draining, Verdict.FRESH), late])).state == "late"
    assert reason_of(agent([(draining, Verdict.FRESH)])).why == "upkeep"
    assert reason_of(agent([(instance(1, status=Status.STARTING), Verdict.FRESH)])).state == "starting"


def test_of_the_dead_the_last_one_is_told_of_with_what_helps() -> None:
    first = instance(1, status=Status.DEAD, stopped_at=START, cause="stopped")
    last = instance(
        2, status=Status.DEAD, stopped_at=START + timedelta(1), cause="its process was killed by SIGKILL (pid 7)"
    )
    reason = reason_of(agent([], first, last))
    assert (reason.state, reason.why, reason.since) == ("dead", last.cause, last.stopped_at)
    assert reason.advice is not None
    assert "dmesg" in reason.advice
    assert reason_of(agent([])).state == "unknown"
    no_cause = reason_of(agent([], instance(1, status=Status.DEAD, stopped_at=START)))
    assert no_cause.why == "no cause was given"


def test_the_file_of_tokens_is_told_line_by_line(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    past = datetime(2020, 1, 1, tzinfo=UTC)
    lines = [new_token("ci", Right.WRITE)[1].line(), "junk", new_token("old", Right.READ, past)[1].line()]
    file.write_text("\n".join(lines))
    answer = CliRunner().invoke(app, ["token", "check", str(file)])
    assert answer.exit_code == 1
    assert [line.split()[:2] for line in answer.stdout.splitlines()[1:3]] == [["ci", "write"], ["old", "read"]]
    assert "it has ended" in answer.stdout
    assert answer.stderr.startswith("seedcore: line 2: must be NAME")
    told = json.loads(CliRunner().invoke(app, ["token", "check", str(file), "--json"]).stdout)
    assert [token["name"] for token in told["tokens"]] == ["ci", "old"]
    file.write_text(lines[0])
    assert CliRunner().invoke(app, ["token", "check", str(file)]).exit_code == 0
    assert CliRunner().invoke(app, ["token", "check", str(tmp_path / "none")]).exit_code == 1
