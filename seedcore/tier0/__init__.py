"""Tier0MemoryManager: from a logical id to a live actor handle, also during outages."""

from seedcore.tier0.blocking import BlockingManager
from seedcore.tier0.blocking_watch import BlockingWatch
from seedcore.tier0.door import get_actor, list_agents, wait_for, watch
from seedcore.tier0.manager import Tier0MemoryManager, get_tier0_manager

__all__ = [
    "BlockingManager",
    "BlockingWatch",
    "Tier0MemoryManager",
    "get_actor",
    "get_tier0_manager",
    "list_agents",
    "wait_for",
    "watch",
]
