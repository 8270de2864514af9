"""Loads the named statements of queries.sql and similar files, so that Python modules contain no SQL text."""

from __future__ import annotations

import re
from functools import lru_cache
from importlib import resources

_HEAD = re.compile(r"^-- (?P<name>[a-z_]+): .+$", re.MULTILINE)


@lru_cache(maxsize=2)
def queries(file: str = "queries.sql") -> dict[str, str]:
    """The statements of a file by name, with psycopg placeholders."""
    text = resources.files("seedcore.store").joinpath(file).read_text(encoding="utf-8")
    heads = list(_HEAD.finditer(text))
    ends = [head.start() for head in heads[1:]] + [len(text)]
    return {head["name"]: text[head.end() : end].strip() for head, end in zip(heads, ends, strict=True)}
