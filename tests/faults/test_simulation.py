"""Seeded histories of a whole fleet keep every law, and broken code does not get by."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.children import run
from tests.faults.mutants import MUTANTS

# a history is a quarter of a second of one core; a busy machine may need many times that
pytestmark = pytest.mark.timeout(300)

ROOT = Path(__file__).resolve().parents[2]
HISTORIES = 100
ENOUGH_TO_NOTICE = 600


def simulate(*options: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: nothing of this one may reach a history."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.faults.simulation", "--jobs", "1", *options]
    # without it the module would start itself again
    environment = {**os.environ, "PYTHONHASHSEED": "0"}
    return run(*command, env=environment, cwd=ROOT, timeout_s=280)


def test_every_history_keeps_the_laws() -> None:
    answer = simulate("--count", str(HISTORIES))
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert f"{HISTORIES} histories, 0 with a violation" in answer.stdout


def test_a_seed_tells_the_same_history_again() -> None:
    first, second = simulate("--seed", "7"), simulate("--seed", "7")
    assert first.returncode == 0
    assert first.stdout == second.stdout
    assert "all faults end" in first.stdout


@pytest.mark.parametrize("mutant", MUTANTS)
def test_broken_code_is_noticed(mutant: str) -> None:
    first = MUTANTS[mutant].seed
    answer = simulate("--first", str(first), "--count", str(ENOUGH_TO_NOTICE), "--mutant", mutant)
    assert answer.returncode == 1, answer.stdout + answer.stderr
    assert answer.stdout.startswith("seed ")
