"""Ray's private tables: the GCS's tables of workers, actors and draining nodes, which no public call reads without the
dashboard.

What is private of Ray's tables is used here and nowhere else, and imported when it is first read: a Ray that has moved
it answers "not known" here, and everything else of SeedCore works. The functions block; call them through
`lookup.in_thread`.
"""

from __future__ import annotations

import logging
import re
from datetime import UTC, datetime
from typing import Any, NamedTuple

import ray
from ray.exceptions import RayError

from seedcore.core.causes import Cause, CauseKind
from seedcore.core.errors import DirectoryUnavailableError, first_line
from seedcore.core.text import shown

logger = logging.getLogger(__name__)

_MAX_EXPLANATION_CHARS = 500
_NOT_IN_A_LINE = re.compile(r"\x1b\[[0-9;]*m|[\x00-\x1f\x7f\ud800-\udfff]+")
_MOVED = (ImportError, AttributeError, TypeError, ValueError)


class WorkerEnd(NamedTuple):
    """The end of a worker: the name of its type in Ray (WorkerExitType), and Ray's text."""

    kind: str
    detail: str


NOT_KNOWN = WorkerEnd("SYSTEM_ERROR", "")
"""As Ray records a worker of whose end it knows no more than that its process is gone."""


def worker_end(worker_id: str) -> WorkerEnd | None:
    """How a worker ended, NOT_KNOWN where its table has no row or cannot be read; None while Ray takes it for alive.

    This table alone knows the end of a process of an actor that Ray restarts.
    """
    try:
        from ray.core.generated import common_pb2, gcs_pb2

        found = _accessor().get_worker_info(ray.WorkerID(bytes.fromhex(worker_id)))
        if found is None:
            return NOT_KNOWN
        row = gcs_pb2.WorkerTableData.FromString(found)
        if row.is_alive:
            return None
        return WorkerEnd(common_pb2.WorkerExitType.Name(row.exit_type), row.exit_detail)
    except _MOVED as error:
        logger.debug("Ray's worker table is not read: %r", error)
        return NOT_KNOWN


def newest_actor(name: str, namespace: str) -> str:
    """What Ray knows of the newest actor of that name, living or dead, in one line."""
    try:
        from ray.core.generated import gcs_pb2

        states = gcs_pb2.ActorTableData
        rows = map(states.FromString, _accessor().get_actor_table(None, None))
        newest = max(
            (row for row in rows if (row.name, row.ray_namespace) == (name, namespace)),
            key=lambda row: row.timestamp,
            default=None,
        )
        if newest is None:
            return f"Ray knows no actor of that name in namespace {namespace!r}"
        if newest.state in {states.DEPENDENCIES_UNREADY, states.PENDING_CREATION}:
            wanted = ", ".join(f"{name}: {amount:g}" for name, amount in sorted(newest.required_resources.items()))
            return f"Ray has not started its actor yet: no node has room for it ({wanted or 'it needs no resources'})"
        if newest.state != states.DEAD:
            return "Ray has an actor of that name, which does not report to the registry"
        return f"Ray remembers an actor of that name, which has died: {_death_of(newest.death_cause)}"
    except _MOVED as error:
        logger.debug("Ray's actor table is not read: %r", error)
        return "nor is it known whether Ray has an actor of that name: its actor table cannot be read"


def draining_nodes(timeout_s: float) -> dict[str, datetime | None]:
    """The ids of the nodes that Ray drains, with the deadline of each, None where it has none.

    Raises DirectoryUnavailableError where the GCS does not answer in time, or Ray has moved the table. The call of the
    same name in `ray._private.state` would abort this process at an answer that is an error.
    """
    try:
        from ray._private.worker import global_worker

        found: dict[str, int] = global_worker.gcs_client.get_draining_nodes(timeout=timeout_s)
        return {node_id: _deadline(at_ms) for node_id, at_ms in found.items()}
    except RayError as error:
        raise DirectoryUnavailableError(first_line(error)) from error
    except _MOVED as error:
        raise DirectoryUnavailableError(f"this version of Ray keeps them elsewhere ({error!r})") from error


def _deadline(at_ms: int) -> datetime | None:
    try:
        return datetime.fromtimestamp(at_ms / 1000, UTC) if at_ms > 0 else None
    except (OverflowError, ValueError, OSError):
        # as good as none: the autoscaler may send the last millisecond there is
        return None


def explained(end: WorkerEnd) -> Cause | None:
    """The cause of the end of a worker, its detail in one line; None if a signal or an exit code explains as much. Of
    kind `unknown`: Ray has words for it and no kind."""
    kind, detail = end
    if kind == "NODE_OUT_OF_MEMORY":
        return Cause(CauseKind.OUT_OF_MEMORY, "Ray killed it because its node ran low on memory")
    if kind == "SYSTEM_ERROR" or not detail.strip():
        return None
    text, _, traceback = detail.partition("Traceback:")
    if kind != "USER_ERROR":
        return Cause(CauseKind.UNKNOWN, _in_a_line(f"Ray reports: {text}"))
    # frames are indented; the exception stands behind the last of them
    lines = [line for line in traceback.splitlines() if line.strip()]
    behind = len(lines)
    while behind > 0 and not lines[behind - 1].startswith((" ", "\t")):
        behind -= 1
    exception = lines[behind] if behind < len(lines) else text
    return Cause(CauseKind.START_FAILED, _in_a_line(exception) or None)


def _death_of(cause: Any) -> str:
    if cause.HasField("creation_task_failure_context"):
        text = cause.creation_task_failure_context.formatted_exception_string
        why = explained(WorkerEnd("USER_ERROR", f"Traceback: {text}")) if text else None
        return str(why if why is not None else Cause(CauseKind.START_FAILED))
    return _in_a_line(cause.actor_died_error_context.error_message) or "Ray gives no reason"


def _accessor() -> Any:
    from ray._private.state import state

    return state._connect_and_get_accessor()


def _in_a_line(text: str) -> str:
    return shown(" ".join(_NOT_IN_A_LINE.sub(" ", text).split())[:_MAX_EXPLANATION_CHARS])
