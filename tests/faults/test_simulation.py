"""Seeded histories of a whole fleet keep every law, and broken code does not get by."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.children import run, started
from tests.faults.mutants import MUTANTS

# a history is half a second of one core; a busy machine may need many times that
pytestmark = pytest.mark.timeout(900)

ROOT = Path(__file__).resolve().parents[2]
# without it the modules would start themselves again
ENVIRONMENT = {**os.environ, "PYTHONHASHSEED": "0"}


def simulate(*options: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: nothing of this one may reach a history."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.faults.simulation", "--jobs", "1", *options]
    return run(*command, env=ENVIRONMENT, cwd=ROOT, timeout_s=840)


@pytest.mark.parametrize(("first", "count"), [(0, 40), pytest.param(40, 110, marks=pytest.mark.slow)])
def test_every_history_keeps_the_laws(first: int, count: int) -> None:
    answer = simulate("--first", str(first), "--count", str(count))
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert f"{count} histories, 0 with a violation" in answer.stdout


def test_a_seed_repeats_its_history() -> None:
    first, second = simulate("--seed", "7"), simulate("--seed", "7")
    assert first.returncode == 0
    assert first.stdout == second.stdout
    assert "all faults end" in first.stdout


@pytest.fixture(scope="module")
def search() -> Iterator[subprocess.Popen[str]]:
    """A process that looks for histories that notice mutants; it imports once for all of them."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.faults.noticed", "--serve"]
    pipe = subprocess.PIPE
    with started(*command, env=ENVIRONMENT, cwd=ROOT, stdin=pipe, stdout=pipe, text=True) as process:
        yield process


@pytest.mark.parametrize("mutant", MUTANTS)
def test_broken_code_is_noticed(search: subprocess.Popen[str], mutant: str) -> None:
    assert search.stdin is not None
    assert search.stdout is not None
    search.stdin.write(f"{mutant}\n")
    search.stdin.flush()
    assert search.stdout.readline().startswith("seed ")
