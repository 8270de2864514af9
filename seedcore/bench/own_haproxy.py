"""An HAProxy of Serve beside those of other clusters on this machine: files, ports, and no wait at its end."""

from __future__ import annotations

import tempfile
from contextlib import AbstractContextManager

from seedcore.bench.environment import free_ports

# HAProxy accepts at most 97 characters for the path of a socket, of which Serve takes 56 for the node's id
_SHORT = "/tmp"  # noqa: S108 - TMPDIR may be long


def haproxy_folder() -> AbstractContextManager[str]:
    """A new folder for its files, removed at the end."""
    return tempfile.TemporaryDirectory(prefix="ha", dir=_SHORT, ignore_cleanup_errors=True)


def own_haproxy(folder: str) -> dict[str, str]:
    """The environment of the nodes. It does not enable HAProxy."""
    metrics, stats, fallback = free_ports(3)
    return {
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{folder}/haproxy.cfg",
        "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{folder}/admin.sock",
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": f"{folder}/metrics.sock",
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": folder,
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{folder}/state",
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "1",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
    }
