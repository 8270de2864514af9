"""Processes that an agent depends on, which its registration names."""

from __future__ import annotations

from dataclasses import dataclass

from seedcore.core.errors import InvalidInputError
from seedcore.core.limits import MAX_ID_CHARS, MAX_TEXT_CHARS, check_kind, check_text
from seedcore.core.wire import wire

MAX_DEPENDENCIES = 8
MAX_NAME_CHARS = 63


@wire
@dataclass(frozen=True, slots=True)
class Dependency:
    """A process on the agent's node that the agent depends on.

    `process_key` distinguishes it from a later one with the same `pid` (see ray_support.process_keys). When it ends,
    the agent's instance is dead if `is_fatal`; otherwise it gets a hold of kind `process`. The last lines of the file
    at `stderr_path` then become a part of the cause.
    """

    name: str
    pid: int
    process_key: str
    is_fatal: bool = True
    stderr_path: str | None = None

    def validated(self) -> Dependency:
        """The same, or InvalidInputError naming the first bad field."""
        check_text("name", self.name, MAX_NAME_CHARS)
        if not (type(self.pid) is int and 0 < self.pid < 2**31):
            raise InvalidInputError("pid", f"must be a positive 32-bit integer, not {self.pid!r}")
        check_text("process_key", self.process_key, MAX_ID_CHARS)
        check_kind("fatal", self.is_fatal, bool)
        if self.stderr_path is not None:
            check_text("stderr_path", self.stderr_path, MAX_TEXT_CHARS)
            if not self.stderr_path.startswith("/"):
                raise InvalidInputError("stderr_path", f"must be an absolute path, not {self.stderr_path!r}")
        return self


def check_dependencies(dependencies: tuple[Dependency, ...]) -> None:
    """Refuse too many, and two of one name."""
    if len(check_kind("dependencies", dependencies, tuple)) > MAX_DEPENDENCIES:
        raise InvalidInputError("dependencies", f"must be at most {MAX_DEPENDENCIES} processes: unwatch one first")
    for dependency in dependencies:
        check_kind("dependency", dependency, Dependency).validated()
    if len({dependency.name for dependency in dependencies}) < len(dependencies):
        raise InvalidInputError("dependencies", "must have different names")
