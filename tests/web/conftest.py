"""A cluster with Serve, a database of its own that can be stopped, and a fleet."""

from tests.serving import deployment, server, tokens, world

__all__ = ["deployment", "server", "tokens", "world"]
