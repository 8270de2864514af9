"""The registry in this process, with the shorthands of a connection."""

from __future__ import annotations

from seedcore.registry.protocol.api import Shorthands
from seedcore.registry.server.registry import Registry


class LocalRegistry(Shorthands, Registry):
    """A Registry that is called like a connection to one."""
