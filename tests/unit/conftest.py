"""Unit tests are pure: no Ray, no sockets."""

from __future__ import annotations

import socket
import sys

import pytest

from seedcore.registry.ray_support import session


def _refuse(*_: object, **__: object) -> None:
    raise AssertionError("a unit test must not touch Ray or the network")


@pytest.fixture(autouse=True)
def _nothing_leaves_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket.socket, "connect", _refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", _refuse)
    ray = sys.modules.get("ray")
    if ray is not None:
        monkeypatch.setattr(ray, "init", _refuse)


class RayConnection:
    """Stands for what Ray makes for each connection."""


class Membership:
    """The process's membership in Ray. It is connected at first."""

    def __init__(self) -> None:
        self.connection: RayConnection | None = RayConnection()

    def leave(self) -> None:
        self.connection = None

    def join(self) -> None:
        self.connection = RayConnection()


@pytest.fixture
def connected(monkeypatch: pytest.MonkeyPatch) -> Membership:
    """A process that is connected to Ray."""
    membership = Membership()
    monkeypatch.setattr(session, "ray_connection", lambda: membership.connection)
    return membership
