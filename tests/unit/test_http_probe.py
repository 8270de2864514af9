"""The probe of a URL: when it reports, and what it does with a request that hangs."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.message import Message
from urllib.error import HTTPError, URLError

import pytest

from seedcore.core.errors import RegistryUnavailableError
from seedcore.registry.agent.http_probe import HttpProbe, HttpProbes, Probe, Report

PATIENCE_S = 30.0
URL = "http://127.0.0.1:9/"
Reports = queue.SimpleQueue[tuple[str, str | None]]


def http_error(status: int) -> HTTPError:
    return HTTPError(URL, status, "", Message(), None)


class Answers:
    """What a URL answers: None, or an error. The last one again and again."""

    def __init__(self, *answers: Exception | None) -> None:
        self._answers = list(answers)
        self.asked = 0

    def __call__(self, _url: str, _timeout_s: float) -> None:
        self.asked += 1
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if answer is not None:
            raise answer


@contextmanager
def probing(ask: Callable[[str, float], None], report: Report, timeout_s: float = PATIENCE_S) -> Iterator[None]:
    probe = Probe(URL, "vllm", every_s=0.001, timeout_s=timeout_s, failures=3)
    running = HttpProbe(probe.validated(), report, ask)
    running.start()
    try:
        yield
    finally:
        running.stop()


def test_it_reports_after_so_many_failures_in_a_row_and_after_one_success() -> None:
    refused = URLError(ConnectionRefusedError(111, "Connection refused"))
    answers = Answers(None, refused, refused, None, refused, refused, refused, refused, None, refused, refused, None)
    reports = Reports()
    with probing(answers, lambda name, problem, _: reports.put((name, problem))):
        assert reports.get(timeout=PATIENCE_S) == ("vllm", "Connection refused")
        assert answers.asked == 7
        assert reports.get(timeout=PATIENCE_S) == ("vllm", None)
        assert answers.asked == 9
    assert reports.empty()


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (http_error(503), "HTTP 503"),
        (URLError("unknown url type"), "unknown url type"),
        (TimeoutError("timed out"), "timed out"),
        (ValueError(), "ValueError"),
    ],
)
def test_it_says_what_is_wrong(error: Exception, words: str) -> None:
    reports = Reports()
    with probing(Answers(error), lambda name, problem, _: reports.put((name, problem))):
        assert reports.get(timeout=PATIENCE_S) == ("vllm", words)


def test_what_could_not_be_reported_is_reported_again() -> None:
    reports, refused = Reports(), [RegistryUnavailableError("away"), ValueError("a fault"), None]

    def report(name: str, problem: str | None, _is_wanted: Callable[[], bool]) -> None:
        error = refused.pop(0)
        if error is not None:
            raise error
        reports.put((name, problem))

    with probing(Answers(http_error(500)), report):
        assert reports.get(timeout=PATIENCE_S) == ("vllm", "HTTP 500")
    assert refused == []


def test_a_request_that_hangs_is_a_failure_and_has_no_second_one_beside_it() -> None:
    is_over, reports, begun = threading.Event(), Reports(), []

    def hang(_url: str, _timeout_s: float) -> None:
        begun.append(1)
        is_over.wait(PATIENCE_S)

    with probing(hang, lambda name, problem, _: reports.put((name, problem)), timeout_s=0.005):
        assert reports.get(timeout=PATIENCE_S) == ("vllm", "no answer within 0.005 s")
        assert begun == [1]
        is_over.set()
        assert reports.get(timeout=PATIENCE_S) == ("vllm", None)


def test_a_probe_in_the_place_of_another_ends_what_that_one_has_reported() -> None:
    is_up = threading.Event()

    def ask(url: str, _timeout_s: float) -> None:
        if not (is_up.is_set() and url.endswith("/next")):
            raise URLError("down")

    reports = Reports()
    probes = HttpProbes(lambda name, problem, _: reports.put((name, problem)), ask)
    try:
        probes.add(Probe(URL, "vllm", every_s=0.001, timeout_s=PATIENCE_S, failures=3))
        assert reports.get(timeout=PATIENCE_S) == ("vllm", "down")
        is_up.set()
        probes.add(Probe(f"{URL}next", "vllm", every_s=0.001, timeout_s=PATIENCE_S, failures=3))
        assert reports.get(timeout=PATIENCE_S) == ("vllm", None)
    finally:
        probes.stop()


def test_a_report_of_a_probe_that_has_ended_is_not_wanted() -> None:
    reports: queue.Queue[Callable[[], bool]] = queue.Queue()
    probes = HttpProbes(lambda _name, _problem, is_wanted: reports.put(is_wanted), Answers(http_error(500)))
    probe = Probe(URL, "vllm", every_s=0.001, timeout_s=PATIENCE_S, failures=1)
    probes.add(probe)
    first = reports.get(timeout=PATIENCE_S)
    assert first()
    probes.add(probe)
    assert not first()
    second = reports.get(timeout=PATIENCE_S)
    assert second()
    probes.remove("vllm")
    assert not second()
