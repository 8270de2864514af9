"""Records the release of this tree: python -m tests.releases"""

from __future__ import annotations

import seedcore
from seedcore.store.migrations import known_migrations
from tests.releases import record

record(seedcore.__version__, known_migrations())
