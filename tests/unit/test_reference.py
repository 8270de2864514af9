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
    made = set(re.findall(r'(?:gauge|counter|_histogram|tell)\(\s*"(\w+)"', source))
    listed = re.findall(r"^\| `seedcore_(\w+)` \|", (DOCS / "reference" / "metrics.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(made)


def test_every_setting_is_in_the_readme() -> None:
    readme = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    variables = set(re.findall(r"`([A-Z_]+)`", (DOCS / "reference" / "settings.md").read_text(encoding="utf-8")))
    assert {name for name in variables if f"`{name}`" not in readme} == set()


def test_every_link_between_pages_leads_somewhere() -> None:
    for page in (*DOCS.rglob("*.md"), DOCS.parent / "README.md", DOCS.parent / "CONTRIBUTING.md"):
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name} links to {target}"
