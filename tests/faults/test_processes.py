"""Faults on real processes keep every law. Here a few runs; `python -m tests.faults.chaos` and `.outages` do many."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.children import run

ROOT = Path(__file__).resolve().parents[2]
RUNS = 2
# the registry killed beside a deaf database, a relay stopped while an agent is killed, an agent killed
FIRST = 29


def harness(module: str, *options: str, timeout_s: float) -> subprocess.CompletedProcess[str]:
    """In a process of its own, since Ray reads its settings when it is imported."""
    return run(sys.executable, "-W", "ignore", "-m", module, *options, cwd=ROOT, timeout_s=timeout_s)


@pytest.mark.timeout(300)
def test_runs_of_faults_keep_the_laws() -> None:
    answer = harness("tests.faults.chaos", "--first", str(FIRST), "--runs", str(RUNS), timeout_s=280)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert f'"runs": {RUNS}' in answer.stdout
    assert '"with_a_violation": 0' in answer.stdout


@pytest.mark.soak
@pytest.mark.timeout(1500)
def test_outages_keep_the_laws() -> None:
    answer = harness("tests.faults.outages", "--seconds", "25", timeout_s=1480)
    assert answer.returncode == 0, answer.stdout + answer.stderr
