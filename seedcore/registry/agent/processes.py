"""The processes that an agent depends on, as its registration names them."""

from __future__ import annotations

import os
from collections.abc import Sequence

from seedcore.core.dependencies import Dependency, check_dependencies
from seedcore.core.errors import InvalidInputError
from seedcore.registry.ray_support.process_keys import has_ended, leader_of, process_key_of

Dependencies = tuple[Dependency, ...]


def watched(
    known: Dependencies, pid: int, name: str, *, is_fatal: bool, stderr_path: str | os.PathLike[str] | None
) -> Dependencies:
    """Those known and this process, in the place of another one of its name. Raises InvalidInputError."""
    try:
        path = None if stderr_path is None else os.fspath(stderr_path)
    except TypeError:
        raise InvalidInputError("stderr_path", f"must be a path, not {type(stderr_path).__name__}") from None
    if not (type(pid) is int and 0 < pid < 2**31):
        raise InvalidInputError("pid", f"must be a positive 32-bit integer, not {pid!r}")
    if pid == os.getpid():
        raise InvalidInputError("pid", f"{pid} is the agent's own process, which is watched anyway")
    leader = leader_of(pid)
    if leader not in {None, pid}:
        raise InvalidInputError("pid", f"{pid} is a thread of process {leader}, which is what can be watched")
    key = process_key_of(pid)
    if key is None:
        raise InvalidInputError(
            "pid", f"no process {pid} lives here: it has ended, or is on another node or in another PID namespace"
        )
    process = Dependency(name, pid, key, is_fatal, path).validated()
    others = tuple(one for one in known if one.name != name)
    check_dependencies((*others, process))
    return (*others, process)


def unwatched(known: Dependencies, name: str) -> Dependencies:
    """Those known but the one of this name. Raises InvalidInputError."""
    others = tuple(one for one in known if one.name != name)
    if len(others) == len(known):
        raise InvalidInputError("name", f"no process of the name {name!r} is watched")
    return others


def ended(known: Sequence[Dependency], *, is_fatal: bool) -> Dependency | None:
    """The first of the fatal, or of the other processes that has certainly ended."""
    return next((one for one in known if one.is_fatal is is_fatal and has_ended(one.pid, one.process_key)), None)
