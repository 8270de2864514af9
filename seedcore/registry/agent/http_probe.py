"""Probes a URL from a thread of its own, so that an event loop that is stuck does not stop it."""

from __future__ import annotations

import logging
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

from seedcore.core.dependencies import MAX_NAME_CHARS
from seedcore.core.errors import InvalidInputError, RegistryError
from seedcore.core.limits import MAX_TEXT_CHARS, check_text

logger = logging.getLogger(__name__)

MAX_PROBES = 8
_MAX_S = 3600.0
_MAX_FAILURES = 1000

Report = Callable[[str, str | None, Callable[[], bool]], object]
"""Reports a probe's problem, or None, by its name, unless the probe is over by then; blocks, and raises RegistryError
where it could not."""
Ask = Callable[[str, float], None]
"""Asks a URL once, with a bound in seconds for each of its steps. Raises whatever is wrong."""


@dataclass(frozen=True, slots=True)
class Probe:
    """What is probed, and how often. Times in seconds."""

    url: str
    name: str
    every_s: float = 5.0
    timeout_s: float = 2.0
    failures: int = 3

    def validated(self) -> Probe:
        """The same, or InvalidInputError naming the first bad field."""
        check_text("url", self.url, MAX_TEXT_CHARS)
        try:
            parts = urlsplit(self.url)
            is_url = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
        except ValueError:
            is_url = False
        if not is_url:
            raise InvalidInputError("url", f"must be an http or https URL with a host, not {self.url!r}")
        if parts.username is not None or parts.password is not None:
            # it is not sent, and would be in logs
            raise InvalidInputError("url", "must have no user and no password")
        check_text("name", self.name, MAX_NAME_CHARS)
        for field, value in (("every_s", self.every_s), ("timeout_s", self.timeout_s)):
            if type(value) not in {int, float} or not 0 < value <= _MAX_S:
                raise InvalidInputError(field, f"must be above 0 and at most {_MAX_S:g} seconds, not {value!r}")
        if type(self.failures) is not int or not 1 <= self.failures <= _MAX_FAILURES:
            raise InvalidInputError("failures", f"must be from 1 to {_MAX_FAILURES}, not {self.failures!r}")
        return self


class HttpProbe:
    """Runs from `start()` to `stop()`. Reports a problem after so many failures in a row, and its end after one
    success; what could not be reported is reported after the next probe."""

    def __init__(self, probe: Probe, report: Report, ask: Ask, *, replaces: bool = False) -> None:
        """`replaces`: a probe before this one may have reported a problem under the name, or be about to."""
        self._probe = probe
        self._report = report
        self._ask = ask
        self._is_over = threading.Event()
        self._in_a_row = 0
        # whether it was failing, as reported last; None: not known
        self._reported: bool | None = None if replaces else False
        self._under_way: _Request | None = None

    def start(self) -> None:
        """Probe from now on, on a thread that keeps no process."""
        threading.Thread(target=self._run, name=f"seedcore-probe-{self._probe.name}", daemon=True).start()

    def stop(self) -> None:
        """Probe no more."""
        self._is_over.set()

    def _run(self) -> None:
        while not self._is_over.is_set():
            self._step()
            self._is_over.wait(self._probe.every_s)

    def _step(self) -> None:
        problem = self._look()
        self._in_a_row = 0 if problem is None else self._in_a_row + 1
        if problem is not None and self._in_a_row < self._probe.failures:
            return
        is_failing = problem is not None
        if is_failing is self._reported or self._is_over.is_set():
            return
        try:
            self._report(self._probe.name, problem, lambda: not self._is_over.is_set())
        except RegistryError as error:
            logger.info("the probe of %s is reported later: %s", self._probe.url, error)
        except Exception:
            logger.exception("the probe of %s is not reported", self._probe.url)
        else:
            self._reported = is_failing

    def _look(self) -> str | None:
        """The problem of the URL now, or None. A request that hangs is a failure, and no other one starts beside
        it."""
        if self._under_way is None or self._under_way.is_done:
            self._under_way = _Request(self._ask, self._probe.url, self._probe.timeout_s)
        return self._under_way.result(self._probe.timeout_s)


class HttpProbes:
    """The probes of one agent, at most MAX_PROBES, by their names."""

    def __init__(self, report: Report, ask: Ask | None = None) -> None:
        self._report = report
        self._ask = ask if ask is not None else ask_url
        self._running: dict[str, HttpProbe] = {}

    def add(self, probe: Probe) -> None:
        """Probe from now on, in the place of another probe of this name. Raises InvalidInputError."""
        probe.validated()
        if probe.name not in self._running and len(self._running) >= MAX_PROBES:
            raise InvalidInputError("probes", f"must be at most {MAX_PROBES}: unwatch one first")
        before = self._running.get(probe.name)
        if before is not None:
            before.stop()
        self._running[probe.name] = HttpProbe(probe, self._report, self._ask, replaces=before is not None)
        self._running[probe.name].start()

    def remove(self, name: str) -> None:
        """Probe no more under this name. Raises InvalidInputError where no probe has it."""
        probe = self._running.pop(name, None)
        if probe is None:
            raise InvalidInputError("name", f"no probe has the name {name!r}")
        probe.stop()

    def stop(self) -> None:
        """Stop all."""
        for name in list(self._running):
            self.remove(name)


class _Request:
    """One request, on a thread: no timeout bounds the look-up of a name."""

    def __init__(self, ask: Ask, url: str, timeout_s: float) -> None:
        self._ask = ask
        self._url = url
        self._timeout_s = timeout_s
        self._done = threading.Event()
        self._problem: str | None = None
        threading.Thread(target=self._run, name="seedcore-probe-request", daemon=True).start()

    @property
    def is_done(self) -> bool:
        return self._done.is_set()

    def result(self, patience_s: float) -> str | None:
        if not self._done.wait(patience_s):
            return f"no answer within {self._timeout_s:g} s"
        return self._problem

    def _run(self) -> None:
        try:
            self._ask(self._url, self._timeout_s)
        except urllib.error.HTTPError as error:
            self._problem = f"HTTP {error.code}"
            error.close()
        except Exception as error:  # noqa: BLE001 - whatever it is, the URL does not answer
            self._problem = _in_words(error)
        finally:
            self._done.set()


def ask_url(url: str, timeout_s: float) -> None:
    """Ask a URL once. Raises whatever is wrong."""
    # what the environment names as a proxy is for other hosts
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    opener.open(url, timeout=timeout_s).close()


def _in_words(error: Exception) -> str:
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(reason, OSError) and reason.strerror:
        return str(reason.strerror)
    return str(reason).partition("\n")[0] or type(error).__name__
