"""Discovery: the Serve deployment that lists and resolves agents, over HTTP and for callers in the cluster."""

from __future__ import annotations

from typing import Any

__all__ = ["build"]


def __getattr__(name: str) -> Any:
    """`build`, for `import_path: seedcore.discovery:build`. Imported on demand: Serve is slow to import, and the
    command needs only the shapes of the API."""
    if name != "build":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from seedcore.discovery.builder import build

    return build
