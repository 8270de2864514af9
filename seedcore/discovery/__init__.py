"""Discovery: the Serve deployment that tells who is there, over HTTP and to in-cluster callers."""

from __future__ import annotations

from typing import Any

__all__ = ["build"]


def __getattr__(name: str) -> Any:
    """`build`, for `import_path: seedcore.discovery:build`. Only then: Serve is slow to import, and the command, which
    speaks the API's shapes, has no use for it."""
    if name != "build":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from seedcore.discovery.builder import build

    return build
