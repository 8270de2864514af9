"""Cursors and page sizes."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from seedcore.core.errors import InvalidInputError
from seedcore.core.limits import MAX_ID_CHARS, MAX_PAGE
from seedcore.core.paging import check_limit, decode_cursor, encode_cursor, encode_name_cursor
from tests.builders import iid, instance

NAMES = st.text(st.characters(blacklist_categories=["Cc", "Cs"]), min_size=1, max_size=MAX_ID_CHARS).filter(
    lambda text: bool(text.strip())
)


def forged(value: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")


@given(NAMES, st.uuids().map(str))
def test_cursor_decodes_to_the_row_it_was_made_from(logical_id: str, instance_id: str) -> None:
    cursor = encode_cursor(replace(instance(), logical_id=logical_id, instance_id=instance_id))
    assert decode_cursor(cursor) == (logical_id, instance_id)
    assert re.fullmatch(r"[A-Za-z0-9_-]+", cursor)


@given(NAMES, st.uuids().map(str))
def test_cursor_of_a_name_sorts_after_all_its_instances(logical_id: str, instance_id: str) -> None:
    assert decode_cursor(encode_name_cursor(logical_id)) >= (logical_id, instance_id)


@given(NAMES, NAMES)
def test_cursors_sort_like_their_names(first: str, second: str) -> None:
    keys = decode_cursor(encode_name_cursor(first)), decode_cursor(encode_name_cursor(second))
    assert (keys[0] < keys[1]) == (first < second)


def test_listing_without_a_cursor_starts_at_the_first_row() -> None:
    assert decode_cursor(None) < ("\x01", "00000000-0000-0000-0000-000000000000")
    assert decode_cursor(None)[0] == ""


@given(st.text())
@example("")
@example("=")
@example("A")
@example("not base64 at all!")
@example("\ud800")
@example("é")
@example(forged([]))
@example(forged(["agent"]))
@example(forged(["agent", iid(1), "more"]))
@example(forged({"agent": 1, iid(1): 2}))
@example(forged(["", iid(1)]))
@example(forged(["agent", iid(1).upper() + "A"]))
@example(forged(["agent", None]))
@example(forged([None, iid(1)]))
@example(forged([["agent"], iid(1)]))
@example(forged(["a\x00b", iid(1)]))
@example(forged(["a" * (MAX_ID_CHARS + 1), iid(1)]))
@example(forged(7))
@example(base64.urlsafe_b64encode(b"[" * 100_000).decode())
@example(base64.urlsafe_b64encode(b"\xff\xfe").decode())
@example(base64.urlsafe_b64encode(b"1" * 10_000).decode())
def test_junk_cursor_raises_invalid_input(junk: str) -> None:
    with pytest.raises(InvalidInputError, match=r"^cursor: "):
        decode_cursor(junk)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda child: st.lists(child, max_size=3)))
def test_forged_cursor_is_refused_unless_it_names_a_row(value: object) -> None:
    with pytest.raises(InvalidInputError):
        decode_cursor(forged(value))


@pytest.mark.parametrize("junk", [7, b"bytes", ["list"], 1.5])
def test_cursor_of_another_type_is_refused(junk: Any) -> None:
    with pytest.raises(InvalidInputError):
        decode_cursor(junk)


@pytest.mark.parametrize("limit", [1, 2, MAX_PAGE])
def test_page_size_within_bounds_is_accepted(limit: int) -> None:
    assert check_limit(limit) == limit


@pytest.mark.parametrize("limit", [0, -1, MAX_PAGE + 1, True, 1.0, "10", None])
def test_page_size_out_of_bounds_is_refused(limit: Any) -> None:
    with pytest.raises(InvalidInputError, match=r"^limit: "):
        check_limit(limit)
