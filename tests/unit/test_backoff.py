"""Backoff and supervised loops: delays grow and reset, and no exception ends a loop."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from seedcore.core.backoff import Backoff, supervise


def test_delays_double_up_to_the_longest_and_begin_again_after_a_success() -> None:
    backoff = Backoff(1.0, 5.0, uniform=lambda _low, high: high)
    assert [backoff.next_s() for _ in range(5)] == [1.0, 2.0, 4.0, 5.0, 5.0]
    backoff.reset()
    assert backoff.next_s() == 1.0


def test_a_delay_is_shortened_by_at_most_the_jitter() -> None:
    delays = [Backoff(8.0, 8.0, jitter=0.25).next_s() for _ in range(200)]
    assert min(delays) >= 6.0
    assert max(delays) <= 8.0
    assert len(set(delays)) > 100


def test_the_exponent_is_bounded() -> None:
    backoff = Backoff(1.0, 1e12)
    for _ in range(5000):
        backoff.next_s()
    assert backoff.failures == 32


async def test_a_failed_step_is_reported_and_run_again_after_the_backoff(caplog: pytest.LogCaptureFixture) -> None:
    pauses: list[float] = []
    reported: list[str] = []
    results: Iterator[float | BaseException] = iter(
        [0.5, ValueError("first"), ValueError("second"), 0.25, asyncio.CancelledError()]
    )

    async def step() -> float:
        result = next(results)
        if isinstance(result, BaseException):
            raise result
        return result

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    backoff = Backoff(1.0, 8.0, uniform=lambda _low, high: high)
    with pytest.raises(asyncio.CancelledError):
        await supervise(step, backoff, "the test", on_failure=lambda error: reported.append(str(error)), sleep=sleep)
    assert pauses == [0.5, 1.0, 2.0, 0.25]
    assert reported == ["first", "second"]
    assert backoff.failures == 0
    assert [record.exc_info is not None for record in caplog.records] == [True, True]
