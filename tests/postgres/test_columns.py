"""A column is added in four places: the schema, the row (store/rows.py), the value (core/instances.py), and the
documentation (docs/reference/sql.md). These tests fail where one of them is missing; tests/unit/test_rows.py compares
the row with the value."""

from __future__ import annotations

import re
from dataclasses import fields

import psycopg
import pytest

from seedcore.core.changes import Registration
from seedcore.core.instances import Transition
from seedcore.store.rows import InstanceRow
from tests.postgres.test_reference import PAGE

# what the registry writes and never reads back
WRITTEN_ONLY = {"writer_id", "writer_seq", "version"}
TABLES = ("registry_instance", "registry_transition", "cluster_epoch", "cluster_metadata", "registry_writer")


def columns(db: psycopg.Connection, relation: str) -> list[str]:
    statement = (
        "select attname::text from pg_attribute"
        " where attrelid = %s::regclass and attnum > 0 and not attisdropped order by attnum"
    )
    return [name for (name,) in db.execute(statement, (relation,))]


def test_every_column_of_an_instance_is_in_the_row(db: psycopg.Connection) -> None:
    assert columns(db, "instance_row") == list(InstanceRow._fields)
    assert set(columns(db, "registry_instance")) == set(InstanceRow._fields) | WRITTEN_ONLY


def test_every_field_of_a_registration_is_a_column(db: psycopg.Connection) -> None:
    assert {field.name for field in fields(Registration)} - {"started_epoch"} <= set(columns(db, "registry_instance"))


def test_every_column_of_a_transition_is_in_the_value(db: psycopg.Connection) -> None:
    of_the_value = {field.name for field in fields(Transition)} - {"cause"}
    assert set(columns(db, "registry_transition")) == of_the_value | {"id", "cause_kind", "cause_detail", "cause_by"}


@pytest.mark.parametrize("table", TABLES)
def test_every_column_is_documented_with_its_comment(db: psycopg.Connection, table: str) -> None:
    comments: dict[str, str] = dict(
        db.execute(
            "select attname::text, col_description(attrelid, attnum) from pg_attribute"
            " where attrelid = %s::regclass and attnum > 0 and not attisdropped",
            (table,),
        ).fetchall()
    )
    page = PAGE.read_text(encoding="utf-8")
    section = re.search(rf"^`{table}`:\n(.*?)(?=\n\n[^|]|\Z)", page, re.DOTALL | re.MULTILINE)
    assert section is not None, table
    listed = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", section[1], re.MULTILINE))
    assert listed == comments
