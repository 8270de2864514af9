"""A name service: a process adds a name with a value, others get it, wait for it, list a subtree, and notice its end.

Replaces `NameRecordRepository` of AReaL (areal/utils/name_resolve.py), about 1,200 lines with its backends for memory,
NFS, etcd and Ray: keep-alive threads, polls of every wait and watch, and files that a crashed process leaves behind. A
name lives as long as the process that added it. Two processes that add one name are two instances of it, and the newest
counts.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
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
        if not replace and self.find_subtree(name)[:1] == [name]:
            raise FileExistsError(name)
        parts = name.split("/")
        # a label for the name and for each of the roots above it
        labels = {f"in:{'/'.join(parts[: end + 1])}": "" for end in range(len(parts))}
        reporter = seedcore.ThreadReporter(name, labels={"name": name, **labels}, metadata={"value": value})
        reporter.start()
        self._added[name] = reporter

    def delete(self, name: str) -> None:
        self._added.pop(name).stop("deleted")

    def reset(self) -> None:
        for name in list(self._added):
            self.delete(name)

    def get(self, name: str) -> str:
        return self._values(f"name={name}")[name]

    def find_subtree(self, root: str) -> list[str]:
        return sorted(self._values(f"in:{root}"))

    def get_subtree(self, root: str) -> list[str]:
        return list(self._values(f"in:{root}").values())

    def wait(self, name: str, timeout_s: float) -> str:
        """The value, as soon as there is the name. Raises TimeoutError."""
        with seedcore.watch(selector=f"name={name}", since="start") as events:
            timer = threading.Timer(timeout_s, events.close)
            timer.start()
            for event in events:
                for instance in (*event.instances, *([event.instance] if event.instance is not None else [])):
                    timer.cancel()
                    return str(instance.metadata["value"])
        raise TimeoutError(name)

    def watch_names(self, names: Sequence[str], call_back: Callable[[], object]) -> None:
        """Call back once, when one of the names is gone."""
        events = seedcore.watch(ids=names)

        def run() -> None:
            next(event for event in events if event.kind in {"died", "left"})
            events.close()
            call_back()

        threading.Thread(target=run, daemon=True).start()

    def _values(self, selector: str) -> dict[str, str]:
        found = seedcore.list_agents(selector=selector)
        if not found.complete:
            raise ConnectionError("the registry does not answer")
        newest = sorted(found, key=lambda instance: instance.started_at)
        return {instance.logical_id: str(instance.metadata["value"]) for instance in newest}


def main() -> None:
    ray.init(address="auto", log_to_driver=False, logging_level="error")
    with NameService() as names:
        adds = threading.Timer(0.5, names.add, ("trial/server/1", "http://10.0.0.3:8000"))
        adds.start()
        print(names.wait("trial/server/1", timeout_s=60))
        adds.join()
        names.add("trial/server/2", "http://10.0.0.4:8000")
        print(names.find_subtree("trial"), names.get_subtree("trial/server"))
        gone = threading.Event()
        names.watch_names(["trial/server/1"], gone.set)
        names.delete("trial/server/1")
        print("gone:", gone.wait(60), names.find_subtree("trial"), names.get("trial/server/2"))


if __name__ == "__main__":
    main()
