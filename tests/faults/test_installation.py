"""What watches the runs of faults would see what they are for."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import psycopg
import pytest

from seedcore.core.causes import CauseKind
from seedcore.core.lifecycle import Status
from seedcore.registry.ray_support.process_keys import process_key_of
from tests.builders import START, iid
from tests.faults.installation import Calls, Row, Watch, false_deaths
from tests.waiting import eventually


@pytest.fixture
def living() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "600"]) as process:
        yield process
        process.kill()


def row(process: subprocess.Popen[bytes] | psutil.Process, cause: CauseKind | None = CauseKind.LEASE_EXPIRED) -> Row:
    key = process_key_of(process.pid)
    assert key is not None
    return Row(iid(1), "agent", Status.DEAD, 3, process.pid, key, cause, START)


def test_a_wrong_handle_is_a_failure_and_no_answer() -> None:
    calls = Calls()
    calls.note("a", "a", "registry", 0.1)
    calls.note("a", "b", "snapshot", 0.5)
    assert dict(calls.answered) == {"registry": 1}
    assert list(calls.failed.values()) == [1]
    assert calls.slowest_s == 0.1


async def test_a_false_death_is_seen_though_a_real_one_follows(living: subprocess.Popen[bytes]) -> None:
    dead, rounds = row(living), 0

    def rows() -> list[Row]:
        nonlocal rounds
        rounds += 1
        if rounds == 1:
            raise psycopg.OperationalError("away")
        return [dead]

    async with Watch(rows, every_s=0.01) as watch:
        await eventually(lambda: watch.found)
        living.kill()
        living.wait()
        seen = rounds
        await eventually(lambda: rounds > seen + 1)
    assert false_deaths(rows()) == {}
    assert "lives, and is dead: lease_expired" in watch.found[iid(1)]


@pytest.mark.parametrize("cause", [CauseKind.AGENT, CauseKind.EPOCH_RETIRED])
def test_who_was_asked_to_end_may_live_on(living: subprocess.Popen[bytes], cause: CauseKind) -> None:
    assert false_deaths([row(living, cause)]) == {}


@pytest.fixture
def raylet(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process of that name with one child, whose id it writes."""
    program = shutil.copy("/bin/sh", tmp_path / "raylet")
    with subprocess.Popen([program, "-c", "sleep 600 & echo $!; wait"], stdout=subprocess.PIPE) as process:
        yield process
        process.kill()


async def test_who_hangs_on_a_dead_node_ends_when_it_notices(raylet: subprocess.Popen[bytes]) -> None:
    assert raylet.stdout is not None
    worker = psutil.Process(int(raylet.stdout.readline()))
    try:
        assert false_deaths([row(worker, CauseKind.NODE_DIED)])
        worker.suspend()
        await eventually(lambda: psutil.Process(worker.pid).status() == psutil.STATUS_STOPPED)
        assert false_deaths([row(worker, CauseKind.NODE_DIED)]) == {}
        assert false_deaths([row(worker)])
        worker.resume()
        raylet.kill()
        raylet.wait()
        # an orphan: the node is gone, even where Ray still lists it
        assert false_deaths([row(worker, CauseKind.NODE_DIED)]) == {}
        assert false_deaths([row(worker)])
    finally:
        worker.kill()
