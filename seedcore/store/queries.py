"""Loads queries.sql and its like: each statement under its name, psycopg-ready. No SQL text lives in Python."""

from __future__ import annotations

import re
from functools import lru_cache
from importlib import resources

_HEAD = re.compile(r"^-- (?P<name>[a-z_]+): .+$", re.MULTILINE)


@lru_cache(maxsize=2)
def queries(file: str = "queries.sql") -> dict[str, str]:
    """Statement text by name."""
    text = resources.files("seedcore.store").joinpath(file).read_text(encoding="utf-8")
    heads = list(_HEAD.finditer(text))
    ends = [head.start() for head in heads[1:]] + [len(text)]
    return {head["name"]: text[head.end() : end].strip() for head, end in zip(heads, ends, strict=True)}
