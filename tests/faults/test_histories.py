"""Real histories of registry processes over PostgreSQL are checked, and a store that acknowledges early is caught."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from seedcore.core.lifecycle import Status
from tests.faults.histories import check_history, file_of, record
from tests.faults.history import Call, History, Outcome, Seen, Source, Step
from tests.faults.local_histories import Stage, stages
from tests.faults.sessions import check_sessions
from tests.servers import PostgresServer

SEEDS = range(3)
MANY = range(1000, 1200)
EARLY_SEEDS = range(6)


@pytest.fixture
def stage(postgres18: PostgresServer) -> Iterator[Stage]:
    with stages(postgres18, 1) as [made]:
        yield made


async def test_recorded_histories_keep_the_laws_and_can_be_checked_again(stage: Stage, tmp_path: Path) -> None:
    copies = 0
    for seed in SEEDS:
        history = await stage.history(seed)
        report = check_history(history)
        assert report.violations == ()
        assert report.counts["durable"] > 5
        assert report.counts["reads"] > 10
        copies += report.counts["copies"]
        file = file_of(tmp_path, history)
        await asyncio.to_thread(history.write, file)
        assert await asyncio.to_thread(History.read, file) == history
    assert copies > 5, "the follower's copy was not read"


async def test_a_store_that_acknowledges_before_it_commits_is_caught(stage: Stage) -> None:
    found: list[str] = []
    for seed in EARLY_SEEDS:
        found += check_history(await stage.history(seed, store="early", faults=["killed"])).violations
        if any("not linearizable" in violation for violation in found):
            return
    pytest.fail(f"not caught in {len(EARLY_SEEDS)} histories with a crash: {found}")


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_many_recorded_histories_keep_the_laws(tmp_path: Path) -> None:
    files = await record(tmp_path, MANY)
    reports = [check_history(await asyncio.to_thread(History.read, file)) for file in files]
    assert len(reports) == len(MANY)
    assert {report.name: report.violations for report in reports if report.violations} == {}


# The check of sessions, on histories made by hand

_A = Seen("a", "agent", Status.ALIVE, 2)


def _written(seq: int, status: Status, began_s: float, *, durable: bool = True) -> Call:
    name = "register" if status is Status.STARTING else "set_status"
    outcome = Outcome.ANSWERED if durable else Outcome.UNKNOWN
    return Call("agent", name, began_s, began_s + 0.1, outcome, None, "a", "agent", seq, status, durable)


WRITES = (
    _written(1, Status.STARTING, 1.0),
    _written(2, Status.ALIVE, 2.0),
    _written(3, Status.DRAINING, 3.0),
)
STEPS = tuple(Step("a", call.seq, call.status) for call in WRITES if call.status is not None)
LAST = Seen("a", "agent", Status.DRAINING, 3)


def _read(at_s: float, seen: Seen | None, source: Source = Source.REGISTRY, **details: object) -> Call:
    call = Call(
        "reader", "page", at_s, at_s + 0.1, Outcome.ANSWERED, source=source, stream="t", complete=True, lists_all=True
    )
    return replace(call, seen=() if seen is None else (seen,), **details)  # type: ignore[arg-type]


def _history(*reads: Call, writes: tuple[Call, ...] = WRITES, after: Seen = LAST) -> History:
    return History("hand", 0, 0.0, 30.0, True, {"s": 2.9}, 2.0, (), (*writes, *reads), STEPS, (after,))


_LATE = _written(4, Status.ALIVE, 20.0, durable=False)
_DEAD = replace(LAST, status=Status.DEAD)


@pytest.mark.parametrize(
    "history",
    [
        _history(_read(0.5, None), _read(2.5, _A), _read(3.5, LAST)),
        _history(_read(3.05, _A), _read(3.06, LAST)),
        _history(_read(6.9, _A, Source.SNAPSHOT)),
        _history(_read(9.0, _A, complete=False)),
        _history(_read(20.5, replace(_A, seq=4)), writes=(*WRITES, _LATE), after=_DEAD),
        _history(_read(5.0, LAST, stream="s", version=9), _read(6.0, LAST, stream="t", version=1)),
        _history(_read(4.8, _A, stream="s")),
    ],
    ids=[
        "current",
        "concurrent",
        "within the bound",
        "incomplete",
        "lost with its agent",
        "another stream",
        "superseded a moment ago",
    ],
)
def test_reads_that_keep_the_laws_are_accepted(history: History) -> None:
    assert check_sessions(history) == []


@pytest.mark.parametrize(
    ("history", "what"),
    [
        (_history(_read(4.0, _A)), "older than change 3"),
        (_history(_read(8.0, _A, Source.SNAPSHOT)), "acknowledged more than 4 s before"),
        (_history(_read(5.0, _A, stream="s")), "older than change 3"),
        (_history(_read(4.0, None)), "is missing"),
        (_history(_read(2.5, LAST)), "asked for by no client"),
        (_history(_read(4.0, replace(LAST, instance_id="b"))), "not known to any client"),
        (_history(_read(20.5, replace(_A, seq=4)), writes=(*WRITES, _LATE)), "newer than what the database has"),
        (
            _history(_read(5.0, _DEAD, Source.DATABASE), _read(6.0, LAST), after=_DEAD),
            "whose death was committed",
        ),
        (
            _history(_read(5.0, LAST, stream="s", version=9), _read(6.0, LAST, stream="s", version=8)),
            "version 8 after 9",
        ),
        (
            _history(_read(3.5, LAST, Source.SNAPSHOT, stream="s"), _read(4.0, _A, Source.SNAPSHOT, stream="s")),
            "after Seen",
        ),
    ],
    ids=[
        "stale by the registry",
        "stale by the cache",
        "stale by a registry superseded long ago",
        "forgotten",
        "before it was asked for",
        "made up",
        "never committed",
        "dead",
        "version goes back",
        "number goes back",
    ],
)
def test_reads_that_break_a_law_are_caught(history: History, what: str) -> None:
    found = check_sessions(history)
    assert found, what
    assert what in " ".join(found)
