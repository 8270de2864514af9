"""`seedcore bench ingest`: beats committed through the real actor, compared with a floor and a ceiling.

python tests/bench/ingest.py [--quick] [--dsn DSN] [--json FILE]
"""

from __future__ import annotations

import sys

from seedcore.cli import main

if __name__ == "__main__":
    sys.argv = ["seedcore", "bench", "ingest", *sys.argv[1:]]
    main()
