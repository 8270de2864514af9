"""Label selectors: valid selectors and their meaning, and invalid ones."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seedcore.core.errors import InvalidInputError
from seedcore.core.selector import MAX_REQUIREMENTS, Operator, Requirement, parse_selector

LABELS = st.dictionaries(st.sampled_from("abc"), st.sampled_from(["", "x", "y"]))


@pytest.mark.parametrize(
    ("text", "requirements"),
    [
        ("", ()),
        ("  ", ()),
        ("a=x", (Requirement("a", Operator.IN, ("x",)),)),
        ("a == x", (Requirement("a", Operator.IN, ("x",)),)),
        ("a!=x", (Requirement("a", Operator.NOT_IN, ("x",)),)),
        ("a=", (Requirement("a", Operator.IN, ("",)),)),
        ("a in (x,y)", (Requirement("a", Operator.IN, ("x", "y")),)),
        ("a notin ( x , y )", (Requirement("a", Operator.NOT_IN, ("x", "y")),)),
        ("example.com/a", (Requirement("example.com/a", Operator.EXISTS),)),
        ("! a", (Requirement("a", Operator.ABSENT),)),
        ("in", (Requirement("in", Operator.EXISTS),)),
        (
            "a in (x,y), !b ,c=é",
            (
                Requirement("a", Operator.IN, ("x", "y")),
                Requirement("b", Operator.ABSENT),
                Requirement("c", Operator.IN, ("é",)),
            ),
        ),
    ],
)
def test_selector_has_the_meaning_of_kubernetes(text: str, requirements: tuple[Requirement, ...]) -> None:
    assert parse_selector(text) == requirements


@pytest.mark.parametrize(
    "text", [",", "a,", "a,,b", "=x", "a in x", "a in (x", "a in", "a b", "a=x=y", "!a=x", "(a)", "a in (x) b", "!"]
)
def test_invalid_selector_is_refused(text: str) -> None:
    with pytest.raises(InvalidInputError, match="selector"):
        parse_selector(text)


def test_selector_has_a_maximum_length_and_number_of_requirements() -> None:
    assert len(parse_selector(",".join("a" for _ in range(MAX_REQUIREMENTS)))) == MAX_REQUIREMENTS
    with pytest.raises(InvalidInputError, match="at most 64 requirements"):
        parse_selector(",".join("a" for _ in range(MAX_REQUIREMENTS + 1)))
    with pytest.raises(InvalidInputError, match="4096 characters"):
        parse_selector("a" * 5000)


@given(LABELS, st.sampled_from("abc"), st.sampled_from(["", "x", "y"]))
def test_negated_requirement_holds_exactly_when_the_positive_one_does_not(
    labels: dict[str, str], key: str, value: str
) -> None:
    for is_so, is_not in ((f"{key}={value}", f"{key}!={value}"), (key, f"!{key}")):
        (one,), (other,) = parse_selector(is_so), parse_selector(is_not)
        assert one.holds(labels) is not other.holds(labels)
    (listed,) = parse_selector(f"{key} in ({value},z)")
    assert listed.holds(labels) is (labels.get(key) in {value, "z"})


@given(st.text(max_size=60))
def test_any_text_parses_or_raises_invalid_input(text: str) -> None:
    with suppress(InvalidInputError):
        parse_selector(text)
