"""The limits that every value keeps, and their checks: each returns the value or raises InvalidInputError."""

from __future__ import annotations

import ipaddress
import json
import math
import re
import uuid
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from enum import StrEnum
from sys import intern
from typing import Any, TypeAlias, TypeVar
from unicodedata import category

from seedcore.core.causes import Cause, CauseKind
from seedcore.core.errors import InvalidInputError
from seedcore.core.holds import Hold, HoldKind
from seedcore.core.lifecycle import Status
from seedcore.core.text import first_unfit

Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"


T = TypeVar("T")
E = TypeVar("E", bound=StrEnum)


NOTHING: Mapping[str, Any] = {}
"""The labels, metadata and endpoints of instances without any: one object for all of them, which is never changed."""


MAX_ID_CHARS = 255
MAX_EPOCH_CHARS = 128
MAX_TEXT_CHARS = 1024
MAX_REASON_CHARS = 512
MAX_LABELS = 64
MAX_LABEL_KEY_CHARS = 63
MAX_LABEL_VALUE_CHARS = 255
MAX_METADATA_BYTES = 16 * 1024
MAX_ENDPOINTS = 16
MAX_URL_CHARS = 2048
MAX_METADATA_DEPTH = 32
MAX_KEPT_S = 100 * 365 * 86_400.0
MAX_PAGE = 1000
MAX_LISTED = 5000
"""The largest page of live instances that the registry itself returns."""
MAX_LEASE_S = 86_400
MAX_DRAIN_S = 365 * 86_400
MAX_AGE_S = 1e9
_NEVER_STORED = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")
_NEVER_IN_TEXT = re.compile(r"[\x00\ud800-\udfff]")
_SURROGATE = re.compile(r"[\ud800-\udfff]")
# schema/0004_registering.sql has the same
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://(\[[0-9A-Fa-f:.]+\]|[^\s/?#@:\[\]\\]+)(:[0-9]{1,5})?([/?#]\S*)?")
_USER_INFO = re.compile(r"[^:/?#]*://[^/?#]*@")
_MAX_PORT = 65_535
_FIRST_TIME = datetime(1, 1, 2, tzinfo=UTC)
_LAST_TIME = datetime(9999, 12, 30, tzinfo=UTC)


def one_object(text: str | None) -> str | None:
    """The same text, interned: what many instances have in common is in memory once."""
    return None if text is None else intern(text)


def check_instance_id(value: str) -> str:
    """The canonical form of a UUID, or InvalidInputError."""
    try:
        canonical = str(uuid.UUID(value))
    except (ValueError, AttributeError, TypeError):
        raise InvalidInputError("instance_id", f"must be a UUID, not {_shown(value)}") from None
    if canonical != value:
        raise InvalidInputError("instance_id", f"must be a UUID in lower case with dashes, not {_shown(value)}")
    return value


