"""A data folder belongs to the registry of one Ray cluster at a time, while its process lives."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from seedcore.core.errors import StoreUnavailableError
from seedcore.store.embedded.claim import Claim

_HOLD = """
import sys, pathlib
from seedcore.store.embedded.claim import Claim
Claim(pathlib.Path(sys.argv[1])).take(sys.argv[2])
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def holder(folder: Path, ray_cluster: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(folder), ray_cluster],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_registry_of_another_cluster_is_refused_with_the_name_of_the_holder(tmp_path: Path) -> None:
    with holder(tmp_path, "blue") as process:
        for refused in (Claim(tmp_path).take, Claim(tmp_path).require_free_for):
            with pytest.raises(StoreUnavailableError, match=rf"\(pid {process.pid}, blue\).*SEEDCORE_DATA_DIR"):
                refused("green")


def test_second_process_of_the_same_cluster_is_accepted(tmp_path: Path) -> None:
    with holder(tmp_path, "blue"):
        Claim(tmp_path).take("blue")
        Claim(tmp_path).require_free_for("blue")


def test_killed_holder_releases_the_claim(tmp_path: Path) -> None:
    with holder(tmp_path, "blue") as process:
        process.kill()
        process.wait()
        Claim(tmp_path).require_free_for("green")
        mine = Claim(tmp_path)
        mine.take("green")
        mine.take("green")
        with pytest.raises(StoreUnavailableError, match="green"):
            Claim(tmp_path).take("blue")


def test_unused_folder_is_free(tmp_path: Path) -> None:
    Claim(tmp_path / "never").require_free_for("blue")
    Claim(tmp_path).require_free_for("blue")
    assert list(tmp_path.iterdir()) == []
