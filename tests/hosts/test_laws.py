"""The laws of the hosts report what they are for."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

from seedcore.core.causes import CauseKind
from seedcore.core.lifecycle import Status
from tests.hosts import laws
from tests.hosts.faults import every_fault
from tests.hosts.laws import Absence, Observed
from tests.hosts.records import Call, Ended, Look, Node, Row
from tests.hosts.run import BEGIN, END, with_rows

T = 1_000_000.0
FLEET = {"a": "10.77.0.2", "b": "10.77.0.3"}
A = Row("ia", "a", Status.ALIVE, None, "left", "1-10-100/w/boot", None)
B = Row("ib", "b", Status.ALIVE, None, "right", "2-10-100/w/boot", None)
LIVING = {"1-10-100", "2-10-100"}
LOOK = Look(None, False, {"ia": "a", "ib": "b"}, ["a", "b"], {"a": "ia", "b": "ib"}, 3)


def dead(row: Row, at: float, cause: CauseKind = CauseKind.LEASE_EXPIRED) -> Row:
    return replace(row, status=Status.DEAD, cause=cause, stopped_at=datetime.fromtimestamp(at, UTC))


def test_a_death_of_the_living_is_false_unless_it_was_out_of_reach() -> None:
    row = dead(A, T)
    seen = Observed(living_dead=laws.living_dead([row, dead(B, T, CauseKind.AGENT)], LIVING))
    assert len(laws.false_deaths(seen, None)) == 1
    assert laws.false_deaths(seen, Absence(frozenset({"left"}), T - 20, T + 1)) == []
    assert len(laws.false_deaths(seen, Absence(frozenset({"right"}), T - 20, T + 1))) == 1
    assert len(laws.false_deaths(seen, Absence(frozenset({"left"}), T - 20, T - 1))) == 1
    assert laws.living_dead([row], {"2-10-100"}) == {}


def test_the_death_of_a_node_is_rays_word_only_if_ray_said_so() -> None:
    row = dead(A, T, CauseKind.NODE_DIED)
    seen = Observed(living_dead={row.instance_id: row})
    assert len(laws.false_deaths(seen, None)) == 1
    seen.nodes.append(Node(T - 1, "left", "10.77.0.2", is_alive=False))
    assert laws.false_deaths(seen, None) == []


def test_a_handle_of_the_dead_is_stale_once_no_cache_may_have_it() -> None:
    call = Call("a", "located", T + laws.STALE_S + 1, source="snapshot", instance_id="ia")
    assert len(laws.stale_handles(Observed(calls=[call], rows=[dead(A, T)]))) == 1
    assert laws.stale_handles(Observed(calls=[replace(call, began_at=T + 1)], rows=[dead(A, T)])) == []
    assert laws.stale_handles(Observed(calls=[call], rows=[A])) == []
    answered = replace(call, instance_id=None, answered_by="ia")
    assert len(laws.stale_handles(Observed(calls=[answered], rows=[dead(A, T)]))) == 1


def test_a_handle_on_a_dead_node_is_stale_though_the_instance_is_not_dead() -> None:
    nodes = [Node(T, "left", "10.77.0.2", is_alive=False)]
    call = Call("a", "located", T + laws.NODE_STALE_S + 1, source="registry", instance_id="ia")
    assert len(laws.stale_handles(Observed(calls=[call], rows=[A], nodes=nodes))) == 1


def test_a_call_that_never_ends_is_seen() -> None:
    hung = Ended("a", T, None, 30.0, None)
    assert len(laws.late_ends(Observed(ended=[hung]), T + 31 + laws.RAYS_BOUND_S)) == 1
    assert laws.late_ends(Observed(ended=[hung]), T + 31) == []


def test_an_outage_reaches_from_one_answer_to_the_next() -> None:
    calls = [Call("a", "located", T + at, answered_at=T + at) for at in (1, 2, 9, 10)]
    assert laws.longest_outage_s(Observed(calls=calls), ["a"], T, T + 11) == 7
    assert laws.longest_outage_s(Observed(calls=calls), ["a"], T, T + 30) == 20


def test_settled_is_one_living_instance_of_each_and_the_same_on_every_side() -> None:
    assert (
        laws.unsettled(FLEET, [A, B, dead(replace(A, instance_id="old", process_key="1-9-9"), T)], LIVING, LOOK) is None
    )
    wrong = {
        "another process": ([A, B, dead(replace(A, instance_id="old", process_key="2-11-100"), T)], LIVING, LOOK),
        "missing": ([A, dead(B, T)], LIVING, LOOK),
        "twice": ([A, B, replace(A, instance_id="again", process_key="2-10-100/v/boot")], LIVING, LOOK),
        "ended": ([A, B], {"1-10-100"}, LOOK),
        "registry": ([A, B], LIVING, replace(LOOK, listed={"ia": "a"})),
        "ray": ([A, B], LIVING, replace(LOOK, in_ray=["a"])),
        "node": ([A, B], LIVING, replace(LOOK, alive_nodes=2)),
        "answers": ([A, B], LIVING, replace(LOOK, answered_by={"a": "ia", "b": "ia"})),
    }
    for name, (rows, living, look) in wrong.items():
        assert laws.unsettled(FLEET, rows, {*living, "2-11-100"} if name == "another process" else living, look), name


def test_a_run_of_one_fault_keeps_the_rows_of_the_others() -> None:
    first, second = (fault.name for fault in every_fault()[:2])
    page = with_rows(f"before\n{BEGIN}\n{END}\nafter", [f"| {second} | 1 |"])
    page = with_rows(page, [f"| {first} | 2 |"])
    page = with_rows(page, [f"| {second} | 3 |"])
    rows = [line for line in page.split("\n") if line.startswith("| link")]
    assert rows == [f"| {first} | 2 |", f"| {second} | 3 |"]
    assert page.startswith("before\n")
    assert page.endswith("\nafter")
