"""The metrics and labels that the alerts and the dashboard query."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import promql_parser
import yaml

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
RULES = DEPLOY / "prometheus" / "seedcore.rules.yaml"
DASHBOARD = DEPLOY / "grafana" / "seedcore.json"
# labels that Prometheus itself adds to every series
OF_THE_SCRAPE = {"job", "instance", "namespace", "pod", "le"}
_VARIABLES = {"$__rate_interval": "5m", "$job": ".*"}


class Asked(NamedTuple):
    """A selector: the metric, its matchers, and the alert or panel that contains it."""

    metric: str
    matchers: tuple[tuple[str, str, str], ...]
    where: str


class Query(NamedTuple):
    """A query, and the alert or panel that contains it."""

    text: str
    where: str

    @property
    def expression(self) -> promql_parser.Expr:
        """The parsed query, with Grafana's variables replaced. Raises ValueError."""
        text = self.text
        for name, value in _VARIABLES.items():
            text = text.replace(name, value)
        assert "$" not in text, f"{self.where}: unknown variable: {text}"
        parsed: promql_parser.Expr = promql_parser.parse(text)
        return parsed


def alerts() -> list[dict[str, Any]]:
    """The alerting rules."""
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def panels() -> list[dict[str, Any]]:
    """The dashboard's panels, without its rows."""
    return [panel for panel in json.loads(DASHBOARD.read_text())["panels"] if panel["type"] != "row"]


def queries() -> list[Query]:
    """Every query of the alerts, of the panels and of the dashboard's variables."""
    found = [Query(rule["expr"], rule["alert"]) for rule in alerts()]
    found += [Query(target["expr"], panel["title"]) for panel in panels() for target in panel["targets"]]
    for variable in json.loads(DASHBOARD.read_text())["templating"]["list"]:
        if variable["type"] == "query":
            wanted = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"]["query"])
            assert wanted is not None, variable
            found.append(Query(wanted[1], f"variable {variable['name']}"))
    return found


def selectors(query: Query) -> list[Asked]:
    """Every selector of a query."""
    found: list[Asked] = []

    def visit(node: promql_parser.Expr) -> None:
        if isinstance(node, promql_parser.MatrixSelector):
            visit(node.vector_selector)
        elif isinstance(node, promql_parser.VectorSelector):
            assert node.name is not None, query
            matchers = tuple((str(one.op), one.name, one.value) for one in node.matchers.matchers)
            found.append(Asked(node.name, matchers, query.where))

    promql_parser.walk(query.expression, visit)
    return found


def grouped_by(query: Query) -> Iterator[str]:
    """Every label that a query groups by."""
    found: list[str] = []

    def visit(node: promql_parser.Expr) -> None:
        if isinstance(node, promql_parser.AggregateExpr) and node.modifier is not None:
            found.extend(node.modifier.labels)

    promql_parser.walk(query.expression, visit)
    return iter(found)


def matches(asked: Asked, labels: dict[str, str]) -> bool:
    """Whether a sample with these labels is selected."""
    for operation, name, value in asked.matchers:
        if name in OF_THE_SCRAPE:
            continue
        has = labels.get(name, "")
        verdict = {
            "MatchOp.Equal": has == value,
            "MatchOp.NotEqual": has != value,
            "MatchOp.Re": re.fullmatch(value, has) is not None,
            "MatchOp.NotRe": re.fullmatch(value, has) is None,
        }[operation]
        if not verdict:
            return False
    return True
