"""Rows and values name the same things: tests/postgres/test_columns.py compares them with the database."""

from __future__ import annotations

from dataclasses import fields
from datetime import UTC, datetime

from seedcore.core.causes import Cause, CauseKind
from seedcore.core.changes import RegisterChange, Registration
from seedcore.core.dependencies import Dependency
from seedcore.core.holds import Hold, HoldKind
from seedcore.core.instances import Instance, Transition
from seedcore.core.rules import first_registration
from seedcore.discovery.api import InstanceOut, TransitionOut
from seedcore.store.rows import InstanceRow, instance_of
from tests.builders import START, iid

# what the registry needs to order changes and to recognise a process; it means nothing to a client of HTTP
NOT_SHOWN = {"seq", "process_key", "dependencies"}
LATER = datetime(2024, 1, 2, tzinfo=UTC)
ROW = InstanceRow(
    instance_id=iid(1),
    logical_id="agent",
    status="draining",
    reported_status="alive",
    holds={
        "operator": {"reason": "upkeep", "by": "ann", "since": START.isoformat(), "expires_at": LATER.isoformat()},
        "node": {"reason": None, "by": None, "since": "2024-01-01T09:00:00+09:00", "expires_at": None},
    },
    cluster_epoch="epoch",
    started_at=datetime(2024, 2, 1, tzinfo=UTC),
    status_changed_at=datetime(2024, 2, 2, tzinfo=UTC),
    last_heartbeat=datetime(2024, 2, 3, tzinfo=UTC),
    stopped_at=datetime(2024, 2, 4, tzinfo=UTC),
    seq=7,
    cause_kind="out_of_memory",
    cause_detail="of its node",
    cause_by="bob",
    actor_name="actor",
    namespace="namespace",
    actor_id="actor id",
    serve_route="/route",
    organ_id="organ",
    labels={"a": "b"},
    metadata={"c": 1},
    endpoints={"http": "http://10.0.0.1:8000"},
    node_id="node",
    ip_address="10.0.0.1",
    pid=9,
    process_key="key",
    dependencies=[{"name": "vllm", "pid": 7, "process_key": "its key", "is_fatal": False, "stderr_path": None}],
)
HOLDS = (
    Hold(HoldKind.NODE, None, None, START),
    Hold(HoldKind.OPERATOR, "upkeep", "ann", START, LATER),
)


def test_every_column_becomes_the_field_of_the_value_with_its_name() -> None:
    value = instance_of(ROW)
    decoded = {name: getattr(value, name) for name in InstanceRow._fields if not name.startswith("cause_")}
    assert decoded == {
        **{name: given for name, given in ROW._asdict().items() if not name.startswith("cause_")},
        "holds": HOLDS,
        "dependencies": (Dependency("vllm", 7, "its key", is_fatal=False),),
    }
    assert value.cause == Cause(CauseKind.OUT_OF_MEMORY, "of its node", "bob")
    of_the_row = {name for name in InstanceRow._fields if not name.startswith("cause_")} | {"cause"}
    assert {field.name for field in fields(Instance)} == of_the_row


def test_http_shows_every_field_of_an_instance_and_of_a_transition() -> None:
    assert set(InstanceOut.model_fields) == {field.name for field in fields(Instance)} - NOT_SHOWN | {"verdict"}
    assert set(TransitionOut.model_fields) == {field.name for field in fields(Transition)} - {"logical_id"}


def test_columns_that_a_newer_schema_appends_are_left_out() -> None:
    assert instance_of((*ROW, "more")) == instance_of(ROW)


def test_row_without_holds_or_cause_has_none() -> None:
    value = instance_of(ROW._replace(holds={}, cause_kind=None, cause_detail=None, cause_by=None))
    assert (value.holds, value.cause) == ((), None)


def test_what_another_program_wrote_as_a_dependency_and_is_none_is_left_out() -> None:
    given = [7, {}, {"name": "x"}, {**ROW.dependencies[0], "pid": "7"}, {**ROW.dependencies[0], "more": 1}]
    value = instance_of(ROW._replace(dependencies=[*given, ROW.dependencies[0]]))  # type: ignore[list-item]
    assert value.dependencies == (Dependency("vllm", 7, "its key", is_fatal=False),)


def test_cause_of_another_program_without_a_kind_is_unknown() -> None:
    assert instance_of(ROW._replace(cause_kind=None)).cause == Cause(CauseKind.UNKNOWN, "of its node", "bob")


def test_every_field_of_a_registration_is_one_of_the_instance() -> None:
    given = Registration(
        iid(1),
        "agent",
        *("actor", "ns", "a1", "/r", "organ", {"a": "b"}, {"c": 1}, "node", "10.0.0.1", 9, "key"),
        endpoints={"http": "http://10.0.0.1:8000"},
    )
    value = first_registration(RegisterChange(given), "epoch", START)
    for field in fields(Registration):
        if field.name not in {"cluster_epoch", "started_epoch"}:
            assert getattr(given, field.name) is not None
            assert getattr(value, field.name) == getattr(given, field.name), field.name
