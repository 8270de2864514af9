"""The circuit breaker: callers fail fast after a timeout, and one caller at a time tries whether the peer answers."""

from __future__ import annotations

from seedcore.core.circuit import Circuit


def test_closed_circuit_allows_every_caller() -> None:
    circuit = Circuit(2.0)
    assert all(circuit.allows(now_s) for now_s in (0.0, 0.0, 1.0))
    assert not circuit.note_answer()


def test_open_circuit_allows_one_caller_per_pause() -> None:
    circuit = Circuit(2.0)
    circuit.note_silence(10.0)
    assert circuit.is_open
    allowed_s = [now_s / 4 for now_s in range(40, 80) if circuit.allows(now_s / 4)]
    assert allowed_s == [12.0, 14.0, 16.0, 18.0]


def test_answer_closes_the_circuit_for_every_caller_and_is_reported_once() -> None:
    circuit = Circuit(2.0)
    circuit.note_silence(0.0)
    assert circuit.note_answer()
    assert not circuit.note_answer()
    assert not circuit.is_open
    assert circuit.allows(0.0)


def test_each_timeout_doubles_the_pause_up_to_a_maximum_and_an_answer_resets_it() -> None:
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
