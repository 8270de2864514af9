"""What the registry does on the machine that runs it, each figure beside a baseline of the same run.

`run.py` runs them all; `seedcore bench` is its command. The figures depend on the machine, the ratios are promised.
"""

NAMES = ("ingest", "resolve", "propagation", "death", "restart", "http", "growth")
