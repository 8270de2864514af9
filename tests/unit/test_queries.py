"""The named statements."""

from __future__ import annotations

import inspect
import re

from seedcore.store import postgres, reader, statements
from seedcore.store.queries import queries

_SOURCE = inspect.getsource(postgres) + inspect.getsource(reader) + inspect.getsource(statements)


def test_every_statement_is_one_and_is_sent_by_name() -> None:
    for name, text in queries().items():
        assert text.rstrip().endswith(";")
        assert text.count(";") == 1
        assert f'"{name}"' in _SOURCE


def test_every_statement_that_is_sent_has_a_name_in_the_file() -> None:
    sent = set(re.findall(r'(?:\.run\(|\.as_writer\(|\.run_all\(\s*\[\(|\}\), \()\s*"([a-z_]+)"', _SOURCE))
    assert sent == set(queries())


def test_statements_name_their_columns_or_read_the_named_row() -> None:
    assert not [name for name, text in queries().items() if re.search(r"select\s+\*", text)]
    starred = {name: re.findall(r"select (\w)\.\*\s+from (\w+)", text) for name, text in queries().items()}
    whole = {row for rows in starred.values() for row in rows}
    assert whole == {
        ("i", "instance_row"),
        ("o", "register_instances"),
        ("o", "set_instance_statuses"),
        ("o", "hold_instances"),
    }