def check_kind(name: str, value: T, kind: type[Any] | tuple[type[Any], ...]) -> T:
    """The value, or InvalidInputError where it is of another kind."""
    if not isinstance(value, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        wanted = " or ".join(one.__name__ for one in kinds)
        raise InvalidInputError(name, f"must be of type {wanted}, not {type(value).__name__}")
    return value


def check_text(name: str, value: str, max_chars: int) -> str:
    """Refuse what is not a string, empty, too long, or has characters that a name cannot have."""
    _check_length(name, value, max_chars)
    char = first_unfit(value)
    if char is not None and category(char) == "Cc":
        raise InvalidInputError(name, "must not contain NUL or control characters")
    if char is not None:
        raise InvalidInputError(name, f"must not contain invisible or unassigned characters: U+{ord(char):04X}")
    return value


def check_key(name: str, value: str) -> str:
    """A text to search for, or InvalidInputError. Older rows may have names that a new row cannot have."""
    _check_length(name, value, MAX_ID_CHARS)
    if _NEVER_STORED.search(value):
        raise InvalidInputError(name, "must not contain NUL or control characters, or broken Unicode")
    return value


def _check_length(name: str, value: str, max_chars: int) -> None:
    if not isinstance(value, str):
        raise InvalidInputError(name, f"must be text, not {type(value).__name__}")
    if not value or not value.strip():
        raise InvalidInputError(name, "must not be empty")
    if len(value) > max_chars:
        raise InvalidInputError(name, f"must have at most {max_chars} characters, not {len(value)}")


def check_logical_id(value: str) -> str:
    """A legal logical id, or InvalidInputError."""
    if check_text("logical_id", value, MAX_ID_CHARS) in {".", ".."}:
        raise InvalidInputError("logical_id", f"must not be {value!r}: no URL can name it")
    return value


def check_epoch(value: str) -> str:
    """A legal epoch name, or InvalidInputError."""
    return check_text("cluster_epoch", value, MAX_EPOCH_CHARS)


def check_status(value: Status | str) -> Status:
    """A Status from its name, or InvalidInputError listing the legal ones."""
    return check_choice("status", Status, value)


def check_choice(field: str, choices: type[E], value: Any) -> E:
    """The member of an enumeration with this value, or InvalidInputError listing the legal ones."""
    try:
        return choices(value)
    except ValueError:
        legal = ", ".join(choice.value for choice in choices)
        raise InvalidInputError(field, f"must be one of {legal}, not {_shown(value)}") from None


def check_reason(value: str | None) -> str | None:
    """Why an operator does something: a short free text, None for none, or InvalidInputError."""
    return None if value is None else check_text("reason", value, MAX_REASON_CHARS)


def check_statuses(values: Sequence[Status | str] | None) -> frozenset[Status] | None:
    """The statuses of a list of names, None for any, or InvalidInputError."""
    if values is None:
        return None
    if not isinstance(values, (list, tuple, set, frozenset)):
        raise InvalidInputError("statuses", f"must be a list of statuses, not {_shown(values)}")
    return frozenset(check_status(value) for value in values)


def check_detail(value: str | None) -> str | None:
    """What an agent reports as the reason of its status: a short free text, None for none, or InvalidInputError."""
    return None if value is None else check_text("reason", value, MAX_TEXT_CHARS)


def check_cause(value: Cause | None) -> Cause | None:
    """A cause that can be stored, or InvalidInputError. Its words may have any form: exceptions have several lines."""
    if value is not None:
        check_kind("cause", value, Cause)
        check_kind("cause", value.kind, CauseKind)
        _check_storable("cause", value.detail, MAX_TEXT_CHARS)
        _check_storable("cause", value.by, MAX_ID_CHARS)
    return value


def check_hold(value: Hold) -> Hold:
    """A hold that can be stored, or InvalidInputError."""
    check_kind("hold", value, Hold)
    check_kind("hold", value.kind, HoldKind)
    _check_storable("reason", value.reason, MAX_TEXT_CHARS)
    _check_storable("by", value.by, MAX_ID_CHARS)
    _check_time("since", value.since)
    if value.expires_at is not None:
        _check_time("expires_at", value.expires_at)
    return value


def _check_time(name: str, value: datetime) -> None:
    if check_kind(name, value, datetime).tzinfo is None:
        raise InvalidInputError(name, "must have a time zone")
    if not _FIRST_TIME <= value <= _LAST_TIME:
        raise InvalidInputError(name, f"must be in the years 1 to 9999, not {value}")


def check_age(value: float) -> float:
    """How many seconds ago something happened, or InvalidInputError."""
    if type(value) not in {int, float} or not 0 <= value <= MAX_AGE_S:
        raise InvalidInputError("age_s", f"must be from 0 to {MAX_AGE_S:g} seconds, not {value!r}")
    return value


def _check_storable(name: str, value: str | None, max_chars: int) -> None:
    if value is None:
        return
    if len(check_kind(name, value, str)) > max_chars or _NEVER_IN_TEXT.search(value):
        raise InvalidInputError(name, f"must be Unicode text of at most {max_chars} characters, without NUL")


def check_seq(value: int | None) -> int | None:
    """A sequence number that fits a bigint, or InvalidInputError."""
    if value is not None and not (type(value) is int and 0 <= value < 2**63):
        raise InvalidInputError("seq", f"must be a whole number from 0 to 2^63-1, not {_shown(value)}")
    return value


def check_load(value: float) -> float:
    """A load: any finite number from 0, or InvalidInputError."""
    if type(value) not in {int, float} or not 0 <= value < math.inf:
        raise InvalidInputError("load", f"must be a finite number from 0, not {_shown(value)}")
    return value


def check_timeout(timeout_s: float | None) -> float | None:
    """Seconds to wait, None for as long as it takes, or InvalidInputError."""
    if timeout_s is None:
        return None
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, (int, float)):
        raise InvalidInputError("timeout_s", f"must be a number of seconds, not {type(timeout_s).__name__}")
    if math.isnan(timeout_s) or timeout_s < 0:
        raise InvalidInputError("timeout_s", f"must be 0 seconds or more, not {timeout_s:g}")
    return timeout_s


def check_beats(instance_ids: Sequence[str], loads: Mapping[str, float], limit: int) -> None:
    """Refuse beats that are no list of ids, or too many, and loads that are none, or of others."""
    if not isinstance(instance_ids, (list, tuple)) or len(instance_ids) > limit:
        raise InvalidInputError("instance_ids", f"must be a list of at most {limit} ids")
    if not all(isinstance(instance_id, str) for instance_id in instance_ids):
        raise InvalidInputError("instance_ids", "must be UUIDs as text")
    if not isinstance(loads, Mapping) or len(loads) > len(instance_ids):
        raise InvalidInputError("loads", "must be a mapping of some of the instance ids to their loads")
    for load in loads.values():
        check_load(load)


