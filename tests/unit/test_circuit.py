"""Nobody waits for one who is known to be silent, but one caller at a time finds out when that is over."""

from __future__ import annotations

from seedcore.core.circuit import Circuit


def test_a_closed_circuit_lets_everybody_ask() -> None:
    circuit = Circuit(2.0)
    assert all(circuit.allows(now_s) for now_s in (0.0, 0.0, 1.0))
    assert not circuit.note_answer()


def test_after_a_silence_one_caller_a_pause_asks() -> None:
    circuit = Circuit(2.0)
    circuit.note_silence(10.0)
    assert circuit.is_open
    asked_s = [now_s / 4 for now_s in range(40, 80) if circuit.allows(now_s / 4)]
    assert asked_s == [12.0, 14.0, 16.0, 18.0]


def test_an_answer_closes_it_for_everybody_and_is_noticed_once() -> None:
    circuit = Circuit(2.0)
    circuit.note_silence(0.0)
    assert circuit.note_answer()
    assert not circuit.note_answer()
    assert not circuit.is_open
    assert circuit.allows(0.0)


def test_each_silence_doubles_the_pause_up_to_the_longest_and_an_answer_makes_it_short_again() -> None:
    circuit = Circuit(1.0, 5.0)
    pauses_s = []
    for start_s in range(0, 500, 100):
        circuit.note_silence(float(start_s))
        pauses_s.append(next(after_s for after_s in range(100) if circuit.allows(start_s + after_s)))
    assert pauses_s == [1, 2, 4, 5, 5]
    circuit.note_answer()
    circuit.note_silence(500.0)
    assert not circuit.allows(500.9)
    assert circuit.allows(501.0)
