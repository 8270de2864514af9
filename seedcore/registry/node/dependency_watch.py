"""Watches the processes that the instances of a node depend on, for their end.

Owns which instance depends on which process, and the words of an end: the process, its signal or exit code, and the
last lines of its log.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace

from seedcore.core.causes import Cause
from seedcore.core.dependencies import Dependency
from seedcore.core.limits import MAX_TEXT_CHARS
from seedcore.core.timeouts import end
from seedcore.registry.node.log_tail import last_lines
from seedcore.registry.node.process_watch import PidfdWatch, why_unwatched
from seedcore.registry.protocol.messages import Watched

logger = logging.getLogger(__name__)

OnEnd = Callable[[str, Dependency, Cause], None]
"""Called with an instance's id, the process that it depends on, and the cause."""

# a death is reported this much later where its log cannot be read; far above what a thread takes on a busy node
_READ_S = 0.5
_RETRY_S = 5.0


class DependencyWatch:
    """Reports each end once. It watches a process as the instance's own is watched, by a descriptor of the kernel; one
    that cannot be watched now is tried again."""

    def __init__(self, on_end: OnEnd) -> None:
        self._on_end = on_end
        self._watch = PidfdWatch(self._note)
        self._known: dict[str, tuple[str, Dependency]] = {}
        self._of: dict[str, set[str]] = {}
        self._unseen: dict[str, None] = {}
        self._retrying: asyncio.Task[None] | None = None
        self._reporting: set[asyncio.Task[None]] = set()

    async def set(self, instance: Watched) -> None:
        """Watch the processes that an instance depends on, and no others for it. An end before the call is reported,
        too."""
        instance_id = instance.instance_id
        wanted = {f"{instance_id} {one.process_key}": (instance_id, one) for one in instance.dependencies}
        for tenant in self._of.get(instance_id, set()) - wanted.keys():
            self._drop(tenant)
        if not wanted:
            self._of.pop(instance_id, None)
            return
        new = [tenant for tenant, known in wanted.items() if self._known.get(tenant) != known]
        self._of[instance_id] = set(wanted)
        self._known.update(wanted)
        for tenant in new:
            await self._add(tenant)

    def discard(self, instance_id: str) -> None:
        """Watch for an instance no longer."""
        for tenant in self._of.pop(instance_id, set()):
            self._drop(tenant)

    async def close(self) -> None:
        """Release everything."""
        await end(self._retrying, *self._reporting)
        await self._watch.close()

    async def _add(self, tenant: str) -> None:
        instance_id, dependency = self._known[tenant]
        process = Watched(tenant, dependency.pid, dependency.process_key, None, None, None)
        if await self._watch.add(process):
            self._unseen.pop(tenant, None)
            return
        if tenant not in self._unseen:
            logger.warning(
                "the end of process %r, pid %d, is not noticed: the relay cannot watch it (%s); next try in %.0f s",
                dependency.name,
                dependency.pid,
                why_unwatched(process),
                _RETRY_S,
                extra={"instance_id": instance_id},
            )
        self._unseen[tenant] = None
        if self._retrying is None or self._retrying.done():
            self._retrying = asyncio.create_task(self._retry(), name="dependencies-tried-again")

    async def _retry(self) -> None:
        while self._unseen:
            await asyncio.sleep(_RETRY_S)
            for tenant in list(self._unseen):
                if tenant in self._known:
                    await self._add(tenant)

    def _drop(self, tenant: str) -> None:
        self._known.pop(tenant, None)
        self._unseen.pop(tenant, None)
        self._watch.discard(tenant)

    def _note(self, tenant: str, cause: Cause, _process_key: str | None) -> None:
        instance_id, dependency = self._known[tenant]
        self._unseen.pop(tenant, None)
        if dependency.stderr_path is None:
            self._on_end(instance_id, dependency, _in_words(dependency, cause, []))
            return
        task = asyncio.create_task(self._report(tenant, dependency.stderr_path, cause), name="dependency-ended")
        self._reporting.add(task)
        task.add_done_callback(self._reporting.discard)

    async def _report(self, tenant: str, stderr_path: str, cause: Cause) -> None:
        lines = await last_lines(stderr_path, _READ_S)
        if tenant in self._known:
            instance_id, dependency = self._known[tenant]
            self._on_end(instance_id, dependency, _in_words(dependency, cause, lines))


def _in_words(dependency: Dependency, cause: Cause, lines: list[str]) -> Cause:
    """The cause with the name of the process and the last lines of its log, of which the first ones make room."""
    head = f"{dependency.name}: {cause.detail}"
    tail = " | ".join(lines)
    room = MAX_TEXT_CHARS - len(head) - len("; ")
    if len(tail) > room:
        tail = "..." + tail[len(tail) - room + len("...") :]
    return replace(cause, detail=f"{head}; {tail}" if tail else head)
