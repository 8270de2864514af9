"""Discovery: the Serve deployment that tells who is there, over HTTP and to in-cluster callers."""

from seedcore.discovery.builder import DiscoveryArgs, build

__all__ = ["DiscoveryArgs", "build"]
