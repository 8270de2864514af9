"""What Ray and Ray Serve leave open to other users of a machine by their defaults, and what closes it.

Ray trusts every process that can read its token or use its sockets, so on a shared machine these are its boundary.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from seedcore.discovery.access import is_behind_haproxy
from seedcore.registry.ray_support import session

# Serve's defaults
_HAPROXY_SOCKET = "/tmp/haproxy-serve/admin.sock"  # noqa: S108 - not ours to choose
_HAPROXY_PORTS = {"RAY_SERVE_HAPROXY_STATS_PORT": 8404, "RAY_SERVE_HAPROXY_METRICS_PORT": 9101}
_EVERYWHERE = frozenset({"0.0.0.0", "::"})  # noqa: S104 - looked for, not listened on


@dataclass(frozen=True, slots=True)
class Exposure:
    """Something that other users of this machine, or of its network, can use; and what closes it."""

    what: str
    remedy: str


def exposures() -> list[Exposure]:
    """What is open on this machine."""
    found = [*_token()]
    folder = session.folder()
    if folder is not None:
        found += _session(folder)
    if is_behind_haproxy():
        found += [*_haproxy_sockets(), *_haproxy_ports()]
    return found


def is_open_to_others(path: Path, rights: int) -> bool:
    """Whether other users have such rights (stat.S_IROTH, S_IWOTH) to it, and may pass every folder above."""
    try:
        real = path.resolve(strict=True)
        return bool(real.stat().st_mode & rights) and all(
            folder.stat().st_mode & stat.S_IXOTH for folder in real.parents
        )
    except OSError:
        # not there, or not even for us
        return False


def _token() -> Iterator[Exposure]:
    if os.environ.get("RAY_AUTH_MODE") == "disabled":
        return
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if is_open_to_others(file, stat.S_IROTH | stat.S_IWOTH):
        yield Exposure(f"other users can read Ray's token, which allows everything: {file}", f"chmod 600 {file}")


def _session(folder: Path) -> Iterator[Exposure]:
    if is_open_to_others(folder, stat.S_IWOTH):
        yield Exposure(
            f"other users can change files of Ray's session: {folder}",
            "start Ray with RAY_TMPDIR set to a folder of mode 0700",
        )


def _haproxy_sockets() -> Iterator[Exposure]:
    socket = Path(os.environ.get("RAY_SERVE_HAPROXY_SOCKET_PATH") or _HAPROXY_SOCKET)
    # each node has a folder of its own beside it
    for path in (socket, *socket.parent.glob(f"*/{socket.name}")):
        if is_open_to_others(path, stat.S_IWOTH):
            yield Exposure(
                f"other users can redirect requests, and so receive tokens, by HAProxy's socket: {path}",
                "set RAY_SERVE_HAPROXY_SOCKET_PATH to a file in a folder of mode 0700",
            )


def _haproxy_ports() -> Iterator[Exposure]:
    ports = {int(os.environ.get(name) or port) for name, port in _HAPROXY_PORTS.items()}
    # some systems show other users' sockets to an administrator alone
    with suppress(psutil.AccessDenied):
        listening = {
            connection.laddr.port
            for connection in psutil.net_connections("tcp")
            if connection.laddr and connection.status == psutil.CONN_LISTEN and connection.laddr.ip in _EVERYWHERE
        }
        for port in sorted(ports & listening):
            yield Exposure(
                f"HAProxy's statistics listen on every interface: port {port}",
                f"block port {port} by the firewall of this machine",
            )
