"""The tables of the rules: Python and SQL decide the same over all combinations."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import combinations

import psycopg
import pytest

from seedcore.core.causes import CauseKind, may_become
from seedcore.core.holds import HoldKind, effective_status
from seedcore.core.lifecycle import Status, is_allowed

SETS = [set(chosen) for count in range(len(HoldKind) + 1) for chosen in combinations(HoldKind, count)]


@pytest.fixture(params=["dsn15", "dsn18"], ids=["postgres15", "postgres18"])
def db(request: pytest.FixtureRequest) -> Iterator[psycopg.Connection]:
    with psycopg.connect(request.getfixturevalue(request.param), autocommit=True) as connection:
        yield connection


def test_effective_status_is_the_same_for_every_reported_status_and_every_set_of_holds(
    db: psycopg.Connection,
) -> None:
    cases = [(status, kinds) for status in Status for kinds in SETS]
    assert len(cases) == 4 * 2**4
    rows = db.execute(
        "select effective_status(c.reported, c.holds)::text"
        "  from unnest(%s::instancestatus[], %s::text[]::jsonb[]) with ordinality as c (reported, holds, ord)"
        " order by c.ord",
        ([status.value for status, _ in cases], [json.dumps({kind: {} for kind in kinds}) for _, kinds in cases]),
    ).fetchall()
    assert [status for (status,) in rows] == [effective_status(status, kinds) for status, kinds in cases]


def test_transitions_are_allowed_alike(db: psycopg.Connection) -> None:
    for current in Status:
        for wanted in Status:
            (may,) = db.execute("select status_may_become(%s, %s)", (current.value, wanted.value)).fetchone() or ()
            assert may is is_allowed(current, wanted), (current, wanted)


def test_causes_of_deaths_are_refined_alike(db: psycopg.Connection) -> None:
    for known in CauseKind:
        for better in CauseKind:
            (may,) = db.execute("select cause_may_become(%s, %s)", (known.value, better.value)).fetchone() or ()
            assert may is may_become(known, better), (known, better)


@pytest.mark.parametrize(
    ("kind", "values"), [("instancestatus", Status), ("causekind", CauseKind), ("holdkind", HoldKind)]
)
def test_enumerations_have_the_same_values(db: psycopg.Connection, kind: str, values: type[Status]) -> None:
    labels = "select e.enumlabel from pg_enum e where e.enumtypid = %s::regtype order by e.enumsortorder"
    assert [label for (label,) in db.execute(labels, (kind,))] == [value.value for value in values]
