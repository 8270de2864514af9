"""The JSON of single instances of the local copy, made once for each state of an instance."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from seedcore.core.instances import Instance, Verdict

MAX_RENDERED_BYTES = 16 * 1024 * 1024

# of an entry, beside its JSON
_ENTRY_BYTES = 512


class RenderedInstances:
    """The JSON of the instances that were rendered last: at most `max_bytes`.

    An instance of the copy is a value that a change replaces, so JSON is used again only for the same value with the
    same verdict. The copy's changes call `forget`, so that what is kept here is in the copy too.
    """

    def __init__(self, max_bytes: int = MAX_RENDERED_BYTES) -> None:
        self._max_bytes = max_bytes
        self._by_agent: OrderedDict[str, dict[str, tuple[Instance, Verdict, bytes]]] = OrderedDict()
        self.bytes = 0

    def json_of(self, row: Instance, verdict: Verdict, render: Callable[[Instance, Verdict], bytes]) -> bytes:
        """The JSON of an instance of the copy, by `render` if it is not kept."""
        kept = self._by_agent.get(row.logical_id)
        if kept is not None:
            self._by_agent.move_to_end(row.logical_id)
            known = kept.get(row.instance_id)
            if known is not None:
                if known[0] is row and known[1] is verdict:
                    return known[2]
                self.bytes -= _weight(known[2])
        made = render(row, verdict)
        self._by_agent.setdefault(row.logical_id, {})[row.instance_id] = row, verdict, made
        self.bytes += _weight(made)
        while self.bytes > self._max_bytes:
            self.forget(next(iter(self._by_agent)))
        return made

    def forget(self, logical_id: str) -> None:
        """Drop the JSON of an agent's instances: one of them has changed."""
        for _, _, made in self._by_agent.pop(logical_id, {}).values():
            self.bytes -= _weight(made)

    def clear(self) -> None:
        """Drop everything: all instances may have changed."""
        self._by_agent.clear()
        self.bytes = 0


def _weight(made: bytes) -> int:
    return len(made) + _ENTRY_BYTES
