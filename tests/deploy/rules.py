"""Writes the rules as the Prometheus operator wants them: `python -m tests.deploy.rules`. A test compares."""

from __future__ import annotations

import yaml

from tests.deploy.kustomize import Document
from tests.deploy.promql import DEPLOY, RULES

TARGET = DEPLOY / "kubernetes" / "prometheus-operator" / "prometheusrule.yaml"
_NOTE = "# Written by `python -m tests.deploy.rules` from deploy/prometheus/seedcore.rules.yaml, which says why.\n"


def wrapped() -> Document:
    """The object."""
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "seedcore", "labels": {"app.kubernetes.io/part-of": "seedcore"}},
        "spec": yaml.safe_load(RULES.read_text()),
    }


if __name__ == "__main__":
    TARGET.write_text(_NOTE + yaml.safe_dump(wrapped(), sort_keys=False, width=118))
