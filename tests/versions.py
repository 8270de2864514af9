"""Other versions of this code, as trees that processes import instead of the checkout's."""

from __future__ import annotations

import ast
import re
import shutil
from pathlib import Path

from seedcore.registry.protocol.messages import PROTOCOL

ROOT = Path(__file__).resolve().parents[1]
NEXT = "99.0.0"
NEXT_FIELD = "said_later"
_NEXT_SCHEMA = """-- What a next release might add: a column that older registries neither read nor write.
alter table registry_instance add column later integer not null default 7;
"""


def lay_out_next(folder: Path) -> None:
    """The package as its next release may be: everything that travels has one field more, the protocol and the schema
    one number, as CONTRIBUTING.md allows them."""
    shutil.copytree(ROOT / "seedcore", folder / "seedcore", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "schema", folder / "schema")
    number = len(list((folder / "schema").glob("*.sql"))) + 1
    (folder / "schema" / f"{number:04d}_later.sql").write_text(_NEXT_SCHEMA)
    _change(folder / "seedcore/__init__.py", r'__version__ = ".*"', f'__version__ = "{NEXT}"')
    _change(
        folder / "seedcore/registry/protocol/messages.py",
        rf"\nPROTOCOL = {PROTOCOL}\n",
        f"\nPROTOCOL = {PROTOCOL + 1}\n",
    )
    grown = sum(_grow(file) for file in (folder / "seedcore").rglob("*.py"))
    assert grown > 20, grown


def _change(file: Path, pattern: str, new: str) -> None:
    text, count = re.subn(pattern, new, file.read_text())
    assert count == 1, (file, pattern, count)
    file.write_text(text)


def _grow(file: Path) -> int:
    """Append a field to every class of the file that travels; how many there are."""
    text = file.read_text()
    lines = text.splitlines()
    ends = [
        node.end_lineno
        for node in ast.parse(text).body
        if isinstance(node, ast.ClassDef)
        and any(isinstance(mark, ast.Name) and mark.id == "wire" for mark in node.decorator_list)
    ]
    for end in sorted((end for end in ends if end is not None), reverse=True):
        lines.insert(end, f"\n    {NEXT_FIELD}: int = 7")
    file.write_text("\n".join(lines) + "\n")
    return len(ends)
