"""The memory of a registry stays within its bound, whatever the metadata of its instances are."""

from __future__ import annotations

import json
import sys

import pytest

from tests.children import run
from tests.faults.filling import SHAPES

pytestmark = pytest.mark.slow

LIMIT_MIB = 64
# buffers that are held for a moment, and what the allocator keeps
MARGIN_MIB = 48


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != "none"])
def test_process_of_a_full_registry_uses_no_more_than_its_bound(shape: str) -> None:
    done = run(
        sys.executable, "-m", "tests.faults.filling", "--mib", str(LIMIT_MIB), "--shape", shape,
        timeout_s=150.0, check=True,
    )  # fmt: skip
    found = json.loads(done.stdout.splitlines()[-1])
    assert "raise SEEDCORE_MAX_INSTANCES_MIB" in found["refusal"]
    # what waited for its commit counted too when the warning was given
    assert 0.75 <= found["warned_at"] < 1.0
    assert found["goes_on"]
    assert found["rss_mib"] <= LIMIT_MIB + MARGIN_MIB
    # nor is it refused long before
    assert found["rss_mib"] >= LIMIT_MIB / 2
