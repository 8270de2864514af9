"""Faults of the network between real hosts keep every law. Here a few; `python -m tests.hosts.run` does all."""

from __future__ import annotations

import sys

import pytest

from tests.children import run
from tests.hosts.space import ROOT, missing


@pytest.fixture(scope="module", autouse=True)
def _hosts(request: pytest.FixtureRequest) -> None:
    why_not = missing()
    if why_not is None:
        return
    if request.config.getoption("--require-hosts"):
        pytest.fail(why_not)
    pytest.skip(why_not)


def _keep_the_laws(*options: str, timeout_s: float) -> None:
    answer = run(sys.executable, "-W", "ignore", "-m", "tests.hosts.run", *options, cwd=ROOT, timeout_s=timeout_s)
    assert answer.returncode == 0, answer.stdout + answer.stderr


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_link_that_is_down_and_a_database_out_of_reach_keep_the_laws() -> None:
    _keep_the_laws("--short", timeout_s=380)


@pytest.mark.soak
@pytest.mark.timeout(2700)
def test_every_fault_between_hosts_keeps_the_laws() -> None:
    _keep_the_laws(timeout_s=2680)