def check_duration_s(duration_s: float) -> float:
    """The seconds after which a drain expires, or InvalidInputError."""
    if type(duration_s) not in {int, float} or not 0 < duration_s <= MAX_DRAIN_S:
        raise InvalidInputError(
            "duration_s", f"must be above 0 and at most {MAX_DRAIN_S} seconds, not {_shown(duration_s)}"
        )
    return duration_s


def check_lease(lease_s: float) -> float:
    """A lease from just above nothing to a day, in seconds, or InvalidInputError."""
    if not 0 < lease_s <= MAX_LEASE_S:
        raise InvalidInputError("lease_s", f"must be above 0 and at most {MAX_LEASE_S} seconds, not {lease_s!r}")
    return lease_s


def check_labels(labels: Mapping[str, str]) -> None:
    """Refuse label sets that are too large or not plain text."""
    if not isinstance(labels, Mapping):
        raise InvalidInputError("labels", f"must be a mapping of text to text, not {type(labels).__name__}")
    if len(labels) > MAX_LABELS:
        raise InvalidInputError("labels", f"must have at most {MAX_LABELS} keys, not {len(labels)}")
    for key, value in labels.items():
        check_text("label key", key, MAX_LABEL_KEY_CHARS)
        if value != "":
            check_text(f"label {key!r}", value, MAX_LABEL_VALUE_CHARS)


def check_endpoints(endpoints: Mapping[str, str]) -> None:
    """Refuse endpoints that are too many, or that are not absolute URLs without a user and a password."""
    if not isinstance(endpoints, Mapping):
        raise InvalidInputError("endpoints", f"must be a mapping of names to URLs, not {type(endpoints).__name__}")
    if len(endpoints) > MAX_ENDPOINTS:
        raise InvalidInputError("endpoints", f"must be at most {MAX_ENDPOINTS}, not {len(endpoints)}")
    for name, url in endpoints.items():
        check_text("endpoint name", name, MAX_LABEL_KEY_CHARS)
        _check_url(f"endpoint {name!r}", check_text(f"endpoint {name!r}", url, MAX_URL_CHARS))


def _check_url(field: str, url: str) -> None:
    if _USER_INFO.match(url):
        # not shown: the error may be logged
        raise InvalidInputError(field, "must not contain a user or a password: every reader of the registry sees it")
    matched = _URL.fullmatch(url)
    if matched is None:
        example = "an absolute URL with a scheme and a host, such as http://10.0.0.3:8000"
        raise InvalidInputError(field, f"must be {example}, not {_shown(url)}")
    port = matched[2]
    if port is not None and int(port[1:]) > _MAX_PORT:
        raise InvalidInputError(field, f"must have a port of at most {_MAX_PORT}, not {port[1:]}")


def check_metadata(metadata: Mapping[str, Json]) -> None:
    if not isinstance(metadata, Mapping):
        raise InvalidInputError("metadata", f"must be a mapping, not {type(metadata).__name__}")
    _check_json(metadata, MAX_METADATA_DEPTH)
    try:
        text = json.dumps(metadata, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InvalidInputError("metadata", f"must be plain JSON: {error}") from None
    if len(text) > MAX_METADATA_BYTES:
        raise InvalidInputError("metadata", f"must be at most {MAX_METADATA_BYTES} bytes of JSON, not {len(text)}")


def _check_json(value: object, depth_left: int) -> None:
    """Refuse what json.dumps accepts but jsonb, or a reader of it, does not return unchanged."""
    if isinstance(value, str):
        if "\x00" in value or _SURROGATE.search(value):
            raise InvalidInputError("metadata", "must not contain NUL or broken Unicode")
    elif isinstance(value, (Mapping, list, tuple)):
        if depth_left == 0:
            raise InvalidInputError("metadata", f"must not be nested deeper than {MAX_METADATA_DEPTH} levels")
        if isinstance(value, Mapping):
            for key in value:
                if not isinstance(key, str):
                    raise InvalidInputError("metadata", f"must have text for keys, not {_shown(key)}")
                _check_json(key, depth_left)
        for child in value.values() if isinstance(value, Mapping) else value:
            _check_json(child, depth_left - 1)


def check_ip(value: str) -> None:
    # Python also accepts numbers and bytes as addresses; PostgreSQL accepts none with a zone ("%eth0")
    if not isinstance(value, str) or "%" in value or not _is_ip(value):
        raise InvalidInputError("ip_address", f"must be an IP address, not {_shown(value)}")


def _is_ip(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
