"""Tier0MemoryManager: from a logical id to a live actor handle, also during outages."""

from seedcore.tier0.manager import Tier0MemoryManager, get_tier0_manager

__all__ = ["Tier0MemoryManager", "get_tier0_manager"]
