"""A Ray that has moved its private tables costs SeedCore what they know, and nothing else."""

from __future__ import annotations

import json
import os
import sys

import pytest

from seedcore.core.causes import Cause, CauseKind
from seedcore.registry.ray_support.private_tables import NOT_KNOWN, WorkerEnd, explained
from tests.children import run
from tests.versions import ROOT

# None in sys.modules: an import of it raises ImportError, as that of a module that is gone
MOVED = """
import asyncio, json, sys
import ray
for name in ("ray._private.state", "ray.core.generated", "ray.core.generated.gcs_pb2", "ray.core.generated.common_pb2"):
    sys.modules[name] = None
import seedcore.registry
from seedcore.registry.ray_support import session
from seedcore.core.errors import DirectoryUnavailableError
from seedcore.registry.ray_support.lookup import draining_nodes, ray_remembers, why_worker_ended
connection = ray
session.ray_connection = lambda: connection
async def drained():
    try:
        return str(await draining_nodes(5.0))
    except DirectoryUnavailableError as error:
        return error.why
async def all_of_them():
    return [await why_worker_ended("00" * 28, 5.0), await ray_remembers("agent", "seedcore", 5.0), await drained()]
print(json.dumps(asyncio.run(all_of_them())))
"""


def test_without_rays_private_modules_everything_is_imported_and_what_they_know_is_not_known() -> None:
    ended = run(sys.executable, "-c", MOVED, cwd=ROOT, env=dict(os.environ), timeout_s=60)
    assert ended.returncode == 0, ended.stderr
    why, remembered, drained = json.loads(ended.stdout)
    assert why is None
    assert "cannot be read" in remembered
    assert drained.startswith("this version of Ray keeps them elsewhere")


@pytest.mark.parametrize(
    ("end", "cause"),
    [
        (NOT_KNOWN, None),
        (WorkerEnd("SYSTEM_ERROR", "a signal"), None),
        (WorkerEnd("INTENDED_USER_EXIT", " "), None),
        (
            WorkerEnd("NODE_OUT_OF_MEMORY", "anything"),
            Cause(CauseKind.OUT_OF_MEMORY, "Ray killed it because its node ran low on memory"),
        ),
        (
            WorkerEnd("INTENDED_SYSTEM_EXIT", "killed\x1b[0m by\n the  raylet"),
            Cause(CauseKind.UNKNOWN, "Ray reports: killed by the raylet"),
        ),
        (
            WorkerEnd("USER_ERROR", "text Traceback: most recent\n  File a\n    line\nValueError: no\nNOTE: more"),
            Cause(CauseKind.START_FAILED, "ValueError: no"),
        ),
        (WorkerEnd("USER_ERROR", "no traceback"), Cause(CauseKind.START_FAILED, "no traceback")),
        (WorkerEnd("USER_ERROR", "Traceback: "), Cause(CauseKind.START_FAILED)),
    ],
)
def test_end_of_a_worker_has_a_kind_and_one_plain_line(end: WorkerEnd, cause: Cause | None) -> None:
    assert explained(end) == cause


def test_long_text_of_ray_is_cut() -> None:
    cause = explained(WorkerEnd("USER_ERROR", "x Traceback: f\n  File 1\n" + "E" * 2000))
    assert cause is not None
    assert cause.detail == "E" * 500
