"""What the command decides without a cluster: exit codes, its input, objections to a flip, explanations of a state."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from seedcore.bench.death import Watcher, first_refusal_after
from seedcore.cli.app import app
from seedcore.cli.control import objection_to_flip
from seedcore.cli.doctor import examine
from seedcore.cli.errors import (
    HttpProblemError,
    NeverRegisteredError,
    NoClusterError,
    NotServedError,
    SeveralClustersError,
    exit_code_of,
    message_of,
)
from seedcore.cli.findings import Grade
from seedcore.cli.fleet_file import FleetFile, read_fleet
from seedcore.cli.output import Terminal, parse_duration, print_json
from seedcore.cli.render import show_agent, show_listing
from seedcore.cli.why import reason_of
from seedcore.core.answers import Listing, NotResolved, Origin
from seedcore.core.causes import Cause, CauseKind
from seedcore.core.errors import (
    AgentCallError,
    CannotKnowError,
    ConfigurationError,
    InvalidInputError,
    NotResolvableError,
    RegistryError,
    RegistryUnavailableError,
    StoreUnavailableError,
    UnknownInstanceError,
)
from seedcore.core.holds import HoldKind
from seedcore.core.instances import EpochRecord, Instance, Verdict
from seedcore.core.lifecycle import Status
from seedcore.core.limits import check_duration_s
from seedcore.core.paging import check_within_s
from seedcore.discovery.api import AgentAnswer, CauseOut
from seedcore.discovery.problems import ProblemCode
from seedcore.discovery.rendering import agent_answer, page_of
from seedcore.discovery.tokens import Right, new_token
from seedcore.registry.caller.locator import Located
from seedcore.registry.protocol.messages import Description, Observed
from seedcore.settings import Settings
from tests.builders import START, hold, instance
from tests.commands import command


def epoch(name: str, state: str, live: int = 0) -> EpochRecord:
    shown = START if state != "staged" else None
    return EpochRecord(name, 1, START, shown, START if state == "retired" else None, live)


@pytest.mark.parametrize(
    ("records", "objection"),
    [
        ([epoch("blue", "current", 3)], "not staged.* 3 agents .*--force"),
        ([epoch("blue", "current")], "not staged.*retired for good"),
        ([], "not staged"),
        ([epoch("green", "staged"), epoch("blue", "current", 3)], "no live agents.* 3 agents "),
    ],
)
def test_flip_that_would_end_a_fleet_without_another_is_objected_to(records: list[EpochRecord], objection: str) -> None:
    found = objection_to_flip("green", records)
    assert found is not None
    assert re.search(objection, found)


@pytest.mark.parametrize(
    "records",
    [
        [epoch("green", "staged", 1), epoch("blue", "current", 3)],
        [epoch("green", "staged"), epoch("blue", "current")],
        [epoch("green", "current", 3)],
        # the registry refuses it
        [epoch("green", "retired"), epoch("blue", "current", 3)],
    ],
)
def test_flip_to_an_epoch_with_agents_is_not_objected_to(records: list[EpochRecord]) -> None:
    assert objection_to_flip("green", records) is None


class Scripted:
    """A resolver with given outcomes; the last one repeats."""

    def __init__(self, *outcomes: Exception | None) -> None:
        self._outcomes = list(outcomes)

    async def resolve(self, logical_id: str) -> None:
        outcome = self._outcomes.pop(0) if len(self._outcomes) > 1 else self._outcomes[0]
        if outcome is not None:
            raise outcome

    async def locate(self, logical_id: str) -> Located:
        raise NotImplementedError


def test_flip_that_confirms_a_lost_epoch_waits_for_its_agents_to_register_again() -> None:
    blue = epoch("blue", "current", live=2)
    for records in ([blue], [blue, epoch("green", "staged")]):
        objection = objection_to_flip("green", records, is_lost=True)
        assert "register again" in (objection or "")
        assert "--force" in (objection or "")
    assert objection_to_flip("green", [blue, epoch("green", "staged", live=1)], is_lost=True) is None
    assert objection_to_flip("blue", [epoch("blue", "current")], is_lost=True) is None


def watcher(*outcomes: Exception | None) -> Watcher:
    return Watcher(Settings(), Scripted(*outcomes))


async def test_unknown_is_not_gone() -> None:
    silent, gone = CannotKnowError("a", "away"), NotResolvableError("a", NotResolved.DIED, "dead")
    assert await watcher(None, silent, silent, gone).until_gone("a", 10.0) <= time.time()
    with pytest.raises(AgentCallError, match="not known to be gone"):
        await watcher(silent).until_gone("a", 0.05)
    await watcher(gone, silent, None).until_resolved("a", 10.0)
    with pytest.raises(AgentCallError, match="not resolvable within"):
        await watcher(gone).until_resolved("a", 0.05)


async def test_refusal_before_the_kill_is_not_measured() -> None:
    refusals = [9.0, 12.0]

    def refused(at: float) -> Callable[[], Awaitable[float]]:
        async def answer() -> float:
            return at

        return answer

    assert await first_refusal_after(10.0, refused(8.0)(), lambda: refused(refusals.pop(0))()) == 12.0
    assert await first_refusal_after(10.0, refused(11.0)(), refused(99.0)) == 11.0


def test_command_needs_no_extra_and_imports_no_benchmark_until_one_runs() -> None:
    script = (
        "import sys; sys.modules['matplotlib'] = None; import seedcore.cli\n"
        "print(sorted(name for name in sys.modules if name.startswith('seedcore.bench')))\n"
        "import seedcore.bench.run"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['seedcore.bench']"


# Arguments and files


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("90s", 90), ("15m", 900), ("1h", 3600), ("1.5d", 129_600)])
def test_durations_are_parsed(text: str, seconds: float) -> None:
    assert parse_duration("--for", text, check_duration_s) == seconds
    assert parse_duration("--for", None, check_duration_s) is None


@pytest.mark.parametrize("text", ["", "soon", "-1h", "1w", "1 h", "h", "nan", "-5"])
def test_text_that_is_no_duration_is_refused_with_examples(text: str) -> None:
    with pytest.raises(InvalidInputError, match="90s, 15m, 1h or 2d"):
        parse_duration("--for", text, check_duration_s)


@pytest.mark.parametrize(("option", "check"), [("--for", check_duration_s), ("--expires", check_within_s)])
def test_duration_out_of_bounds_is_named_by_its_option(option: str, check: Any) -> None:
    with pytest.raises(InvalidInputError) as caught:
        parse_duration(option, "99999999d", check)
    assert message_of(caught.value).startswith(f"{option}: must be ")


def test_wrong_value_is_named_by_its_option() -> None:
    assert message_of(InvalidInputError("organ_id", "must not be empty")) == "--organ: must not be empty"
    assert message_of(InvalidInputError("FILE", "f is not YAML")) == "FILE: f is not YAML"
    assert message_of(StoreUnavailableError("away")) == str(StoreUnavailableError("away"))


def fleet(tmp_path: Path, text: str) -> FleetFile:
    file = tmp_path / "fleet.yaml"
    file.write_text(text)
    return read_fleet(file)


def test_fleet_file_names_each_agent(tmp_path: Path) -> None:
    text = (
        "agents:\n - {id: 'a-{n}', count: 2}\n - {ids: [b, c], organ: x}\n - {id: d, class: 'seedcore.agents:RayAgent'}"
    )
    assert [spec.agent_id for spec in fleet(tmp_path, text).specs()] == ["a-1", "a-2", "b", "c", "d"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("agents: [", "is not YAML"),
        ("[]", "the file: input should be"),
        ("agents: 5", "agents: input should be a valid list"),
        ("agents: [{id: a, colour: red}]", "agents.0.colour: extra inputs are not permitted"),
        ("agents: [{organ: x}]", "either id or ids"),
        ("agents: [{id: a, ids: [b]}]", "either id or ids"),
        ("agents: [{id: a, count: 2}]", r"must contain \{n\}"),
        ("agents: [{ids: [a], count: 2}]", "needs id"),
        ("agents: [{id: a}, {ids: [b, a]}]", r"repeated: \['a'\]"),
        ("agents: [{id: 'a{n}', count: 99999}]", "count: input should be less than or equal to 10000"),
        ("agents: [{id: a, class: nowhere}]", "must be written module:Class"),
        ("agents: [{id: a, class: 'nowhere:Nothing'}]", "cannot be imported: No module named 'nowhere'"),
        ("agents: [{id: a, class: 'json:JSONDecoder'}]", "is not a subclass of RayAgent"),
        ("agents: [{id: a, num_cpus: -1}]", "agents.0.num_cpus: input should be greater than or equal to 0"),
    ],
)
def test_wrong_fleet_file_is_refused_before_any_agent_is_created(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        fleet(tmp_path, text).specs()


def test_missing_fleet_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="cannot be read"):
        read_fleet(tmp_path / "none.yaml")


# Exit codes


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (NotResolvableError("a", NotResolved.DIED, "gone"), 3),
        (NeverRegisteredError("a", "nor does Ray"), 3),
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
        (ConfigurationError("SEEDCORE_PG_DSN", "wrong"), 2),
        (NoClusterError("Could not find any running Ray instance"), 4),
        (SeveralClustersError("2 Ray clusters"), 2),
        (NotServedError(), 2),
    ],
)
def test_exit_code_follows_from_the_error(error: RegistryError, code: int) -> None:
    assert exit_code_of(error) == code


# Why


def agent(live: list[tuple[Instance, Verdict]], *instances: Instance) -> AgentAnswer:
    observed = tuple(Observed(row, verdict, 0.5) for row, verdict in live)
    return agent_answer(Description("agent", observed, instances, Origin.REGISTRY, START, 1, complete=True))


def test_of_several_instances_the_one_that_callers_would_resolve_is_explained() -> None:
    draining = instance(1, status=Status.DRAINING, cause=Cause(CauseKind.AGENT, "upkeep"))
    late, fresh = (instance(2), Verdict.LATE), (instance(3), Verdict.FRESH)
    assert reason_of(agent([(draining, Verdict.FRESH), late, fresh])).state == "alive"
    assert reason_of(agent([(draining, Verdict.FRESH), late])).state == "late"
    assert reason_of(agent([(draining, Verdict.FRESH)])).cause == CauseOut(
        kind=CauseKind.AGENT, detail="upkeep", by=None
    )
    assert reason_of(agent([(instance(1, status=Status.STARTING), Verdict.FRESH)])).state == "starting"


def test_of_a_held_instance_every_hold_is_explained_with_its_operator_and_its_end() -> None:
    placed = [hold("a new disk", START, by="ann"), hold("its database is away", kind=HoldKind.PROCESS)]
    reason = reason_of(agent([(instance(1, holds=tuple(placed)), Verdict.FRESH)]))
    assert reason.state == "draining"
    assert [(each.kind, each.reason, each.by, each.expires_at) for each in reason.holds] == [
        (HoldKind.OPERATOR, "a new disk", "ann", START),
        (HoldKind.PROCESS, "its database is away", None, None),
    ]
    assert all(part in reason.why for part in ("ann", "a new disk", "its database is away"))
    assert "seedcore undrain agent" in (reason.advice or "")
    unready = hold("it loads a model", kind=HoldKind.READINESS)
    assert reason_of(agent([(instance(1, holds=(unready,)), Verdict.FRESH)])).state == "starting"


def test_ls_and_get_show_holds_and_their_json_has_the_kinds(capsys: pytest.CaptureFixture[str]) -> None:
    placed = hold("a new disk", START + timedelta(hours=1), by="ann")
    held = instance(1, holds=(placed,), cause=placed.cause)
    page = page_of(Listing((held, instance(2)), Origin.REGISTRY, START, 1, True))
    console = Terminal(width=200)
    show_listing(console, page)
    head, first, second, _ = capsys.readouterr().out.splitlines()
    assert "HOLDS" in head
    assert "operator" in first
    assert "operator" not in second
    show_agent(console, agent([(held, Verdict.FRESH)]))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "a new disk" in line]
    assert all(part in line for part in ("draining", "operator", "ann", "since", "until"))
    print_json(page)
    item = json.loads(capsys.readouterr().out)["items"][0]
    assert item["cause"] == {"kind": "operator", "detail": "a new disk", "by": "ann"}
    assert (item["reported_status"], item["holds"][0]["kind"]) == ("alive", "operator")


@pytest.mark.parametrize("kind", CauseKind)
def test_advice_about_a_death_depends_on_the_kind_of_its_cause_alone(kind: CauseKind) -> None:
    reasons = [
        reason_of(agent([], instance(1, status=Status.DEAD, stopped_at=START, cause=Cause(kind, detail))))
        for detail in (None, "killed by SIGKILL", "lease expired: low on memory")
    ]
    assert len({reason.advice for reason in reasons}) == 1
    assert {reason.cause.kind for reason in reasons if reason.cause is not None} == {kind}
    # every failure has an advice
    assert kind.is_planned or reasons[0].advice is not None


def test_of_dead_instances_the_last_one_is_explained_with_advice() -> None:
    first = instance(1, status=Status.DEAD, stopped_at=START, cause=Cause(CauseKind.AGENT, "stopped"))
    last = instance(
        2, status=Status.DEAD, stopped_at=START + timedelta(1), cause=Cause(CauseKind.PROCESS_KILLED, "SIGKILL (pid 7)")
    )
    reason = reason_of(agent([], first, last))
    assert (reason.state, reason.why, reason.since) == ("dead", str(last.cause), last.stopped_at)
    assert reason.advice is not None
    assert "dmesg" in reason.advice
    assert reason_of(agent([])).state == "unknown"
    no_cause = reason_of(agent([], instance(1, status=Status.DEAD, stopped_at=START)))
    assert no_cause.why == "no cause was given"


def test_token_check_lists_tokens_and_names_wrong_lines(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    past = datetime(2020, 1, 1, tzinfo=UTC)
    lines = [new_token("ci", Right.WRITE)[1].line(), "junk", new_token("old", Right.READ, past)[1].line()]
    file.write_text("\n".join(lines))
    answer = CliRunner().invoke(app, ["token", "check", str(file)])
    assert answer.exit_code == 1
    assert [line.split()[:2] for line in answer.stdout.splitlines()[1:3]] == [["ci", "write"], ["old", "read"]]
    assert "it has ended" in answer.stdout
    assert answer.stderr.startswith("seedcore: line 2: must be NAME")
    found = json.loads(CliRunner().invoke(app, ["token", "check", str(file), "--json"]).stdout)
    assert [token["name"] for token in found["tokens"]] == ["ci", "old"]
    file.write_text(lines[0])
    assert CliRunner().invoke(app, ["token", "check", str(file)]).exit_code == 0
    assert CliRunner().invoke(app, ["token", "check", str(tmp_path / "none")]).exit_code == 1


# Doctor and settings


def test_doctor_reports_a_malformed_dsn_as_the_configuration_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEEDCORE_PG_DSN", "postgresql://user@host:port/database")
    [finding] = examine()
    assert (finding.check, finding.grade) == ("configuration", Grade.FAILED)
    assert finding.found.startswith("SEEDCORE_PG_DSN: ")
    assert "correct this variable" in (finding.remedy or "")


def test_migrate_with_a_malformed_dsn_is_wrong_usage() -> None:
    answer = command("migrate", SEEDCORE_PG_DSN="postgresql://user@host:port/database")
    assert answer.code == 2
    assert answer.stderr.startswith("seedcore: SEEDCORE_PG_DSN: ")


def test_every_command_and_option_has_a_help_text() -> None:
    def leaves(group: Any) -> Iterator[Any]:
        for one in group.commands.values():
            yield from leaves(one) if hasattr(one, "commands") else [one]

    for one in leaves(typer.main.get_command(app)):
        assert one.help, one.name
        assert [option.name for option in one.params if not option.help] == [], one.name
