"""The SQL reference lists the functions that other programs may call, as the database has them."""

from __future__ import annotations

import re
from pathlib import Path

import psycopg

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "sql.md"
PUBLIC = (
    "register_instance",
    "register_instances",
    "set_instance_status",
    "set_instance_statuses",
    "hold_instance",
    "release_instance",
    "hold_instances",
    "beat",
    "beat_many",
    "set_current_epoch",
    "stage_epoch",
    "expire_stale_instances",
    "expire_old_epoch_instances",
    "refine_causes",
    "prune_history",
    "labels_match",
)


def signatures(db: psycopg.Connection) -> list[str]:
    rows = db.execute(
        """
        select p.proname || '(' || pg_get_function_arguments(p.oid) || ') returns ' || pg_get_function_result(p.oid)
          from pg_proc p
         where p.proname = any(%s) and p.pronamespace = 'public'::regnamespace
        """,
        (list(PUBLIC),),
    ).fetchall()
    order = {name: place for place, name in enumerate(PUBLIC)}
    return sorted((str(row[0]) for row in rows), key=lambda text: (order[text.partition("(")[0]], text))


def test_listed_functions_are_those_of_the_database(db: psycopg.Connection) -> None:
    found = re.search(r"functions: begin -->\n(.*)<!-- functions: end", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    assert found[1].strip() == "```text\n" + "\n".join(signatures(db)) + "\n```"
