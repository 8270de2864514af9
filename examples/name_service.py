"""A name service: a process adds a name with a value, others get it, wait for it, list a subtree, and notice its end.

Replaces `NameRecordRepository` of AReaL (areal/utils/name_resolve.py), about 1,200 lines with its backends for memory,
NFS, etcd and Ray: keep-alive threads, polls of every wait and watch, and files that a crashed process leaves behind. A
name lives as long as the process that added it. Two processes that add one name are two instances of it, and the newest
counts.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Self

import ray

import seedcore


class NameService:
    """The names that this process added, and those of all processes."""

    def __init__(self) -> None:
        self._added: dict[str, seedcore.ThreadReporter] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_raised: object) -> None:
        self.reset()

    def add(self, name: str, value: str, *, replace: bool = False) -> None:
        if not replace and name in self._values(name):
            raise FileExistsError(name)
        parts = name.split("/")
        # a label for the name and for each of the roots above it
        roots = ["/".join(parts[:end]) for end in range(len(parts) + 1)]
        labels = {_label(root): "" for root in roots}
        reporter = seedcore.ThreadReporter(name, labels=labels, metadata={"value": value})
        reporter.start()
        before, self._added[name] = self._added.get(name), reporter
        if before is not None:
            before.stop("replaced")

    def delete(self, name: str) -> None:
        self._added.pop(name).stop("deleted")

    def reset(self) -> None:
        for name in list(self._added):
            self.delete(name)

    def get(self, name: str) -> str:
        return self._values(name)[name]

    def find_subtree(self, root: str) -> list[str]:
        return sorted(self._values(root))

    def get_subtree(self, root: str) -> list[str]:
        return list(self._values(root).values())

    def wait(self, name: str, timeout_s: float) -> str:
        """The value, as soon as there is the name. Raises TimeoutError."""
        with seedcore.watch(ids=[name], since="start") as events:
            timer = threading.Timer(timeout_s, events.close)
            timer.start()
            for event in events:
                for instance in (*event.instances, *([event.instance] if event.instance is not None else [])):
                    timer.cancel()
                    return str(instance.metadata["value"])
        raise TimeoutError(name)

    def watch_names(self, names: Sequence[str], call_back: Callable[[], object]) -> None:
        """Call back once, when one of the names is gone."""
        events = seedcore.watch(ids=names, since="start")

        def run() -> None:
            with closing(events):
                for event in events:
                    # the state now, at the start and after a gap, or one change
                    missing = set(names) - {instance.logical_id for instance in event.instances}
                    if missing if event.is_whole else event.kind in {"died", "left"}:
                        call_back()
                        return

        threading.Thread(target=run, daemon=True).start()

    def _values(self, root: str) -> dict[str, str]:
        found = seedcore.list_agents(selector=_label(root))
        if not found.complete:
            raise ConnectionError("the registry does not answer")
        newest = sorted(found, key=lambda instance: instance.started_at)
        return {instance.logical_id: str(instance.metadata["value"]) for instance in newest}


def _label(root: str) -> str:
    """The key of the label that every name below a root has: of any length and characters, unlike a key."""
    return f"in-{hashlib.sha256(root.encode()).hexdigest()[:32]}"


def main() -> None:
    ray.init(address="auto", log_to_driver=False, logging_level="error")
    with NameService() as names:
        adds = threading.Timer(0.5, names.add, ("trial/server/1", "http://10.0.0.3:8000"))
        adds.start()
        print(names.wait("trial/server/1", timeout_s=60))
        adds.join()
        names.add("trial/server/2", "http://10.0.0.4:8000")
        print(names.find_subtree("trial"), names.get_subtree("trial/server"))
        names.add("trial/server/1", "http://10.0.0.3:9000", replace=True)
        print(names.get("trial/server/1"))
        gone = threading.Event()
        names.watch_names(["trial/server/1"], gone.set)
        names.delete("trial/server/1")
        print("gone:", gone.wait(60), names.find_subtree("trial"), names.get("trial/server/2"))


if __name__ == "__main__":
    main()
