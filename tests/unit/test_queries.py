"""The named statements."""

from __future__ import annotations

import inspect
import re

from seedcore.store import postgres
from seedcore.store.queries import queries


def test_every_statement_is_one_and_is_sent_by_name() -> None:
    source = inspect.getsource(postgres)
    for name, text in queries().items():
        assert text.rstrip().endswith(";")
        assert text.count(";") == 1
        assert f'"{name}"' in source


def test_every_statement_that_is_sent_has_a_name_in_the_file() -> None:
    sent = set(re.findall(r'(?:_run\(|_all\(\[\(|\}\), \()\s*"([a-z_]+)"', inspect.getsource(postgres)))
    assert sent == set(queries())


def test_statements_name_their_columns() -> None:
    assert not [name for name, text in queries().items() if re.search(r"select\s+\*", text)]
