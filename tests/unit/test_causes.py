"""Causes as data, and their words."""

from __future__ import annotations

import pytest

from seedcore.core.causes import Cause, CauseKind, is_refined_by

PLANNED = {"agent", "operator", "drain_ended", "epoch_retired", "superseded"}


@pytest.mark.parametrize("kind", CauseKind)
def test_planned_is_what_the_agent_or_an_operator_decided(kind: CauseKind) -> None:
    assert kind.is_planned is (kind.value in PLANNED)


@pytest.mark.parametrize(
    ("cause", "words"),
    [
        (Cause(CauseKind.LEASE_EXPIRED), "lease expired"),
        (Cause(CauseKind.PROCESS_KILLED, "SIGKILL (pid 12)"), "process killed: SIGKILL (pid 12)"),
        (Cause(CauseKind.OPERATOR, by="ann"), "operator (ann)"),
        (Cause(CauseKind.OPERATOR, "upkeep", "ann"), "operator (ann): upkeep"),
    ],
)
def test_cause_reads_as_a_sentence_in_logs(cause: Cause, words: str) -> None:
    assert str(cause) == words


def test_rewording_a_cause_refines_it_no_differently() -> None:
    for known in CauseKind:
        for better in CauseKind:
            results = {
                is_refined_by(Cause(known, first), Cause(better, second))
                for first, second in (("a", "b"), ("a: b", "a: b: c"), (None, "x"), ("", "y"))
            }
            assert len(results) == 1, (known, better)


def test_decision_is_never_replaced_and_a_cause_replaces_itself() -> None:
    better = Cause(CauseKind.OUT_OF_MEMORY, "of its node")
    assert is_refined_by(Cause(CauseKind.PROCESS_EXITED, "pid 7"), better)
    assert is_refined_by(better, better)
    for known in (None, Cause(CauseKind.AGENT, "stopped"), Cause(CauseKind.UNKNOWN, by="ann")):
        assert not is_refined_by(known, better)
