"""An agent that is declared dead again and again comes back ever more rarely."""

from __future__ import annotations

from itertools import pairwise

from seedcore.core.comebacks import LONGEST_S, Comebacks


def flap(comebacks: Comebacks, begin_s: float, duration_s: float, lives_s: float) -> list[float]:
    """When an agent came back that dies `lives_s` seconds after each comeback."""
    came: list[float] = []
    now_s = begin_s
    while now_s < begin_s + duration_s:
        comebacks.note("dead", now_s)
        while comebacks.problem(now_s) is not None:
            now_s += 0.1
        came.append(now_s)
        now_s += lives_s
    return came


def test_first_comeback_is_at_once_and_the_next_ones_wait() -> None:
    comebacks = Comebacks()
    comebacks.note("its process exited", 100.0)
    assert comebacks.problem(100.0) is None
    comebacks.note("its process exited", 100.0)
    assert str(comebacks.problem(100.0)).startswith("its process exited; 2 times in a row, so it registers again in")
    assert comebacks.problem(101.0) is None


def test_pauses_grow_to_a_bound_and_are_not_alike() -> None:
    came = flap(Comebacks(), 0.0, 3600.0, 0.1)
    pauses = [after - before for before, after in pairwise(came)]
    assert len(came) < 3600 / (LONGEST_S / 2) + 10
    assert LONGEST_S / 2 <= max(pauses) <= LONGEST_S + 1
    assert len({round(pause, 1) for pause in pauses[10:]}) > 10


def test_a_long_life_is_forgiven() -> None:
    comebacks = Comebacks()
    flap(comebacks, 0.0, 600.0, 0.1)
    assert comebacks.in_a_row > 5
    comebacks.note("dead", 10_000.0)
    assert comebacks.problem(10_000.0) is None


def test_a_life_shorter_than_the_longest_pause_is_not() -> None:
    came = flap(Comebacks(), 0.0, 3600.0, LONGEST_S / 2)
    assert len(came) < 3600 / LONGEST_S + 10
