"""The track record of docs/reliability.md: no entry lacks a field, and every test that it names exists."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from datetime import date
from functools import cache
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
PAGE = TESTS.parent / "docs" / "reliability.md"
MUTANTS = (TESTS / "faults" / "mutants.py", TESTS / "faults" / "loss_mutants.py")
FOUND = {
    "simulation": r"(, seed \d+|, seeds \d+( and \d+)+|, law \d+)?",
    "chaos runs": r"(, seed \d+)?",
    "tests": "",
    "use": "",
    "review": "",
    "not recorded": "",
}
ENTRY = re.compile(
    r"\*\*(?P<date>\d{4}-\d\d-\d\d)\*\* (?P<text>[A-Z`].*\.) Found: (?P<found>[^.]+)\. "
    r"Introduced: `(?P<introduced>[0-9a-f]{7})`\. Mended: `(?P<mended>[0-9a-f]{7})`\. "
    r"Held by: (?P<tests>`[^`]+`(, `[^`]+`)*)\."
)


def record() -> str:
    """The section of the page."""
    return re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)[-1]


def problems(section: str) -> Iterator[str]:
    """What is wrong with a track record."""
    introduction, *kinds = re.split(r"^### ", section, flags=re.MULTILINE)
    counts: dict[str, list[int]] = {name: [0] * len(kinds) for name in FOUND}
    for number, kind in enumerate(kinds):
        before = date.max
        for line in entries_of(kind):
            entry = ENTRY.fullmatch(line)
            if entry is None:
                yield f"not an entry with all its fields: {line}"
                continue
            found = entry["found"].partition(",")[0]
            if found not in FOUND or not re.fullmatch(found + FOUND[found], entry["found"]):
                yield f"not a way to find a fault: {entry['found']}"
            else:
                counts[found][number] += 1
            mended = date.fromisoformat(entry["date"])
            if mended > before:
                yield f"newer than the entry before it: {line}"
            before = mended
            yield from (f"there is no test {test}" for test in entry["tests"].split("`")[1::2] if not exists(test))
    columns = [*zip(*counts.values(), strict=True)]
    rows = {**counts, "all": [sum(column) for column in columns]}
    for name, row in rows.items():
        shown = "| " + " | ".join(map(str, [name, *row, sum(row)])) + " |"
        if shown not in introduction.splitlines():
            yield f"the counts do not have the row {shown}"


def entries_of(kind: str) -> list[str]:
    """The entries under a heading, each as one line."""
    _, _, text = kind.partition("\n")
    return [" ".join(entry.split()) for entry in re.split(r"^- ", text, flags=re.MULTILINE)[1:]]


def exists(test: str) -> bool:
    """Whether `file::function`, or `file::function[mutant]`, is a test of ours."""
    named = re.fullmatch(r"([\w/]+/test_\w+\.py)::(test_\w+)(?:\[(.+)\])?", test)
    return named is not None and named[2] in functions_of(named[1]) and (named[3] is None or named[3] in mutants())


@cache
def functions_of(path: str) -> frozenset[str]:
    """The names of the functions of a test file; none of a file that is not there."""
    file = TESTS / path
    nodes = nodes_of(file) if file.exists() else ()
    return frozenset(node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))


@cache
def mutants() -> frozenset[str]:
    """The names of the mutants, without an import of what they break."""
    keys = (key for file in MUTANTS for node in nodes_of(file) if isinstance(node, ast.Dict) for key in node.keys)
    return frozenset(key.value for key in keys if isinstance(key, ast.Constant) and isinstance(key.value, str))


def nodes_of(file: Path) -> Iterator[ast.AST]:
    """Everything in a file."""
    return ast.walk(ast.parse(file.read_text()))


def test_every_entry_has_its_fields_in_order_and_names_tests_that_exist() -> None:
    assert list(problems(record())) == []


def test_record_has_its_entries() -> None:
    """A page in another form must not pass as one without entries."""
    kinds = re.split(r"^### ", record(), flags=re.MULTILINE)[1:]
    counts = Counter({kind.partition("\n")[0]: len(entries_of(kind)) for kind in kinds})
    assert len(counts) == 5
    assert min(counts.values()) > 0
    assert counts.total() == record().count("Introduced:") == record().count("Held by:")


GOOD = "unit/test_track_record.py::test_record_has_its_entries"
ROWS = "".join(f"| {name} | {int(name == 'review')} | {int(name == 'review')} |\n" for name in FOUND)
RECORD = f"""Track record

{ROWS}| all | 1 | 1 |

### Wrong answers

- **2026-11-26** It answered
  wrongly.
  Found: review. Introduced: `0123abc`. Mended: `4567def`. Held by:
  `{GOOD}`.
"""


def test_a_record_without_a_mistake_is_accepted() -> None:
    assert list(problems(RECORD)) == []
    mutant = "faults/test_simulation.py::test_broken_code_is_noticed[fenced for ever]"
    assert list(problems(RECORD.replace(GOOD, mutant))) == []


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        (" Found: review.", ""),
        (" Introduced: `0123abc`.", ""),
        (" Mended: `4567def`.", ""),
        (f" Held by:\n  `{GOOD}`.", ""),
        ("**2026-11-26** ", ""),
        ("It answered\n  wrongly.", ""),
        ("0123abc", "0123xyz"),
        ("4567def", "4567d"),
        ("review. ", "luck. "),
        ("review. ", "review, seed 7. "),
        (GOOD, "unit/test_track_record.py::test_that_is_not_there"),
        (GOOD, "unit/test_not_there.py::test_record_has_its_entries"),
        (GOOD, "faults/test_simulation.py::test_broken_code_is_noticed[no such mutant]"),
        ("| review | 1 | 1 |", "| review | 2 | 2 |"),
        ("| all | 1 | 1 |", ""),
    ],
)
def test_a_mistake_in_a_record_is_found(right: str, wrong: str) -> None:
    assert right in RECORD
    assert list(problems(RECORD.replace(right, wrong))) != []


def test_an_entry_that_is_newer_than_the_one_above_it_is_found() -> None:
    entry = RECORD[RECORD.index("- **") :]
    twice = RECORD.replace("| 1 | 1 |", "| 2 | 2 |")
    assert list(problems(twice + entry.replace("-26", "-25"))) == []
    assert len(list(problems(twice + entry.replace("-26", "-27")))) == 1
