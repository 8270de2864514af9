"""What travels between versions only grows at its end. `wire.json` is what travels now; rewrite it with

    python -m tests.unit.test_wire

A difference that only appends is a new protocol (PROTOCOL + 1). One that does not shuts older versions out, by
OLDEST_PROTOCOL.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import pickle
import pkgutil
from enum import Enum
from pathlib import Path
from typing import Any

import pytest

import seedcore
from seedcore.agents import RayAgent
from seedcore.core import errors, wire
from seedcore.core.answers import BeatAnswer, NotResolved, Origin
from seedcore.core.causes import CauseKind
from seedcore.core.changes import Registration
from seedcore.core.holds import HoldKind
from seedcore.core.instances import Verdict
from seedcore.core.lifecycle import Status
from seedcore.core.selector import Operator
from seedcore.registry.node.relay import RelayActor
from seedcore.registry.protocol.messages import OLDEST_PROTOCOL, PROTOCOL
from seedcore.registry.server.registry import Registry

FILE = Path(__file__).with_name("wire.json")
Written = dict[str, Any]


def travelling() -> list[type[Any]]:
    """Every class that is pickled from one process to another."""
    modules = [
        importlib.import_module(info.name)
        for info in pkgutil.walk_packages(seedcore.__path__, "seedcore.")
        if "__main__" not in info.name
    ]
    found = {
        kind
        for module in modules
        for kind in vars(module).values()
        if inspect.isclass(kind) and getattr(vars(kind).get("__setstate__"), "__module__", "") == wire.__name__
    }
    return sorted(found, key=lambda kind: str(kind.__name__))


def written_now() -> Written:
    """What travels, in words."""
    return {
        "protocol": PROTOCOL,
        "oldest": OLDEST_PROTOCOL,
        "classes": {kind.__name__: [_field(field) for field in dataclasses.fields(kind)] for kind in travelling()},
        "words": {
            kind.__name__: [member.value for member in kind]
            for kind in (CauseKind, HoldKind, NotResolved, Operator, Origin, Status, Verdict)
        },
        "methods": {f"{kind.__name__}.{name}": _parameters(method) for kind, name, method in _methods()},
        "answers": {
            f"{kind.__name__}.{name}": inspect.signature(method).return_annotation for kind, name, method in _methods()
        },
        "errors": {
            name: list(inspect.signature(kind).parameters)
            for name, kind in inspect.getmembers(errors, inspect.isclass)
            if issubclass(kind, errors.RegistryError) and kind is not errors.RegistryError
        },
    }


def _methods() -> list[tuple[type[Any], str, Any]]:
    """What is called from other processes."""
    return [
        (kind, name, method)
        for kind in (RayAgent, Registry, RelayActor)
        for name, method in inspect.getmembers(kind, inspect.isfunction)
        if not name.startswith("_")
    ]


def _field(field: dataclasses.Field[Any]) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return f"{field.name}: {field.type} = {field.default_factory()!r}"
    default = "" if field.default is dataclasses.MISSING else f" = {field.default!r}"
    return f"{field.name}: {field.type}{default}"


def _parameters(method: Any) -> list[str]:
    # where a test has made an actor of the class in this process, Ray has given its methods one more
    named = {name: one for name, one in inspect.signature(method).parameters.items() if name != "_ray_trace_ctx"}
    return [_parameter(one) for one in named.values()][1:]


def _parameter(one: inspect.Parameter) -> str:
    kind = "" if one.kind is one.POSITIONAL_OR_KEYWORD else "*" if one.kind is one.KEYWORD_ONLY else f"{one.kind} "
    return f"{kind}{one.name}: {one.annotation}{'' if one.default is one.empty else f' = {one.default!r}'}"


def objections(before: Written, now: Written) -> list[str]:
    """What of `now` a version that wrote `before` would not understand."""
    if now["oldest"] > before["protocol"]:
        return []
    problems = []
    for part in ("classes", "methods"):
        for name, had in before[part].items():
            has = now[part].get(name)
            if has is None:
                problems.append(f"{name} is gone")
                continue
            if has[: len(had)] != had:
                problems.append(f"{name} had {had} and has {has}")
            problems += [f"{name}: {more} has no default" for more in has[len(had) :] if "=" not in more]
    for part in ("words", "errors", "answers"):
        for name, had in before[part].items():
            if now[part].get(name) != had:
                problems.append(f"{name} was {had} and is {now[part].get(name)}")
    problems += [
        f"{name} is new: the version before cannot read it" for name in now["errors"].keys() - before["errors"]
    ]
    is_same = all(before[part] == now[part] for part in ("classes", "methods", "answers", "words", "errors"))
    if not is_same and now["protocol"] <= before["protocol"]:
        problems.append("it is not the same, and the protocol is")
    return problems


def test_what_travels_is_written_down() -> None:
    assert written_now() == json.loads(FILE.read_text()), "see the head of this test's file"
    assert OLDEST_PROTOCOL <= PROTOCOL


def test_everything_that_travels_takes_part() -> None:
    names = {kind.__name__ for kind in travelling()}
    assert {
        "Registration",
        "SequencedChange",
        "Receipt",
        "BeatAnswer",
        "Listing",
        "FeedBatch",
        "Hello",
        "Health",
    } <= names
    assert {"Watched", "Exit", "RegistryConfig", "StoreRecipe", "Heartbeat", "Requirement"} <= names
    for kind in travelling():
        for field in dataclasses.fields(kind):
            inner = [other for other in _our_dataclasses() if other.__name__ in str(field.type)]
            assert {other.__name__ for other in inner} <= names, (kind, field.name, field.type)


def _our_dataclasses() -> list[type[Any]]:
    from seedcore.core import answers, causes, changes, feed, holds, instances, selector
    from seedcore.registry.protocol import messages

    return [
        kind
        for module in (answers, causes, changes, feed, holds, instances, selector, messages)
        for kind in vars(module).values()
        if inspect.isclass(kind)
        and not issubclass(kind, Enum)
        and (dataclasses.is_dataclass(kind) or hasattr(kind, "_fields"))
    ]


def changed(**changes: Any) -> Written:
    """A later version that has this and that otherwise."""
    later: Written = json.loads(FILE.read_text())
    later["protocol"] += 1
    for name, change in changes.items():
        part, _, key = name.partition("__")
        if key:
            later[part][key] = change(later[part][key]) if key in later[part] else change([])
        else:
            later[part] = change
    return later


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"classes__Receipt": lambda had: [*had, "more: int = 0"]}, ""),
        ({"classes__More": lambda had: ["a: int"]}, ""),
        ({"classes__Receipt": lambda had: ["more: int = 0", *had]}, "Receipt had"),
        ({"classes__Receipt": lambda had: had[:-1]}, "Receipt had"),
        ({"classes__Receipt": lambda had: [*had, "more: int"]}, "more: int has no default"),
        ({"words__Status": lambda had: [*had, "lost"]}, "Status was"),
        ({"errors__FencedError": lambda had: [*had, "more"]}, "FencedError was"),
        ({"errors__NewError": lambda had: ["why"]}, "NewError is new"),
        ({"protocol": PROTOCOL, "classes__More": lambda had: ["a: int"]}, "the protocol is"),
        ({"answers__Registry.health": lambda had: "None"}, "Registry.health was"),
        ({"oldest": PROTOCOL + 1, "words__Status": lambda had: [*had, "lost"]}, ""),
    ],
)
def test_difference_that_the_version_before_does_not_understand_is_noticed(changes: Written, problem: str) -> None:
    problems = objections(json.loads(FILE.read_text()), changed(**changes))
    assert any(problem in one for one in problems) if problem else problems == [], problems


def test_method_that_wants_more_is_noticed() -> None:
    before, later = json.loads(FILE.read_text()), changed()
    later["methods"]["Registry.resolve"] += ["*more"]
    assert objections(before, later) == ["Registry.resolve: *more has no default"]
    del later["methods"]["Registry.resolve"]
    assert objections(before, later) == ["Registry.resolve is gone"]


@wire.wire
@dataclasses.dataclass(frozen=True, slots=True)
class Before:
    """As the version before has it."""

    name: str
    number: int = 1


@wire.wire
@dataclasses.dataclass(frozen=True, slots=True)
class After:
    """As the version after has it."""

    name: str
    number: int = 1
    labels: dict[str, str] = dataclasses.field(default_factory=dict)
    ratio: float = 0.5


def as_other(value: Any, kind: type[Any]) -> Any:
    """The value as the other version reads it."""
    state = value.__getstate__()
    read = object.__new__(kind)
    read.__setstate__(pickle.loads(pickle.dumps(state)))
    return read


def test_newer_version_reads_an_older_one_with_its_defaults() -> None:
    first, second = (as_other(Before("a", 2), After) for _ in range(2))
    assert first == After("a", 2)
    assert first.labels is not second.labels


def test_older_version_reads_a_newer_one_without_what_it_does_not_know() -> None:
    assert as_other(After("a", 2, {"b": "c"}, 0.7), Before) == Before("a", 2)


def test_what_was_always_there_must_be_sent() -> None:
    with pytest.raises(TypeError, match=r"After\.name was not sent"):
        object.__new__(After).__setstate__([])  # type: ignore[attr-defined]


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_values_survive_pickling_whole(protocol: int) -> None:
    for value in (
        Registration("00000000-0000-4000-8000-000000000001", "a", labels={"b": "c"}),
        BeatAnswer(unknown=("a",), relay="r"),
    ):
        assert pickle.loads(pickle.dumps(value, protocol)) == value


if __name__ == "__main__":
    FILE.write_text(json.dumps(written_now(), indent=1) + "\n")
