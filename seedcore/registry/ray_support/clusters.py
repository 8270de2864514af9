"""Finds the Ray clusters of this machine. Joins none.

Ray's `address="auto"` takes any cluster that has a node here, of any user, at random. What is private of Ray (the
command lines of its processes, its use of the user's token) is used here and nowhere else.
"""

from __future__ import annotations

import logging
import os
import pwd
from dataclasses import dataclass

import psutil

_FLAG = "--gcs-address="
_REGISTRY_TITLE = "ray::RegistryActor"
_THIS_MACHINE = {"localhost", "127.0.0.1", "::1", "[::1]"}


@dataclass(frozen=True, slots=True)
class LocalCluster:
    """A Ray cluster that has a node on this machine. `has_registry`: a registry actor runs on that node."""

    address: str
    uid: int
    has_registry: bool = False

    @property
    def is_own(self) -> bool:
        """Whether this user started it."""
        return self.uid == os.geteuid()

    @property
    def user(self) -> str:
        """Name of the user who started it."""
        try:
            return pwd.getpwuid(self.uid).pw_name
        except KeyError:
            return str(self.uid)

    def is_at(self, address: str) -> bool:
        """Whether an address, as RAY_ADDRESS has it, is this cluster's."""
        host, _, port = address.rpartition(":")
        own_host, _, own_port = self.address.rpartition(":")
        return port == own_port and (host == own_host or host in _THIS_MACHINE)


def local_clusters() -> list[LocalCluster]:
    """Every cluster that has a node on this machine, in the order of their addresses."""
    raylets: dict[int, LocalCluster] = {}
    parents_of_registries: set[int] = set()
    for process in psutil.process_iter(["pid", "ppid", "cmdline", "uids"]):
        words = process.info["cmdline"] or [""]
        if words[0].startswith(_REGISTRY_TITLE):
            parents_of_registries.add(process.info["ppid"])
        elif os.path.basename(words[0]) == "raylet" and process.info["uids"] is not None:
            address = next((word.removeprefix(_FLAG) for word in words if word.startswith(_FLAG)), None)
            if address:
                raylets[process.info["pid"]] = LocalCluster(address, process.info["uids"].effective)
    found: dict[str, LocalCluster] = {}
    for pid, cluster in raylets.items():
        known = found.get(cluster.address, cluster)
        has_registry = known.has_registry or pid in parents_of_registries
        found[cluster.address] = LocalCluster(cluster.address, known.uid, has_registry)
    return [found[address] for address in sorted(found)]


def use_own_token() -> None:
    """Use the user's Ray token, where there is one and RAY_AUTH_MODE is not set.

    Ray does so for a cluster that it finds by itself, and never for an address, which may be of another machine: call
    this for a cluster of this user alone. A Ray without that function needs RAY_AUTH_MODE.
    """
    # Ray warns that it does
    logging.getLogger("ray").setLevel(logging.ERROR)
    try:
        from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
    except ImportError:
        return
    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
