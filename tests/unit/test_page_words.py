"""The page has words for every kind, and knows which causes are planned."""

from __future__ import annotations

import re
from importlib import resources

from seedcore.core.causes import CauseKind
from seedcore.core.holds import HoldKind

WORDS = (resources.files("seedcore.discovery") / "page_files" / "words.js").read_text(encoding="utf-8")


def keys_of(name: str) -> set[str]:
    """The keys of an object that the file defines."""
    found = re.search(rf"^const {name} = \{{$(.*?)^\}};$", WORDS, re.DOTALL | re.MULTILINE)
    assert found is not None, name
    return set(re.findall(r"^  (\w+):", found[1], re.MULTILINE))


def test_every_kind_of_cause_and_hold_has_words() -> None:
    assert keys_of("CAUSES") == {kind.value for kind in CauseKind}
    assert keys_of("HOLDS") == keys_of("HOLD_CHANGES") == {kind.value for kind in HoldKind}


def test_the_page_and_the_registry_agree_on_planned_causes() -> None:
    found = re.search(r"^const PLANNED = new Set\((\[.*\])\);$", WORDS, re.MULTILINE)
    assert found is not None
    assert set(re.findall(r'"(\w+)"', found[1])) == {kind.value for kind in CauseKind if kind.is_planned}
