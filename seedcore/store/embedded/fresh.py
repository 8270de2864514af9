"""New folders beside the place that they are renamed to: what was interrupted never looks complete."""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path

_STILL_ENDING_S = 10.0
_POLL_S = 0.05


def fresh_beside(folder: Path) -> Path:
    """A new folder, to be renamed to `folder` when it is complete. Removes those of interrupted attempts."""
    for leftover in folder.parent.glob(f"{folder.name}.new-*"):
        remove_leftover(leftover)
    return Path(tempfile.mkdtemp(prefix=f"{folder.name}.new-", dir=folder.parent))


def remove_leftover(folder: Path, within_s: float = _STILL_ENDING_S) -> None:
    """Remove the folder of an interrupted attempt. A process of it may still be ending, and then writes and removes
    files there. Raises OSError if it goes on after `within_s` seconds."""
    ends_s = time.monotonic() + within_s
    while folder.exists():
        try:
            shutil.rmtree(folder)
        except OSError:
            if time.monotonic() > ends_s:
                raise
            time.sleep(_POLL_S)
