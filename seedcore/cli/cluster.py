"""The command's way into a Ray cluster."""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading

import ray
from rich.console import Console

from seedcore.core.errors import RegistryError, first_line
from seedcore.settings import Settings

_LISTENER_TIMEOUT_S = 5.0
_JOIN_TIMEOUT_S = 60.0


class NoClusterError(RegistryError):
    """There is no Ray cluster to connect to."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why

    @property
    def is_absent(self) -> bool:
        """Whether none runs on this machine, as opposed to one that cannot be joined."""
        return self.why.startswith("Could not find any running Ray instance")

    def __str__(self) -> str:
        return (
            f"no Ray cluster to connect to ({self.why}): start one with `serve run serve_config.yaml` or "
            "`ray start --head`, or name one in RAY_ADDRESS; RAY_AUTH_MODE must be the same as there"
        )


def join_cluster(settings: Settings) -> None:
    """Connect to the running cluster. Raises NoClusterError."""
    if settings.ray_address is not None:
        _require_listener(settings.ray_address)
    patience = threading.Timer(_JOIN_TIMEOUT_S, _give_up)
    patience.daemon = True
    patience.start()
    try:
        ray.init(address="auto", namespace=settings.namespace, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise NoClusterError(first_line(error)) from error
    finally:
        patience.cancel()


def _give_up() -> None:
    """Ray itself waits for ever for what listens there and is no Ray, and cannot be interrupted."""
    sys.stderr.write(f"seedcore: {NoClusterError(f'no answer within {_JOIN_TIMEOUT_S:g} s')}\n")
    sys.stderr.flush()
    os._exit(1)


def _require_listener(address: str) -> None:
    """Ray itself would look for minutes for a head that is not there."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), _LISTENER_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        raise NoClusterError(f"RAY_ADDRESS is {address}, where nothing answers: {first_line(error)}") from error


def join_or_start_cluster(settings: Settings, console: Console) -> None:
    """Connect to the running cluster, or, where none runs and none is named, start one that ends with this process."""
    try:
        join_cluster(settings)
    except NoClusterError as error:
        if settings.ray_address is not None or not error.is_absent:
            raise
        console.print("No Ray cluster runs; starting one for as long as this command runs.")
        ray.init(address="local", namespace=settings.namespace, log_to_driver=False, logging_level=logging.ERROR)
