"""The command's way into a Ray cluster: the one that is named, or the only one that this user runs on this machine."""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
from collections.abc import Sequence

import ray
from rich.console import Console

from seedcore.core.errors import RegistryError, first_line
from seedcore.registry.ray_support.clusters import LocalCluster, local_clusters, use_own_token
from seedcore.settings import Settings

_LISTENER_TIMEOUT_S = 5.0
_JOIN_TIMEOUT_S = 60.0
_ABSENT = "Could not find any running Ray instance"
_SHOWN = 8


class NoClusterError(RegistryError):
    """There is no Ray cluster to connect to."""

    remedy = "start `serve run serve_config.yaml`, or set RAY_ADDRESS"

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why

    @property
    def is_absent(self) -> bool:
        """Whether this user runs none on this machine, as opposed to one that cannot be joined."""
        return self.why.startswith(_ABSENT)

    def __str__(self) -> str:
        return (
            f"no Ray cluster to connect to ({self.why}): start one with `serve run serve_config.yaml` or "
            "`ray start --head`, or name one in RAY_ADDRESS; RAY_AUTH_MODE must be the same as there"
        )


class SeveralClustersError(NoClusterError):
    """This user runs several Ray clusters on this machine, and none is named."""

    remedy = "set RAY_ADDRESS to one of them"

    def __str__(self) -> str:
        return f"{self.why}; {self.remedy}, or SEEDCORE_URL to a deployment"


class NotServedError(RegistryError):
    """SEEDCORE_URL names a deployment, and the command is not served over HTTP."""

    def __init__(self) -> None:
        super().__init__()

    def __str__(self) -> str:
        return (
            "SEEDCORE_URL names a deployment, and this command is not served over HTTP: unset SEEDCORE_URL and run the "
            "command in the deployment's Ray cluster, or name that cluster in RAY_ADDRESS"
        )


def require_no_url(settings: Settings) -> None:
    """Raises NotServedError where the settings name a deployment, which the caller would ignore."""
    if settings.url is not None:
        raise NotServedError


def join_cluster(settings: Settings) -> str:
    """Connect to the cluster that RAY_ADDRESS names, or else to the only one that this user runs on this machine.

    Returns its address. Raises NotServedError, SeveralClustersError or NoClusterError.
    """
    require_no_url(settings)
    address = _address_to_join(settings.ray_address, local_clusters())
    patience = threading.Timer(_JOIN_TIMEOUT_S, _give_up)
    patience.daemon = True
    patience.start()
    try:
        ray.init(address=address, namespace=settings.namespace, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise NoClusterError(first_line(error)) from error
    finally:
        patience.cancel()
    return str(ray.get_runtime_context().gcs_address)


def _address_to_join(named: str | None, clusters: Sequence[LocalCluster]) -> str:
    """What ray.init gets. Raises NoClusterError."""
    own = [cluster for cluster in clusters if cluster.is_own]
    if named == "local":
        raise NoClusterError("RAY_ADDRESS is local, which names no running cluster")
    if named is not None and named != "auto":
        _require_listener(named)
        if any(cluster.is_at(named) for cluster in own):
            use_own_token()
        return named
    # a raylet outlives the head of its cluster for a minute
    living = [cluster for cluster in own if _silence_at(cluster.address) is None]
    if len(living) > 1:
        raise SeveralClustersError(f"{len(living)} Ray clusters of this user run on this machine: {_shown(living)}")
    if living:
        use_own_token()
        return living[0].address
    if own:
        raise NoClusterError(f"nothing answers at {_shown(own)}, of which a node still runs here")
    if clusters:
        raise NoClusterError(f"{_ABSENT} of this user; other users run {_shown(clusters)}")
    # Ray has a file beside the processes that it looks for
    return "auto"


def _shown(clusters: Sequence[LocalCluster]) -> str:
    """The clusters in a line: address, and what tells one from another."""
    shown = []
    for cluster in clusters[:_SHOWN]:
        marks = [] if cluster.is_own else [f"of {cluster.user}"]
        marks += ["runs a registry"] if cluster.has_registry else []
        shown.append(f"{cluster.address} ({', '.join(marks)})" if marks else cluster.address)
    more = [f"{len(clusters) - _SHOWN} more"] if len(clusters) > _SHOWN else []
    return ", ".join(shown + more)


def _give_up() -> None:
    """Ray itself waits for ever for what listens there and is no Ray, and cannot be interrupted."""
    sys.stderr.write(f"seedcore: {NoClusterError(f'no answer within {_JOIN_TIMEOUT_S:g} s')}\n")
    sys.stderr.flush()
    os._exit(1)


def _require_listener(address: str) -> None:
    """Ray itself would look for minutes for a head that is not there."""
    problem = _silence_at(address)
    if problem is not None:
        raise NoClusterError(f"RAY_ADDRESS is {address}, where nothing answers: {problem}")


def _silence_at(address: str) -> str | None:
    """Why no connection can be made to an address; None where one can, or where the address has no port."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if port.isdigit():
        try:
            socket.create_connection((host, int(port)), _LISTENER_TIMEOUT_S).close()
        except (OSError, OverflowError) as error:
            return first_line(error)
    return None


def join_or_start_cluster(settings: Settings, console: Console) -> None:
    """Connect to the running cluster, or, where none runs and none is named, start one that ends with this process."""
    try:
        join_cluster(settings)
    except NoClusterError as error:
        if settings.ray_address is not None or not error.is_absent:
            raise
        console.print("No Ray cluster runs; starting one for as long as this command runs.")
        ray.init(address="local", namespace=settings.namespace, log_to_driver=False, logging_level=logging.ERROR)
