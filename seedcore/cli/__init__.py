"""The `seedcore` command."""

from seedcore.cli.app import main

__all__ = ["main"]
