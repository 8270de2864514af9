"""What a mutant is: a way to break the code on purpose."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """A way to break the code, and a seed whose history notices it: where a search does well to begin. `law`: the one
    that has to notice it; None: any."""

    seed: int
    patch: Callable[[], AbstractContextManager[object]]
    law: int | None = None

    def is_noticed_by(self, violation: str) -> bool:
        """Whether this violation is the one that the mutant has to cause."""
        return self.law is None or f"law {self.law}:" in violation
