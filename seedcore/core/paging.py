"""Cursors: the position of the last row of a page, as opaque text that is safe in a URL."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterable
from datetime import UTC, datetime
from itertools import islice

from seedcore.core.errors import InvalidInputError
from seedcore.core.instances import Instance
from seedcore.core.limits import MAX_KEPT_S, MAX_PAGE, check_instance_id, check_key

_FIRST_ID = "00000000-0000-0000-0000-000000000000"
_LAST_ID = "ffffffff-ffff-ffff-ffff-ffffffffffff"
_START = ("", _FIRST_ID)


def first_page(rows: Iterable[Instance], limit: int) -> tuple[list[Instance], bool]:
    """Return up to `limit` rows, and whether there are more. Consumes at most `limit` + 1 rows."""
    found = list(islice(rows, limit + 1))
    return found[:limit], len(found) > limit


def encode_cursor(last: Instance) -> str:
    """Return the cursor that continues after `last`."""
    return _encode(last.logical_id, last.instance_id)


def encode_name_cursor(last_name: str) -> str:
    """Return the cursor that continues after all instances of `last_name`."""
    return _encode(last_name, _LAST_ID)


def _encode(logical_id: str, instance_id: str) -> str:
    text = json.dumps([logical_id, instance_id])
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def encode_death_cursor(last: Instance) -> str:
    """Return the cursor that continues with the deaths before that of `last`."""
    assert last.stopped_at is not None
    return _encode(last.stopped_at.isoformat(), last.instance_id)


def decode_death_cursor(cursor: str | None) -> tuple[datetime, str]:
    """Return the (stopped_at, instance_id) before which a page of deaths starts. Raises InvalidInputError."""
    if cursor is None:
        return datetime.max.replace(tzinfo=UTC), _LAST_ID
    at, instance_id = decode_cursor(cursor)
    try:
        stopped_at = datetime.fromisoformat(at)
    except ValueError:
        raise _foreign() from None
    if stopped_at.tzinfo is None:
        raise _foreign()
    return stopped_at, instance_id


def decode_cursor(cursor: str | None) -> tuple[str, str]:
    """Return the (logical_id, instance_id) after which a page starts. Raises InvalidInputError for a foreign cursor."""
    if cursor is None:
        return _START
    try:
        padded = cursor + "=" * (-len(cursor) % 4)
        key = json.loads(base64.urlsafe_b64decode(padded.encode("ascii")))
        logical_id, instance_id = key if isinstance(key, list) else []
        return check_key("logical_id", logical_id), check_instance_id(instance_id)
    except (ValueError, TypeError, AttributeError, RecursionError, binascii.Error):
        raise _foreign() from None


def _foreign() -> InvalidInputError:
    return InvalidInputError("cursor", "is not one that this API issued; start again without it")


def check_within_s(within_s: float | None) -> float | None:
    """Return a valid look-back span in seconds. Raises InvalidInputError."""
    if within_s is not None and not (type(within_s) in {int, float} and 0 < within_s <= MAX_KEPT_S):
        raise InvalidInputError("within_s", f"must be more than 0 and at most {MAX_KEPT_S:g} seconds, not {within_s!r}")
    return within_s


def check_limit(limit: int, most: int = MAX_PAGE) -> int:
    """Return a valid page size, at most `most`. Raises InvalidInputError."""
    if type(limit) is not int or not 1 <= limit <= most:
        raise InvalidInputError("limit", f"must be a whole number from 1 to {most}, not {limit!r}")
    return limit
