"""Label selectors in Kubernetes' syntax: `env in (prod, staging), tier != batch, gpu, !spot`.

The semantics are those of https://kubernetes.io/docs/concepts/overview/working-with-objects/labels/: all requirements
must hold, and `!=` and `notin` also match an instance without the label.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import assert_never

from seedcore.core.errors import InvalidInputError
from seedcore.core.wire import wire

MAX_SELECTOR_CHARS = 4096
MAX_REQUIREMENTS = 64

# Kubernetes' operators Gt and Lt are not supported: label values are text
_KEY = r"(?P<key>[^\s=!,()<>]+)"
_WORD = r"[^\s=!,()]*"
_FORMS = (
    re.compile(rf"{_KEY}\s*(?P<sign>==?|!=)\s*(?P<value>{_WORD})"),
    re.compile(rf"{_KEY}\s+(?P<word>in|notin)\s*\((?P<values>[^()]*)\)"),
    re.compile(rf"(?P<no>!)?\s*{_KEY}"),
)
_END = re.compile(r"\s*(,|$)\s*")


class Operator(StrEnum):
    """How a requirement compares a label."""

    IN = "in"
    NOT_IN = "notin"
    EXISTS = "exists"
    ABSENT = "absent"


@wire
@dataclass(frozen=True, slots=True)
class Requirement:
    """One condition on one label. Only IN and NOT_IN use `values`."""

    key: str
    operator: Operator
    values: tuple[str, ...] = ()

    def holds(self, labels: Mapping[str, str]) -> bool:
        """Whether the labels satisfy the requirement."""
        operator = self.operator
        if operator is Operator.IN:
            return labels.get(self.key) in self.values
        if operator is Operator.NOT_IN:
            return labels.get(self.key) not in self.values
        if operator is Operator.EXISTS:
            return self.key in labels
        if operator is Operator.ABSENT:
            return self.key not in labels
        assert_never(operator)


Selector = tuple[Requirement, ...]


def parse_selector(text: str) -> Selector:
    """Return the requirements of a selector, none for an empty text. Raises InvalidInputError with the position."""
    if not isinstance(text, str) or len(text) > MAX_SELECTOR_CHARS:
        raise InvalidInputError("selector", f"must be text of at most {MAX_SELECTOR_CHARS} characters")
    requirements: list[Requirement] = []
    rest = text.strip()
    while rest:
        requirement, rest = _next_requirement(rest)
        requirements.append(requirement)
        if len(requirements) > MAX_REQUIREMENTS:
            raise InvalidInputError("selector", f"must have at most {MAX_REQUIREMENTS} requirements")
    return tuple(requirements)


def parse_labels(texts: Sequence[str]) -> dict[str, str]:
    """Parse texts of the form `key=value`. Raises InvalidInputError."""
    labels: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise InvalidInputError("label", f"must be written key=value, not {text[:80]!r}")
        labels[key] = value
    return labels


def _next_requirement(text: str) -> tuple[Requirement, str]:
    for form in _FORMS:
        found = form.match(text)
        end = _END.match(text, found.end()) if found else None
        if found is not None and end is not None:
            rest = text[end.end() :]
            if end.group(1) == "," and not rest:
                raise InvalidInputError("selector", "must not end with a comma")
            return _requirement(found), rest
    raise InvalidInputError(
        "selector",
        f"cannot be read from {text[:60]!r} on; write it like `env in (prod, staging), tier != batch, gpu, !spot`",
    )


def _requirement(found: re.Match[str]) -> Requirement:
    parts = found.groupdict()
    key = parts["key"]
    if parts.get("sign") is not None:
        return Requirement(key, Operator.NOT_IN if parts["sign"] == "!=" else Operator.IN, (parts["value"],))
    if parts.get("word") is not None:
        return Requirement(key, Operator(parts["word"]), tuple(value.strip() for value in parts["values"].split(",")))
    return Requirement(key, Operator.ABSENT if parts["no"] else Operator.EXISTS)
