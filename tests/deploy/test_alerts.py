"""Alerts: each fires and clears in promtool's tests, is told apart from the others, and has a page."""

from __future__ import annotations

import re
import shlex
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
    return subprocess.run([promtool, *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False)


def test_rules_and_their_tests_pass(promtool: str) -> None:
    checked = run(promtool, "check", "rules", RULES)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    tested = run(promtool, "test", "rules", TESTS, DAYS)
    assert tested.returncode == 0, tested.stdout + tested.stderr


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("broken", ["vector(0) > 1", "vector(1)"], ids=["never fires", "never clears"])
def test_an_alert_that_never_fires_or_never_clears_is_noticed(
    promtool: str, name: str, broken: str, tmp_path: Path
) -> None:
    rules = yaml.safe_load(RULES.read_text())
    for rule in rules["groups"][0]["rules"]:
        if rule["alert"] == name:
            rule["expr"] = broken
    (tmp_path / RULES.name).write_text(yaml.safe_dump(rules))
    suite = yaml.safe_load(TESTS.read_text())
    suite["tests"] = [test for test in suite["tests"] if name in str(test)]
    (tmp_path / TESTS.name).write_text(yaml.safe_dump(suite))
    tested = run(promtool, "test", "rules", tmp_path / TESTS.name)
    assert tested.returncode != 0
    assert name in tested.stdout + tested.stderr


@pytest.mark.parametrize("name", ["SeedcoreRegistryAway", "SeedcoreCopyOld"])
def test_an_alert_that_is_blind_while_another_registry_lives_is_noticed(
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
    (tmp_path / RULES.name).write_text(yaml.safe_dump(rules))
    (tmp_path / TESTS.name).write_text(TESTS.read_text())
    tested = run(promtool, "test", "rules", tmp_path / TESTS.name)
    assert tested.returncode != 0
    assert name in tested.stdout + tested.stderr


@pytest.mark.parametrize("rule", alerts(), ids=NAMES)
def test_every_alert_says_how_bad_what_and_where_its_page_is(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in {"critical", "warning"}
    told = rule["annotations"]
    assert set(told) == {"summary", "description", "runbook"}
    assert not told["summary"].endswith(".")
    assert told["description"].endswith(".")
    page = DEPLOY.parent / told["runbook"]
    text = page.read_text()
    assert text.startswith(f"# {rule['alert']}\n")
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == SECTIONS


@pytest.mark.parametrize("file", [RULES, TARGET], ids=["rules", "object"])
def test_the_address_of_a_page_is_written_as_the_readme_says(file: Path) -> None:
    (command,) = re.findall(r"^\$ (sed .*)$", (DEPLOY / "README.md").read_text(), re.MULTILINE)
    arguments = shlex.split(command)
    assert DEPLOY.parent / arguments[-1] == RULES
    done = subprocess.run([*arguments[:-1], str(file)], capture_output=True, text=True, timeout=60, check=True)
    rules = yaml.safe_load(done.stdout)
    told = [rule["annotations"] for group in rules.get("spec", rules)["groups"] for rule in group["rules"]]
    assert len(told) == len(NAMES)
    for one, rule in zip(told, alerts(), strict=True):
        address = f"https://git.example/seedcore/blob/v0.1.0/{rule['annotations']['runbook']}"
        assert one["runbook_url"] == address


def test_every_page_belongs_to_an_alert_and_its_links_lead_somewhere() -> None:
    named = {Path(rule["annotations"]["runbook"]).name for rule in alerts()}
    pages = list((DEPLOY / "runbook").glob("*.md"))
    assert {page.name for page in pages} == named
    for page in [*pages, DEPLOY / "README.md"]:
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert link.startswith("http") or (page.parent / link).exists(), (page.name, link)


def test_every_command_of_a_page_is_one_of_ours() -> None:
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


def test_alerts_and_panels_ask_for_metrics_that_the_reference_has() -> None:
    reference = (DEPLOY.parent / "docs" / "reference" / "metrics.md").read_text()
    known = set(re.findall(r"^\| `(seedcore_\w+)`", reference, re.MULTILINE))
    for query in queries():
        for asked in selectors(query):
            name = re.sub(r"_(bucket|sum|count)$", "", asked.metric.removeprefix("ray_"))
            assert asked.metric.startswith("ray_"), asked
            assert name in known, asked
