"""The reference pages say what the code says."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from seedcore.registry.caller import metrics as callers
from seedcore.registry.server import metrics

DOCS = Path(__file__).resolve().parents[2] / "docs"


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", DOCS / "reference" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", ["settings.md", "cli.md", "http.md", "python.md"])
def test_generated_page_is_what_the_generator_writes(page: str) -> None:
    module = generator()
    written = (DOCS / "reference" / page).read_text(encoding="utf-8")
    assert written == module.NOTE + module.PAGES[page](), "run python docs/reference/generate.py"


def test_every_metric_is_listed_and_every_listed_one_is_there() -> None:
    source = "".join(Path(str(module.__file__)).read_text(encoding="utf-8") for module in (metrics, callers))
    made = set(re.findall(r'(?:gauge|counter|_histogram|export)\(\s*"(\w+)"', source))
    listed = re.findall(r"^\| `seedcore_(\w+)` \|", (DOCS / "reference" / "metrics.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(made)


def rows_of(page: Path) -> dict[str, list[str]]:
    """The rows of a page's tables that begin with a variable, by each of their variables."""
    lines = page.read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]
    return {name: row for row in rows for name in re.findall(r"`([A-Z_]+)`", row[0])}


def test_the_readme_has_six_settings_with_their_defaults_and_links_to_all() -> None:
    readme = DOCS.parent / "README.md"
    settings = {name: row[2] for name, row in rows_of(DOCS / "reference" / "settings.md").items()}
    shown = {name: row[1] for name, row in rows_of(readme).items()}
    assert len(shown) == 6
    for name, default in shown.items():
        assert default == settings[name].replace(".0`", "`"), name
    assert "[All settings](docs/reference/settings.md)" in readme.read_text(encoding="utf-8")


ROOT = DOCS.parent
PAGES = (
    *DOCS.rglob("*.md"),
    *(ROOT / "deploy").rglob("*.md"),
    *(ROOT / "examples").glob("*.md"),
    *ROOT.glob("*.md"),
)


def anchors_of(page: Path) -> set[str]:
    """What a link to a part of the page may name: its headings, and the anchors that it sets."""
    text = page.read_text(encoding="utf-8")
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    named = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return named | set(re.findall(r'<a id="([^"]+)">', text))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS.parent)))
def test_every_link_between_pages_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        linked = page.parent / name if name else page
        assert linked.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in anchors_of(linked), f"{page.name} links to {target}"


def test_every_module_that_a_page_names_is_there() -> None:
    root = DOCS.parent
    for page in PAGES:
        for name in re.findall(r"`((?:seedcore|tests|schema|docs)/[\w/.]+)`", page.read_text(encoding="utf-8")):
            assert "NNNN" in name or (root / name).exists(), f"{page.relative_to(root)} names {name}"


def test_decisions_follow_one_template_and_the_index_lists_them() -> None:
    folder = DOCS / "decisions"
    index = (folder / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| (\d+) \| \[(.+)\]\((.+)\) \| (\w+) \|$", index, re.MULTILINE)
    written = []
    for page in sorted(folder.glob("0*.md")):
        title, _, status, *lines = page.read_text(encoding="utf-8").splitlines()
        number, statement = re.fullmatch(r"# (\d+)\. (.+)", title).groups()  # type: ignore[union-attr]
        dated = re.fullmatch(r"\d{4}-\d\d-\d\d · (accepted|superseded)(?:; .+)?", status)
        assert dated is not None, f"{page.name}: {status}"
        assert page.name.startswith(f"{int(number):04}-")
        headings = [line for line in lines if line.startswith("#")]
        assert headings == ["## Context", "## Decision", "## Consequences"], page.name
        written.append((number, statement, page.name, dated[1]))
    assert written == listed
