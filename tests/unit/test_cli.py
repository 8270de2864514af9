"""What the command decides by itself: whether an epoch may be flipped to, and when an agent was first refused."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from seedcore.bench.death import Watcher, first_refusal_after
from seedcore.cli.steering import objection_to_flip
from seedcore.core.errors import AgentCallError, CannotKnowError, NotResolvableError
from seedcore.core.model import EpochRecord
from seedcore.settings import Settings
from tests.builders import START


def epoch(name: str, state: str, live: int = 0) -> EpochRecord:
    shown = START if state != "staged" else None
    return EpochRecord(name, 1, START, shown, START if state == "retired" else None, live)


@pytest.mark.parametrize(
    ("records", "objection"),
    [
        ([epoch("blue", "current", 3)], "epoch green is not staged.*its 3 agents ended.*--force"),
        ([epoch("blue", "current")], "epoch green is not staged.*retired for good"),
        ([], "epoch green is not staged"),
        ([epoch("green", "staged"), epoch("blue", "current", 3)], "nobody lives in epoch green.*its 3 agents ended"),
    ],
)
def test_a_flip_that_would_end_the_fleet_for_nothing_is_objected_to(records: list[EpochRecord], objection: str) -> None:
    with pytest.raises(AssertionError, match=objection):
        raise AssertionError(objection_to_flip("green", records))


@pytest.mark.parametrize(
    "records",
    [
        [epoch("green", "staged", 1), epoch("blue", "current", 3)],
        [epoch("green", "staged"), epoch("blue", "current")],
        [epoch("green", "current", 3)],
        # the registry says why not
        [epoch("green", "retired"), epoch("blue", "current", 3)],
    ],
)
def test_nothing_speaks_against_a_flip_to_a_fleet_that_is_there(records: list[EpochRecord]) -> None:
    assert objection_to_flip("green", records) is None


class Told:
    """A manager that resolves as told, the last word again and again."""

    def __init__(self, *outcomes: Exception | None) -> None:
        self._outcomes = list(outcomes)

    async def resolve(self, logical_id: str) -> None:
        outcome = self._outcomes.pop(0) if len(self._outcomes) > 1 else self._outcomes[0]
        if outcome is not None:
            raise outcome


def watcher(*outcomes: Exception | None) -> Watcher:
    made = Watcher(Settings())
    manager: Any = Told(*outcomes)
    made._manager = manager
    return made


async def test_who_cannot_be_asked_is_not_gone() -> None:
    silent, gone = CannotKnowError("a", "away"), NotResolvableError("a", "dead")
    assert await watcher(None, silent, silent, gone).until_gone("a", 10.0) <= time.time()
    with pytest.raises(AgentCallError, match="not known to be gone"):
        await watcher(silent).until_gone("a", 0.05)
    await watcher(gone, silent, None).until_resolved("a", 10.0)
    with pytest.raises(AgentCallError, match="not resolvable within"):
        await watcher(gone).until_resolved("a", 0.05)


async def test_a_refusal_before_the_kill_is_not_measured() -> None:
    refusals = [9.0, 12.0]

    def refused(at: float) -> Callable[[], Awaitable[float]]:
        async def answer() -> float:
            return at

        return answer

    assert await first_refusal_after(10.0, refused(8.0)(), lambda: refused(refusals.pop(0))()) == 12.0
    assert await first_refusal_after(10.0, refused(11.0)(), refused(99.0)) == 11.0


def test_the_command_needs_no_extra_and_imports_no_benchmark_until_one_is_asked_for() -> None:
    asked = "import sys; sys.modules['matplotlib'] = None; import seedcore.cli, seedcore.bench.run"
    assert subprocess.run([sys.executable, "-c", asked], capture_output=True, check=False).returncode == 0
    listed = (
        "import sys, seedcore.cli; print(sorted(name for name in sys.modules if name.startswith('seedcore.bench')))"
    )
    done = subprocess.run([sys.executable, "-c", listed], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['seedcore.bench']"
