"""What Ray Serve knows of its HAProxy: variables, ports, paths."""

from __future__ import annotations

import re
from pathlib import Path

from ray.serve._private import constants

ENABLED = "RAY_SERVE_ENABLE_HA_PROXY"
PUBLIC = 8000
# beside the public port, and those of the replicas
PORTS = frozenset(
    {
        constants.RAY_SERVE_HAPROXY_STATS_PORT,
        constants.RAY_SERVE_HAPROXY_METRICS_PORT,
        constants.RAY_SERVE_FALLBACK_PROXY_HTTP_PORT,
    }
)
REPLICAS = range(constants.RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT, constants.RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT + 1)
SOCKET = Path(constants.RAY_SERVE_HAPROXY_SOCKET_PATH)
NODE_ID_CHARS = 56
MAX_SOCKET_CHARS = 97


def variables_of_serve() -> set[str]:
    """The variables that Serve reads."""
    return set(re.findall(r'"(RAY_SERVE_\w+)"', Path(constants.__file__).read_text()))
