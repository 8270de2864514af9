"""Names have characters that can be seen, and what others wrote commands no terminal and disguises nothing."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unicodedata import category

import pytest
from hypothesis import given
from hypothesis import strategies as st

import seedcore.cli
from seedcore.cli import output, render
from seedcore.cli.output import Terminal
from seedcore.cli.why import reason_of
from seedcore.core.answers import InstanceFilter, Listing, Origin
from seedcore.core.causes import Cause, CauseKind
from seedcore.core.changes import Registration
from seedcore.core.errors import InvalidInputError
from seedcore.core.holds import Hold, HoldKind
from seedcore.core.instances import Transition, Verdict
from seedcore.core.lifecycle import Status
from seedcore.core.limits import (
    check_detail,
    check_epoch,
    check_key,
    check_labels,
    check_logical_id,
    check_reason,
    check_text,
)
from seedcore.core.paging import decode_cursor, encode_cursor
from seedcore.core.text import first_unfit, shown
from seedcore.discovery.api import InstancePage
from seedcore.discovery.rendering import agent_answer, page_of
from seedcore.discovery.tokens import Right, new_token
from seedcore.registry.protocol.messages import Description, Observed
from seedcore.settings import Settings
from tests.builders import START, iid, instance

UNFIT = [
    "\x1b",
    "\x7f",
    "\x85",
    "\x9b",
    "\x9d",
    "\xad",
    "\u061c",
    "\u180e",
    "\u200b",
    "\u200e",
    "\u200f",
    *map(chr, range(0x202A, 0x202F)),
    *map(chr, range(0x2060, 0x206A)),
    "\u2028",
    "\u2029",
    "\ufeff",
    "\ufff9",
    "\ufffe",
    "\uffff",
    "\ue000",
    "\ud800",
    "\udfff",
    "\u0378",
    "\U000e0001",
    "\U000e0041",
    "\U0001bca0",
    "\U0010ffff",
    "\U00100000",
]
FIT = [
    "агент/été 7",
    "نمی‌خواهم",
    "क्‍ष",
    "👩‍💻",
    "❤️‍🔥",
    "日本　語",
    "non breaking",
    "e\u0301",
    "ไทย",
]
HOSTILE = "a\x1b[31m\x9b2J\x9d0;owned\x9c\u202egnp\u2066x\u2069\ufeff\u200b\u2028z"


@pytest.mark.parametrize(
    "door",
    [
        lambda text: check_text("name", text, 100),
        check_logical_id,
        check_epoch,
        check_detail,
        check_reason,
        lambda text: check_labels({text: "value"}),
        lambda text: check_labels({"key": text}),
        lambda text: new_token(text, Right.READ),
        lambda text: Settings(node_id=text),
        lambda text: Settings(cluster_epoch=text),
        *(
            lambda text, field=field: replace(Registration(iid(1), "agent"), **{field: text}).validated()
            for field in ("logical_id", "actor_name", "namespace", "actor_id", "organ_id", "node_id", "serve_route")
        ),
    ],
)
def test_no_door_takes_a_character_that_commands_or_hides(door: Callable[[str], Any]) -> None:
    for text in (text for char in UNFIT for text in (f"agent{char}", f"{char}agent", f"a{char}b", f"é{char}é")):
        with pytest.raises(ValueError, match=r"contain|printable|word"):
            door(text)


@pytest.mark.parametrize("text", FIT)
def test_scripts_and_emoji_that_join_characters_are_taken(text: str) -> None:
    assert check_text("name", text, 100) == text
    assert shown(text) == text


@pytest.mark.parametrize(
    "text", ["a\u200db", "agent\u200d", "\u200dagent", "é\u200d", "\u200d", "é\u200db", "é\u200d\u200dé"]
)
def test_a_joiner_that_joins_nothing_is_refused(text: str) -> None:
    with pytest.raises(InvalidInputError, match=r"U\+200D"):
        check_text("name", text, 100)


@given(st.text())
def test_a_text_is_refused_by_the_categories_of_its_characters(text: str) -> None:
    hidden = [char for char in text if category(char) in {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}]
    unfit = first_unfit(text)
    assert (unfit is not None) is bool([char for char in hidden if char not in "\u200c\u200d" or unfit == char])
    escaped = shown(text)
    assert (first_unfit(escaped) or "\u200c") in "\u200c\u200d"
    assert (escaped == text) is (unfit is None)


@given(st.text())
def test_in_json_what_is_shown_means_the_same(text: str) -> None:
    document = json.dumps({"text": text}, ensure_ascii=False)
    assert json.loads(shown(document, "\n")) == {"text": text}


def test_an_older_row_with_such_a_name_can_be_found_and_paged_over() -> None:
    older = instance(1, "agent\u202e\x9b")
    assert decode_cursor(encode_cursor(older)) == (older.logical_id, older.instance_id)
    assert check_key("logical_id", older.logical_id) == older.logical_id
    assert InstanceFilter(logical_id=older.logical_id).validated()
    for never in ("a\x00", "a\nb", "a\ud800", "", " ", "x" * 256):
        with pytest.raises(InvalidInputError):
            check_key("logical_id", never)


# What commands print


def hostile_answers() -> tuple[Any, ...]:
    row = replace(
        instance(1, HOSTILE),
        organ_id=HOSTILE,
        actor_name=HOSTILE,
        node_id=HOSTILE,
        cluster_epoch=HOSTILE,
        cause=Cause(CauseKind.AGENT, HOSTILE, HOSTILE),
        holds=(Hold(HoldKind.OPERATOR, HOSTILE, HOSTILE, START, START),),
        labels={HOSTILE: HOSTILE},
        metadata={HOSTILE: [HOSTILE]},
        status=Status.DRAINING,
    )
    dead = replace(row, instance_id=iid(2), status=Status.DEAD, stopped_at=START)
    transition = Transition(iid(1), HOSTILE, None, Status.STARTING, 1, row.cause, START)
    described = Description(
        HOSTILE,
        (Observed(row, Verdict.FRESH, 0),),
        (row, dead),
        Origin.REGISTRY,
        START,
        1,
        complete=True,
        transitions=(transition,),
    )
    return row, dead, agent_answer(described), page_of(Listing((row, dead), Origin.REGISTRY, START, 1, True))


def printed(show: Callable[[Terminal], None], *, is_terminal: bool) -> str:
    file = io.StringIO()
    show(Terminal(file=file, width=400, force_terminal=is_terminal, legacy_windows=False))
    return file.getvalue()


@pytest.mark.parametrize("is_terminal", [False, True])
def test_no_command_prints_what_commands_a_terminal_or_hides(is_terminal: bool) -> None:
    row, _, agent, page = hostile_answers()
    event = {
        "instance_id": iid(1),
        "logical_id": HOSTILE,
        "cause": {"kind": "agent", "detail": HOSTILE, "by": HOSTILE},
        "instance": None,
    }
    for show in (
        lambda console: render.show_listing(console, page),
        lambda console: render.show_agent(console, agent),
        lambda console: render.show_deaths(console, page),
        lambda console: render.show_reason(console, reason_of(agent), agent),
        lambda console: render.show_event(console, event, None),
        lambda console: console.print(f"plain {row.logical_id}"),
    ):
        told = printed(show, is_terminal=is_terminal)
        assert "\\u202egnp" in told
        # what is left are the styles of the layout itself
        unstyled = re.sub(r"\x1b\[[0-9;]*m", "", told) if is_terminal else told
        assert first_unfit(unstyled.replace("\n", "")) is None
        assert "\x1b[31m\\u009b" not in told


def test_json_is_printed_without_them_and_means_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    _, _, _, page = hostile_answers()
    output.print_json(page)
    told = capsys.readouterr().out
    assert first_unfit(told.replace("\n", "")) is None
    assert InstancePage.model_validate_json(told).items[0].logical_id == HOSTILE


def test_an_error_is_one_line_whatever_its_text(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        output.fail(f"no such agent: {HOSTILE}\nsecond", 3)
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert first_unfit(told.rstrip("\n")) is None


def test_commands_print_by_that_one_place_alone() -> None:
    folder = Path(str(seedcore.cli.__file__)).parent
    for file in folder.glob("*.py"):
        others = r"(?:typer|click)\.(?:echo|secho|confirm|prompt)|(?<![.\w])print\(|[^.\w]Console\(|rich\.text"
        assert file.name == "output.py" or re.findall(others, file.read_text()) == [], file
