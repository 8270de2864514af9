"""The dashboard, without Grafana: its queries parse, its panels do not overlap, and all use the chosen datasource."""

from __future__ import annotations

import json
from itertools import combinations
from typing import Any

from tests.deploy.promql import DASHBOARD, panels, queries, selectors


def test_every_query_parses() -> None:
    assert len(queries()) > 30
    for query in queries():
        assert selectors(query), query


def test_panels_have_ids_titles_and_the_chosen_datasource() -> None:
    board = json.loads(DASHBOARD.read_text())
    ids = [panel["id"] for panel in board["panels"]]
    assert len(ids) == len(set(ids))
    for panel in panels():
        assert panel["title"]
        assert panel["targets"]
        for part in (panel, *panel["targets"]):
            assert part["datasource"] == {"type": "prometheus", "uid": "${datasource}"}, panel["title"]


def test_panels_do_not_overlap() -> None:
    def overlap(one: dict[str, Any], other: dict[str, Any]) -> bool:
        return all(
            one[start] < other[start] + other[size] and other[start] < one[start] + one[size]
            for start, size in (("x", "w"), ("y", "h"))
        )

    board = json.loads(DASHBOARD.read_text())
    for one, other in combinations(board["panels"], 2):
        assert not overlap(one["gridPos"], other["gridPos"]), (one["title"], other["title"])
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in board["panels"])
