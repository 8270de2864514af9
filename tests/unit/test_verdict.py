"""The published truth table and `judge` agree for every combination of reports."""

from __future__ import annotations

from itertools import product
from pathlib import Path

from seedcore.core.instances import Verdict
from seedcore.core.verdict import Beats, Death, Evidence, Witness, judge

DOCUMENT = Path(__file__).parents[2] / "docs" / "verdicts.md"


def published() -> list[list[str]]:
    """The rows of the table in docs/verdicts.md."""
    rows = [line.strip("| \n").split(" | ") for line in DOCUMENT.read_text().splitlines() if line.startswith("| ")]
    return rows[1:]


def by_the_table(evidence: Evidence) -> str:
    reports = [
        evidence.process.value,
        evidence.node.value,
        evidence.actor.value,
        evidence.caller.value,
        evidence.beats.value,
        "yes" if evidence.is_frozen else "no",
    ]
    matching = (
        row[-1]
        for row in published()
        if all(cell in {"*", value} for cell, value in zip(row[:-1], reports, strict=True))
    )
    return next(matching)


def named(judgement: Verdict | Death) -> str:
    return f"dead: {judgement.value}" if isinstance(judgement, Death) else judgement.value


EVERYTHING = [
    Evidence(process, node, actor, caller, beats, is_frozen)
    for process, node, actor, caller, beats, is_frozen in product(
        Witness, Witness, Witness, Witness, Beats, [False, True]
    )
]


def test_judge_agrees_with_the_published_table() -> None:
    assert len(EVERYTHING) == 3**4 * 5 * 2
    for evidence in EVERYTHING:
        assert named(judge(evidence)) == by_the_table(evidence), evidence


def test_every_death_has_a_witness_or_an_expired_lease() -> None:
    for evidence in EVERYTHING:
        if isinstance(judge(evidence), Death):
            gone = Witness.GONE in {evidence.process, evidence.node, evidence.actor}
            assert gone or (evidence.beats is Beats.LAPSED and not evidence.is_frozen)


def test_every_result_of_the_table_occurs() -> None:
    reached = {named(judge(evidence)) for evidence in EVERYTHING}
    assert reached == {row[-1] for row in published()}
