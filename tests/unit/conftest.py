"""Unit tests are pure: no Ray, no sockets."""

from __future__ import annotations

import socket
import sys

import pytest

from seedcore.registry import session


def _refuse(*_: object, **__: object) -> None:
    raise AssertionError("a unit test must not touch Ray or the network")


@pytest.fixture(autouse=True)
def _nothing_leaves_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket.socket, "connect", _refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", _refuse)
    ray = sys.modules.get("ray")
    if ray is not None:
        monkeypatch.setattr(ray, "init", _refuse)


class Connection:
    """Stands for Ray's."""


@pytest.fixture
def connected(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that is connected to Ray."""
    connection = Connection()
    monkeypatch.setattr(session, "ray_connection", lambda: connection)
