"""Limits of the values that agents and callers hand in."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import FrozenInstanceError, replace
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seedcore.core.answers import Answer, InstanceFilter, Listing, Origin
from seedcore.core.causes import Cause, CauseKind
from seedcore.core.changes import HoldChange, RegisterChange, Registration, new_instance_id
from seedcore.core.errors import InvalidInputError
from seedcore.core.holds import Hold, HoldKind
from seedcore.core.instances import Verdict
from seedcore.core.lifecycle import Status
from seedcore.core.limits import (
    MAX_ENDPOINTS,
    MAX_REASON_CHARS,
    check_age,
    check_cause,
    check_detail,
    check_endpoints,
    check_epoch,
    check_hold,
    check_instance_id,
    check_labels,
    check_reason,
    check_seq,
    check_status,
    check_text,
)
from tests.builders import START, iid, instance
from tests.endpoint_urls import BAD_ENDPOINTS, GOOD_URLS

GOOD = Registration(iid(1), "agent")
NAME_FIELDS = ["logical_id", "actor_name", "namespace", "actor_id", "organ_id", "node_id"]
BAD_TEXTS: list[Any] = ["", "   ", "\t", "x" * 256, "a\x00b", "a\nb", "a\x7fb", "a\ud800b", 7, b"bytes", ["list"], True]


def nested(depth: int) -> Any:
    value: Any = "leaf"
    for _ in range(depth):
        value = [value]
    return value


def refused(field: str, **details: Any) -> InvalidInputError:
    with pytest.raises(InvalidInputError) as caught:
        replace(GOOD, **details).validated()
    assert caught.value.field.startswith(field)
    return caught.value


def test_full_registration_is_taken_as_it_is() -> None:
    registration = Registration(
        instance_id=iid(1),
        logical_id="агент/été 7",
        actor_name="x" * 255,
        namespace="seedcore",
        actor_id="0f" * 16,
        serve_route="/" + "r" * 1023,
        organ_id="vision",
        labels={"k" * 63: "v" * 255, "empty": ""},
        metadata={"models": [{"name": "m", "size": 1.5, "loaded": True, "owner": None}]},
        node_id="node",
        ip_address="2001:db8::1",
        pid=2**31 - 1,
        cluster_epoch="e" * 128,
    )
    assert registration.validated() is registration


def test_registration_needs_no_more_than_two_ids() -> None:
    assert GOOD.validated() is GOOD


@pytest.mark.parametrize("field", NAME_FIELDS)
@pytest.mark.parametrize("value", BAD_TEXTS)
def test_bad_text_is_refused_in_every_name(field: str, value: Any) -> None:
    refused(field, **{field: value})


@pytest.mark.parametrize("value", ["", " ", "x" * 1025, "/a\x00", 7])
def test_bad_route_is_refused(value: Any) -> None:
    refused("serve_route", serve_route=value)


@pytest.mark.parametrize("value", ["", "x" * 129, "\x01", 7])
def test_bad_epoch_is_refused(value: Any) -> None:
    refused("cluster_epoch", cluster_epoch=value)
    with pytest.raises(InvalidInputError):
        check_epoch(value)


@pytest.mark.parametrize(
    "value",
    [
        "",
        "junk",
        iid(1)[:-1],
        iid(1) + "0",
        "A" + iid(1)[1:],
        iid(1).replace("-", ""),
        "{" + iid(1) + "}",
        "urn:uuid:" + iid(1),
        "\uff10" + iid(1)[1:],
        " " + iid(1),
        None,
        7,
        uuid.UUID(iid(1)),
        b"bytes",
    ],
)
def test_instance_id_must_be_a_canonical_uuid(value: Any) -> None:
    refused("instance_id", instance_id=value)
    with pytest.raises(InvalidInputError):
        check_instance_id(value)


def test_new_instance_ids_are_legal_and_differ() -> None:
    first, second = new_instance_id(), new_instance_id()
    assert first != second
    assert check_instance_id(first) == first


@pytest.mark.parametrize("value", [0, -1, 2**31, True, 1.0, "1"])
def test_bad_pid_is_refused(value: Any) -> None:
    refused("pid", pid=value)


@pytest.mark.parametrize("value", ["127.0.0.1", "::1", "::ffff:10.0.0.1"])
def test_good_address_is_taken(value: str) -> None:
    replace(GOOD, ip_address=value).validated()


@pytest.mark.parametrize(
    "value",
    ["", "localhost", "1.2.3", "1.2.3.4/24", "1.2.3.4:80", "fe80::1%eth0", "01.2.3.4", 5, b"\x7f\x00\x00\x01", True],
)
def test_address_that_the_database_would_refuse_is_refused(value: Any) -> None:
    refused("ip_address", ip_address=value)


@pytest.mark.parametrize(
    "labels",
    [
        None,
        [("k", "v")],
        {"": "v"},
        {" ": "v"},
        {7: "v"},
        {"k": 7},
        {"k": None},
        {"k": "  "},
        {"k" * 64: "v"},
        {"k": "v" * 256},
        {"k\x00": "v"},
        {"k": "v\x00"},
        {"k": "\udfff"},
        {f"k{n}": "v" for n in range(65)},
    ],
)
def test_bad_labels_are_refused(labels: Any) -> None:
    refused("label", labels=labels)
    with pytest.raises(InvalidInputError):
        check_labels(labels)
    with pytest.raises(InvalidInputError):
        InstanceFilter(labels=labels).validated()


@pytest.mark.parametrize("wrong", BAD_ENDPOINTS)
def test_bad_endpoints_are_refused_with_their_name_and_what_is_wrong(wrong: str) -> None:
    endpoints, why = BAD_ENDPOINTS[wrong]
    error = refused("endpoint", endpoints=endpoints)
    assert why in str(error)
    assert "secret" not in str(error)


@pytest.mark.parametrize("endpoints", [None, [], "http://h", {"http"}, 7])
def test_endpoints_that_are_no_mapping_are_refused(endpoints: Any) -> None:
    refused("endpoints", endpoints=endpoints)


def test_every_absolute_url_may_be_an_endpoint() -> None:
    for url in GOOD_URLS:
        check_endpoints({"http": url})
    check_endpoints(MappingProxyType({f"n{n}": "http://h" for n in range(MAX_ENDPOINTS)}))


def test_as_many_labels_as_the_limit_are_taken() -> None:
    check_labels(MappingProxyType({f"k{n}": "v" for n in range(64)}))


CYCLE: list[Any] = []
CYCLE.append(CYCLE)


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        ["list"],
        "text",
        {"k": {1, 2}},
        {"k": b"bytes"},
        {"k": object()},
        {"k": float("nan")},
        {"k": float("inf")},
        {"k": START},
        {"k": "\x00"},
        {"\x00": "v"},
        {"k": ["deep", {"deeper": "a\x00b"}]},
        {"k": "\ud800"},
        {7: "v"},
        {None: "v"},
        {True: "v"},
        {1.5: "v"},
        {("tuple",): "v"},
        {"k": {7: "v"}},
        {"k": CYCLE},
        {"k": nested(100)},
        {"k": nested(20_000)},
        {"k": "x" * (16 * 1024)},
        {"k": 10**5000},
    ],
)
def test_metadata_that_jsonb_cannot_hold_is_refused(metadata: Any) -> None:
    refused("metadata", metadata=metadata)


@given(
    st.dictionaries(
        st.text(st.characters(blacklist_characters="\x00", blacklist_categories=["Cs"]), max_size=5),
        st.recursive(
            st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False, allow_infinity=False),
            lambda child: st.lists(child, max_size=3) | st.dictionaries(st.sampled_from("abc"), child, max_size=3),
            max_leaves=8,
        ),
        max_size=4,
    )
)
def test_plain_json_is_taken(metadata: Mapping[str, Any]) -> None:
    replace(GOOD, metadata=metadata).validated()


@given(st.text())
def test_text_is_taken_or_refused_and_nothing_worse(value: str) -> None:
    try:
        taken = check_text("field", value, 10)
    except InvalidInputError:
        return
    assert taken == value
    assert 0 < len(value) <= 10


def test_refusal_shows_a_short_piece_of_a_long_value() -> None:
    assert len(str(refused("instance_id", instance_id="x" * 10_000))) < 200


@pytest.mark.parametrize("status", Status)
def test_status_is_read_from_its_name(status: Status) -> None:
    assert check_status(status.value) is status
    assert check_status(status) is status


@pytest.mark.parametrize("value", ["", "ALIVE", "zombie", None, 7, ["alive"]])
def test_refused_status_names_the_legal_ones(value: Any) -> None:
    with pytest.raises(InvalidInputError, match="must be one of starting, alive, draining, dead"):
        check_status(value)


@pytest.mark.parametrize("value", [None, 0, 1, 2**63 - 1])
def test_sequence_number_of_a_bigint_is_taken(value: int | None) -> None:
    assert check_seq(value) == value


@pytest.mark.parametrize("value", [-1, 2**63, True, 1.0, "1"])
def test_other_sequence_number_is_refused(value: Any) -> None:
    with pytest.raises(InvalidInputError, match=r"^seq: "):
        check_seq(value)


def test_reported_cause_is_optional_short_text() -> None:
    assert check_detail(None) is None
    assert check_detail("x" * 1024) == "x" * 1024
    for bad in ("", "  ", "x" * 1025, "a\x00b", 7):
        with pytest.raises(InvalidInputError, match=r"^reason: "):
            check_detail(bad)  # type: ignore[arg-type]


def test_reason_is_optional_short_text() -> None:
    assert check_reason(None) is None
    assert check_reason("x" * MAX_REASON_CHARS) == "x" * MAX_REASON_CHARS
    for bad in ("", "x" * (MAX_REASON_CHARS + 1), "two\nlines"):
        with pytest.raises(InvalidInputError, match=r"^reason: "):
            check_reason(bad)


def test_cause_is_one_that_the_database_can_store() -> None:
    # the words of an exception have several lines
    for good in (None, Cause(CauseKind.UNKNOWN), Cause(CauseKind.START_FAILED, "x\n" * 512, "y" * 255)):
        assert check_cause(good) is good
    bad: list[Any] = [
        "text",
        Cause("agent"),  # type: ignore[arg-type]
        Cause(CauseKind.AGENT, "x" * 1025),
        Cause(CauseKind.AGENT, "\x00"),
        Cause(CauseKind.AGENT, by="\ud800"),
        Cause(CauseKind.AGENT, by="x" * 256),
        Cause(CauseKind.AGENT, 7),  # type: ignore[arg-type]
    ]
    for cause in bad:
        with pytest.raises(InvalidInputError):
            check_cause(cause)


def test_hold_is_one_that_the_database_can_store() -> None:
    good = Hold(HoldKind.OPERATOR, "upkeep", "ann", START, START)
    assert check_hold(good) is good
    naive = datetime(2024, 1, 1)  # noqa: DTZ001
    bad: list[dict[str, Any]] = [
        {"kind": "operator"},
        {"reason": "x" * 1025},
        {"by": "x" * 256},
        {"since": naive},
        {"since": None},
        {"expires_at": naive},
        {"expires_at": datetime.max.replace(tzinfo=UTC)},
        {"since": datetime.min.replace(tzinfo=UTC)},
        {"expires_at": 7},
    ]
    for changes in bad:
        with pytest.raises(InvalidInputError):
            check_hold(replace(good, **changes))


@pytest.mark.parametrize("age_s", [-0.1, float("nan"), float("inf"), 1e10, True, "1", None])
def test_age_that_cannot_be_is_refused(age_s: Any) -> None:
    with pytest.raises(InvalidInputError, match=r"^age_s: "):
        check_age(age_s)


def test_hold_of_another_kind_than_its_change_is_refused() -> None:
    placed = Hold(HoldKind.NODE, None, None, START)
    assert HoldChange(iid(1), HoldKind.NODE, placed).validated().why == placed.cause
    with pytest.raises(InvalidInputError, match=r"^hold: must be of kind operator, not node"):
        HoldChange(iid(1), HoldKind.OPERATOR, placed).validated()


@pytest.mark.parametrize("field", ["organ_id", "logical_id", "epoch"])
@pytest.mark.parametrize("value", ["", "x" * 256, "\x00", 7])
def test_bad_filter_is_refused(field: str, value: Any) -> None:
    with pytest.raises(InvalidInputError):
        InstanceFilter(**{field: value}).validated()


def test_good_filter_is_taken_as_it_is() -> None:
    wanted = InstanceFilter(organ_id="o", logical_id="a", epoch="e", labels={"k": ""})
    assert wanted.validated() is wanted


@pytest.mark.parametrize(
    ("wanted", "matches"),
    [
        (InstanceFilter(), True),
        (InstanceFilter(statuses=None), True),
        (InstanceFilter(statuses=frozenset()), False),
        (InstanceFilter(statuses=frozenset({Status.DRAINING})), False),
        (InstanceFilter(organ_id="vision"), True),
        (InstanceFilter(organ_id="hearing"), False),
        (InstanceFilter(logical_id="agent"), True),
        (InstanceFilter(logical_id="agen"), False),
        (InstanceFilter(epoch="epoch-1"), True),
        (InstanceFilter(epoch="epoch-2"), False),
        (InstanceFilter(labels={"zone": "a"}), True),
        (InstanceFilter(labels={"zone": "a", "tier": "1"}), True),
        (InstanceFilter(labels={"zone": "b"}), False),
        (InstanceFilter(labels={"missing": ""}), False),
    ],
)
def test_filter_matches_its_fields(wanted: InstanceFilter, matches: bool) -> None:
    row = instance(organ_id="vision", labels={"zone": "a", "tier": "1"})
    assert wanted.matches(row, "epoch-1") is matches


def test_filter_without_an_epoch_wants_the_current_one() -> None:
    assert not InstanceFilter().matches(instance(), "epoch-2")


def test_listing_reads_as_a_sequence_of_its_items() -> None:
    rows = (instance(1), instance(2), instance(3))
    listing = Listing(rows, Origin.POSTGRES, START, version=1, complete=True)
    assert len(listing) == 3
    assert list(listing) == list(rows)
    assert listing[0] == rows[0]
    assert listing[-2:] == rows[-2:]
    assert rows[1] in listing
    assert list(reversed(listing)) == list(reversed(rows))


def test_values_cannot_be_changed() -> None:
    answer = Answer(1, Origin.RAY, START, 1, complete=False)
    with pytest.raises(FrozenInstanceError):
        answer.value = 2  # type: ignore[misc]


@pytest.mark.parametrize("name", [*Origin, *Verdict])
def test_names_read_as_their_values(name: Origin | Verdict) -> None:
    assert str(name) == name.value


def test_change_of_a_registration_is_of_its_instance() -> None:
    assert RegisterChange(GOOD).instance_id == iid(1)
