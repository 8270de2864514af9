"""Alerts: each fires and clears in promtool's tests, and has its own page in the runbook."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.promql import DEPLOY, RULES, alerts, queries, selectors
from tests.deploy.rules import TARGET

TESTS = RULES.with_name("seedcore.rules.test.yaml")
DAYS = RULES.with_name("seedcore.rules.days.test.yaml")
NAMES = [str(rule["alert"]) for rule in alerts()]
SECTIONS = ["What it means", "What still works", "How to look", "What to do", "How it clears"]


def run(promtool: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([promtool, *map(str, arguments)], capture_output=True, text=True, timeout=170, check=False)


def write_suite(folder: Path, name: str, rules: Any) -> Path:
    """The tests that name an alert, and of the rules those that they need: promtool evaluates each at every step."""
    suite = yaml.safe_load(TESTS.read_text())
    suite["tests"] = [test for test in suite["tests"] if name in str(test)]
    group = rules["groups"][0]
    group["rules"] = [rule for rule in group["rules"] if rule.get("alert", "") in str(suite["tests"])]
    (folder / RULES.name).write_text(yaml.safe_dump(rules))
    file = folder / TESTS.name
    file.write_text(yaml.safe_dump(suite))
    return file


def test_rules_and_their_tests_pass(promtool: str) -> None:
    checked = run(promtool, "check", "rules", RULES)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    tested = run(promtool, "test", "rules", TESTS)
    assert tested.returncode == 0, tested.stdout + tested.stderr


@pytest.mark.slow
def test_alert_that_takes_days_passes_its_tests(promtool: str, tmp_path: Path) -> None:
    # alone: promtool evaluates every rule of the file at each of thousands of steps
    name = "SeedcoreRegistryAway"
    assert set(re.findall(r'alertname="(\w+)"', DAYS.read_text())) == {name}
    rules = yaml.safe_load(RULES.read_text())
    (group,) = rules["groups"]
    group["rules"] = [rule for rule in group["rules"] if rule.get("alert") == name]
    (tmp_path / RULES.name).write_text(yaml.safe_dump(rules))
    tested = run(promtool, "test", "rules", shutil.copy(DAYS, tmp_path))
    assert tested.returncode == 0, tested.stdout + tested.stderr


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("broken", ["vector(0) > 1", "vector(1)"], ids=["never fires", "never clears"])
def test_the_tests_of_the_rules_fail_for_an_alert_that_never_fires_or_never_clears(
    promtool: str, name: str, broken: str, tmp_path: Path
) -> None:
    rules = yaml.safe_load(RULES.read_text())
    for rule in rules["groups"][0]["rules"]:
        if rule["alert"] == name:
            rule["expr"] = broken
    tested = run(promtool, "test", "rules", write_suite(tmp_path, name, rules))
    assert tested.returncode != 0
    assert name in tested.stdout + tested.stderr


@pytest.mark.parametrize("name", ["SeedcoreRegistryAway", "SeedcoreCopyOld"])
def test_the_tests_of_the_rules_fail_for_an_alert_that_ignores_one_of_two_registries(
    promtool: str, name: str, tmp_path: Path
) -> None:
    blind = {
        "SeedcoreRegistryAway": "absent(ray_seedcore_term)",
        "SeedcoreCopyOld": "max by (job, namespace, component) (ray_seedcore_feed_lag_seconds) > 10 "
        "unless on () absent(ray_seedcore_term)",
    }
    rules = yaml.safe_load(RULES.read_text())
    for rule in rules["groups"][0]["rules"]:
        if rule["alert"] == name:
            rule["expr"] = blind[name]
    tested = run(promtool, "test", "rules", write_suite(tmp_path, name, rules))
    assert tested.returncode != 0
    assert name in tested.stdout + tested.stderr


@pytest.mark.parametrize("rule", alerts(), ids=NAMES)
def test_every_alert_has_a_severity_a_summary_a_description_and_a_page(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in {"critical", "warning"}
    notes = rule["annotations"]
    assert set(notes) == {"summary", "description", "runbook"}
    assert not notes["summary"].endswith(".")
    assert notes["description"].endswith(".")
    page = DEPLOY.parent / notes["runbook"]
    text = page.read_text()
    assert text.startswith(f"# {rule['alert']}\n")
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == SECTIONS


def test_the_readme_lists_every_alert_with_its_severity_and_page() -> None:
    readme = (DEPLOY / "README.md").read_text()
    row = r"^\| (\w+) \| (critical|warning) \| \[[\w-]+\]\((runbook/[\w-]+\.md)\) \|$"
    listed = set(re.findall(row, readme, re.MULTILINE))
    assert listed == {
        (rule["alert"], rule["labels"]["severity"], rule["annotations"]["runbook"].removeprefix("deploy/"))
        for rule in alerts()
    }


@pytest.mark.parametrize("file", [RULES, TARGET], ids=["rules", "object"])
def test_the_command_of_the_readme_writes_the_url_of_every_page(file: Path) -> None:
    (command,) = re.findall(r"^\$ (sed .*)$", (DEPLOY / "README.md").read_text(), re.MULTILINE)
    arguments = shlex.split(command)
    assert DEPLOY.parent / arguments[-1] == RULES
    done = subprocess.run([*arguments[:-1], str(file)], capture_output=True, text=True, timeout=60, check=True)
    rules = yaml.safe_load(done.stdout)
    rewritten = [rule["annotations"] for group in rules.get("spec", rules)["groups"] for rule in group["rules"]]
    assert len(rewritten) == len(NAMES)
    for with_url, rule in zip(rewritten, alerts(), strict=True):
        url = f"https://git.example/seedcore/blob/v0.1.0/{rule['annotations']['runbook']}"
        assert with_url["runbook_url"] == url


def test_every_page_belongs_to_an_alert_and_its_links_resolve() -> None:
    named = {Path(rule["annotations"]["runbook"]).name for rule in alerts()}
    pages = list((DEPLOY / "runbook").glob("*.md"))
    assert {page.name for page in pages} == named
    for page in [*pages, DEPLOY / "README.md"]:
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert link.startswith("http") or (page.parent / link).exists(), (page.name, link)


def test_every_command_of_a_page_and_its_options_exist() -> None:
    reference = (DEPLOY.parent / "docs" / "reference" / "cli.md").read_text()
    known = re.findall(r"^## (seedcore .*)$", reference, re.MULTILINE)
    for page in (DEPLOY / "runbook").glob("*.md"):
        text = page.read_text()
        for command in re.findall(r"^\$ (seedcore .*)$", text, re.MULTILINE) + re.findall(r"`(seedcore [^`]*)`", text):
            words = " ".join(command.split())
            found = [name for name in known if f"{words} ".startswith(f"{name} ")]
            assert found, f"{page.name}: {command}"
            section = reference.split(f"## {found[0]}\n")[1].split("\n## ")[0]
            for option in re.findall(r" (--[a-z-]+)", words):
                assert option in section, f"{page.name}: {command}"


def test_alerts_and_panels_query_only_metrics_of_the_reference() -> None:
    reference = (DEPLOY.parent / "docs" / "reference" / "metrics.md").read_text()
    known = set(re.findall(r"^\| `(seedcore_\w+)`", reference, re.MULTILINE))
    for query in queries():
        for selector in selectors(query):
            name = re.sub(r"_(bucket|sum|count)$", "", selector.metric.removeprefix("ray_"))
            assert selector.metric.startswith("ray_"), selector
            assert name in known, selector
