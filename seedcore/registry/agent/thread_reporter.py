"""A Reporter for classes whose methods block: it beats on a thread of its own."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeAlias, TypeVar

from seedcore.core.answers import Receipt
from seedcore.core.errors import ForkedProcessError, RegistryUnavailableError
from seedcore.core.limits import Json, check_detail, check_endpoints, check_kind, check_load
from seedcore.core.loop_thread import LoopThread
from seedcore.registry.agent.http_probe import Probe
from seedcore.registry.agent.reporter import Reporter, stop_reason
from seedcore.registry.ray_support.session import refuse_forked
from seedcore.settings import Settings, get_settings

T = TypeVar("T")

Call: TypeAlias = Callable[[Reporter], Coroutine[Any, Any, Receipt | None]]

_PATIENCE_S = 30.0
_CALLS_PER_STEP = 6  # to find the registry, greet it and call it, and once more with the one that replaced it
_OF_PARENT = "this reporter runs in the process that this one was forked from: make another reporter in this process"


class ThreadReporter:
    """A Reporter on a thread beside the caller's, for classes whose methods block:

        self.reporter = ThreadReporter("my_agent")
        self.reporter.start()

    Its beats prove that the process lives, not that its methods answer. Use it from any thread; calls run one after
    the other. All of a process share one thread, which ends with the last of them. `with` starts and stops it.
    """

    def __init__(
        self,
        logical_id: str,
        *,
        actor_name: str | None = None,
        organ_id: str | None = None,
        labels: Mapping[str, str] | None = None,
        metadata: Mapping[str, Json] | None = None,
        serve_route: str | None = None,
        endpoints: Mapping[str, str] | None = None,
        settings: Settings | None = None,
        on_retired: Callable[[str], object] | None = None,
    ) -> None:
        """As Reporter. `on_retired` is called on the reporters' thread."""
        settings = settings if settings is not None else get_settings()
        self._make = partial(
            Reporter,
            logical_id,
            actor_name=actor_name,
            organ_id=organ_id,
            labels=labels,
            metadata=metadata,
            serve_route=serve_route,
            endpoints=endpoints,
            settings=settings,
            on_retired=on_retired,
        )
        # a value beyond its limits is refused here; each start makes a reporter of its own, since dead is final
        self._make()
        self._patience_s = max(_PATIENCE_S, _CALLS_PER_STEP * settings.call_timeout_s)
        self._thread: LoopThread | None = None
        self._turn = threading.Lock()
        self._pid = os.getpid()
        self._reporter: Reporter | None = None
        self._load: float | None = None
        self._kept: dict[str, Call] = {}

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop(stop_reason(error))

    @property
    def reporter(self) -> Reporter | None:
        """The reporter on the thread, while it runs."""
        return self._reporter

    @property
    def load(self) -> float | None:
        """As Reporter.load. It also holds for a later `start()`."""
        return self._load

    @load.setter
    def load(self, load: float | None) -> None:
        self._load = None if load is None else check_load(load)
        reporter = self._reporter
        if reporter is not None:
            reporter.load = self._load

    def start(self) -> None:
        """As Reporter.start, blocking. After `stop()` it starts over, as a new instance."""
        with self._alone():
            if self._reporter is not None and self._thread is not None:
                # raises where it has stopped since its epoch is retired
                self._wait(self._thread, self._reporter.start())
                return
            reporter, thread = self._make(), LoopThread.joined()
            reporter.load = self._load
            try:
                self._wait(thread, _begin(reporter, list(self._kept.values())))
            except BaseException:
                thread.leave()
                raise
            self._reporter, self._thread = reporter, thread
            # it may have been set meanwhile
            reporter.load = self._load
            # what it depends on is of this start; whether it is ready is not
            self._kept = {key: call for key, call in self._kept.items() if key == "readiness"}

    def drain(self, reason: str | None = None) -> Receipt | None:
        """As Reporter.drain, blocking."""
        return self._run(lambda reporter: reporter.drain(reason))

    def undrain(self, reason: str | None = None) -> Receipt | None:
        """As Reporter.undrain, blocking."""
        return self._run(lambda reporter: reporter.undrain(reason))

    def set_endpoints(self, endpoints: Mapping[str, str]) -> Receipt | None:
        """As Reporter.set_endpoints, blocking. A later start registers with these, too."""
        check_endpoints(endpoints)
        with self._alone():
            self._make = partial(self._make, endpoints=dict(endpoints))
            if self._reporter is None or self._thread is None:
                return None
            return self._wait(self._thread, self._reporter.set_endpoints(endpoints))

    def set_ready(self, ready: bool, reason: str | None = None) -> Receipt | None:
        """As Reporter.set_ready, blocking. It also holds for a later `start()`."""
        check_kind("ready", ready, bool)
        check_detail(reason)
        with self._alone():
            self._kept["readiness"] = lambda reporter: reporter.set_ready(ready, reason)
        return self._run(self._kept["readiness"])

    def watch_process(
        self,
        pid: int,
        *,
        name: str = "process",
        fatal: bool = True,
        stderr_path: str | os.PathLike[str] | None = None,
    ) -> Receipt | None:
        """As Reporter.watch_process, blocking. Before `start()` it is kept, and checked there."""
        return self._run_or_keep(
            f"process {name}",
            lambda reporter: reporter.watch_process(pid, name=name, fatal=fatal, stderr_path=stderr_path),
        )

    def unwatch_process(self, name: str) -> Receipt | None:
        """As Reporter.unwatch_process, blocking."""
        self._kept.pop(f"process {name}", None)
        return self._run(lambda reporter: reporter.unwatch_process(name))

    def watch_http(
        self, url: str, *, name: str, every_s: float = 5.0, timeout_s: float = 2.0, failures: int = 3
    ) -> None:
        """As Reporter.watch_http. Before `start()` it is kept."""
        probe = Probe(url, name, every_s, timeout_s, failures).validated()
        self._run_or_keep(f"probe {name}", lambda reporter: _probe(reporter, probe))

    def unwatch_http(self, name: str) -> Receipt | None:
        """As Reporter.unwatch_http, blocking."""
        self._kept.pop(f"probe {name}", None)
        return self._run(lambda reporter: reporter.unwatch_http(name))

    def stop(self, reason: str = "stopped") -> Receipt | None:
        """As Reporter.stop, blocking."""
        check_detail(reason)
        with self._alone():
            reporter, thread = self._reporter, self._thread
            if reporter is None or thread is None:
                return None
            self._reporter, self._thread = None, None
            try:
                return self._wait(thread, reporter.stop(reason))
            finally:
                thread.leave()

    def _run(self, call: Callable[[Reporter], Coroutine[Any, Any, T]]) -> T | None:
        with self._alone():
            if self._reporter is None or self._thread is None:
                return None
            return self._wait(self._thread, call(self._reporter))

    def _wait(self, thread: LoopThread, work: Coroutine[Any, Any, T]) -> T:
        late = RegistryUnavailableError(f"the reporter's thread has not answered within {self._patience_s:g} s")
        return thread.run(work, self._patience_s, late)

    def _run_or_keep(self, key: str, call: Call) -> Receipt | None:
        with self._alone():
            if self._reporter is None or self._thread is None:
                self._kept[key] = call
                return None
            return self._wait(self._thread, call(self._reporter))

    @contextmanager
    def _alone(self) -> Iterator[None]:
        refuse_forked()
        if self._pid != os.getpid():
            if self._thread is not None:
                raise ForkedProcessError(_OF_PARENT)
            # made before the fork, never started; a thread that the child does not have may have held its turn
            self._pid, self._turn = os.getpid(), threading.Lock()
        # bounded, since a signal's handler may call while the call that it interrupted holds the turn
        if not self._turn.acquire(timeout=self._patience_s):
            raise RegistryUnavailableError("another call to this reporter has not ended")
        try:
            yield
        finally:
            self._turn.release()


async def _begin(reporter: Reporter, calls: Sequence[Call]) -> None:
    """Start a reporter after the calls that were kept for it."""
    try:
        for call in calls:
            await call(reporter)
        await reporter.start()
    except BaseException:
        await reporter.stop()
        raise


async def _probe(reporter: Reporter, probe: Probe) -> None:
    reporter.watch_http(
        probe.url, name=probe.name, every_s=probe.every_s, timeout_s=probe.timeout_s, failures=probe.failures
    )
