"""Joins a Ray cluster for a command: the one in RAY_ADDRESS, or the only one that this user runs on this machine."""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
from collections.abc import Sequence

import ray
from rich.console import Console

from seedcore.cli.errors import EXIT_CANNOT_KNOW, NoClusterError, NotServedError, SeveralClustersError
from seedcore.core.errors import first_line
from seedcore.registry.ray_support.clusters import LocalCluster, local_clusters, use_own_token
from seedcore.settings import Settings

_LISTENER_TIMEOUT_S = 5.0
_JOIN_TIMEOUT_S = 60.0
_SHOWN = 8
# of Ray's message, which has no class of its own
_RAY_FOUND_NONE = "Could not find any running Ray instance"


def require_no_url(settings: Settings) -> None:
    """Raise NotServedError if SEEDCORE_URL is set: the command would ignore it."""
    if settings.url is not None:
        raise NotServedError


def join_cluster(settings: Settings) -> str:
    """Connect to the cluster in RAY_ADDRESS, or else to the only one that this user runs on this machine.

    Returns its address. Raises NotServedError, SeveralClustersError or NoClusterError.
    """
    require_no_url(settings)
    address = _address_to_join(settings.ray_address, local_clusters())
    timer = threading.Timer(_JOIN_TIMEOUT_S, _give_up)
    timer.daemon = True
    timer.start()
    try:
        ray.init(address=address, namespace=settings.namespace, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise NoClusterError(first_line(error), is_absent=_RAY_FOUND_NONE in str(error)) from error
    finally:
        timer.cancel()
    return str(ray.get_runtime_context().gcs_address)


def _address_to_join(named: str | None, clusters: Sequence[LocalCluster]) -> str:
    """Return the address for ray.init. Raises NoClusterError."""
    own = [cluster for cluster in clusters if cluster.is_own]
    if named == "local":
        raise NoClusterError("RAY_ADDRESS is `local`, which names no running cluster")
    if named is not None and named != "auto":
        _require_listener(named)
        if any(cluster.is_at(named) for cluster in own):
            use_own_token()
        return named
    # a raylet outlives the head of its cluster for a minute
    living = [cluster for cluster in own if _connection_problem(cluster.address) is None]
    if len(living) > 1:
        raise SeveralClustersError(f"{len(living)} Ray clusters of this user run on this machine: {_shown(living)}")
    if living:
        use_own_token()
        return living[0].address
    if own:
        raise NoClusterError(f"nothing answers at {_shown(own)}, although a node of it still runs here")
    if clusters:
        raise NoClusterError(f"this user runs none; other users run {_shown(clusters)}", is_absent=True)
    # besides processes, Ray also reads a file with the address of its last cluster
    return "auto"


def _shown(clusters: Sequence[LocalCluster]) -> str:
    """Return one line: the address of each cluster, its user, and whether it runs a registry."""
    shown = []
    for cluster in clusters[:_SHOWN]:
        marks = [] if cluster.is_own else [f"of {cluster.user}"]
        marks += ["runs a registry"] if cluster.has_registry else []
        shown.append(f"{cluster.address} ({', '.join(marks)})" if marks else cluster.address)
    more = [f"{len(clusters) - _SHOWN} more"] if len(clusters) > _SHOWN else []
    return ", ".join(shown + more)


def _give_up() -> None:
    """End the process. ray.init waits forever for a listener that is not Ray, and cannot be interrupted."""
    sys.stderr.write(f"seedcore: {NoClusterError(f'no answer within {_JOIN_TIMEOUT_S:g} s')}\n")
    sys.stderr.flush()
    os._exit(EXIT_CANNOT_KNOW)


def _require_listener(address: str) -> None:
    """Raise NoClusterError at once; ray.init would try for minutes to reach an address without a listener."""
    problem = _connection_problem(address)
    if problem is not None:
        raise NoClusterError(f"RAY_ADDRESS is {address}, where nothing answers: {problem}")


def _connection_problem(address: str) -> str | None:
    """Return why no connection can be made to an address; None if one can, or if the address has no port."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if port.isdigit():
        try:
            socket.create_connection((host, int(port)), _LISTENER_TIMEOUT_S).close()
        except (OSError, OverflowError) as error:
            return first_line(error)
    return None


def join_or_start_cluster(settings: Settings, console: Console) -> None:
    """Connect to the running cluster; if none runs and RAY_ADDRESS is not set, start one for this process."""
    try:
        join_cluster(settings)
    except NoClusterError as error:
        if settings.ray_address is not None or not error.is_absent:
            raise
        console.print("No Ray cluster runs; starting one that ends with this command.")
        ray.init(address="local", namespace=settings.namespace, log_to_driver=False, logging_level=logging.ERROR)
