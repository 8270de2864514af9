"""Benchmarks of the registry on this machine. Each figure is measured beside a baseline in the same run.

`run.py` runs them; the command is `seedcore bench`. The project promises the ratios; the figures depend on the machine.
"""

NAMES = (
    "ingest",
    "starts",
    "resolve",
    "propagation",
    "changes",
    "callers",
    "memory",
    "death",
    "restart",
    "listing",
    "http",
    "growth",
    "peers",
)
ONLY_IF_NAMED = frozenset({"peers"})
"""It needs another program, and promises nothing."""
