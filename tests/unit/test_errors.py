"""Errors cross process boundaries whole."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest

from seedcore import errors
from seedcore.core import errors as core_errors
from seedcore.core.causes import Cause, CauseKind
from seedcore.core.errors import (
    ForbiddenTransitionError,
    InstanceDeadError,
    InvalidInputError,
    NotAcceptingWorkError,
    RegistryError,
    first_line,
    last_line,
)
from seedcore.core.not_ready import MissingAgent, NotReady, NotReadyError

CLASSES = sorted(
    {
        kind
        for module in (core_errors, errors)
        for _, kind in inspect.getmembers(module, inspect.isclass)
        if issubclass(kind, RegistryError)
    },
    key=lambda kind: kind.__name__,
)


def sample(kind: type[RegistryError]) -> RegistryError:
    if kind is RegistryError:
        return RegistryError("anything")
    parameters = list(inspect.signature(kind).parameters.values())
    assert all(parameter.kind is parameter.POSITIONAL_OR_KEYWORD for parameter in parameters)
    return kind(*(_argument(parameter) for parameter in parameters))


def _argument(parameter: inspect.Parameter) -> object:
    if parameter.annotation == "Sequence[MissingAgent]":
        return (MissingAgent("b", NotReady.DEAD, "is dead"), MissingAgent(None, NotReady.UNKNOWN, "more are unknown"))
    return 7 if parameter.annotation in {"int", "float"} else f"the {parameter.name}"


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_error_survives_pickling_whole(kind: type[RegistryError], protocol: int) -> None:
    error = sample(kind)
    arrived = pickle.loads(pickle.dumps(error, protocol))
    assert type(arrived) is kind
    assert isinstance(arrived, RegistryError)
    assert str(arrived) == str(error)
    assert repr(arrived) == repr(error)
    assert arrived.args == error.args
    assert vars(arrived) == vars(error)


@pytest.mark.parametrize("kind", CLASSES)
def test_error_survives_copying(kind: type[RegistryError]) -> None:
    error = sample(kind)
    assert str(copy.deepcopy(error)) == str(error)


class MixedForbidden(ForbiddenTransitionError, RuntimeError):
    """As Ray mixes an error of ours with one of its own."""


def test_subclass_of_an_error_survives_pickling_and_is_still_caught_as_its_parents() -> None:
    arrived = pickle.loads(pickle.dumps(MixedForbidden("some-id", "dead", "alive")))
    assert isinstance(arrived, MixedForbidden)
    assert isinstance(arrived, ForbiddenTransitionError)
    assert (arrived.instance_id, arrived.current, arrived.wanted) == ("some-id", "dead", "alive")
    assert str(arrived) == "instance some-id is dead and cannot become alive"


@pytest.mark.parametrize("kind", CLASSES)
def test_error_is_one_line_with_all_it_has(kind: type[RegistryError]) -> None:
    error = sample(kind)
    assert str(error)
    assert "\n" not in str(error)
    for value in error.args:
        for one in value if isinstance(value, tuple) else (value,):
            assert str(one) in str(error)


def test_invalid_input_is_a_value_error() -> None:
    assert isinstance(InvalidInputError("field", "why"), ValueError)


def test_death_without_a_known_cause_names_none() -> None:
    assert str(InstanceDeadError("some-id")) == "instance some-id is dead; dead is final, register a new instance"
    assert "(lease expired)" in str(InstanceDeadError("some-id", Cause(CauseKind.LEASE_EXPIRED)))


def test_error_of_a_wait_names_twenty_missing_agents_and_counts_the_others() -> None:
    missing = [MissingAgent(f"agent-{number}", NotReady.STARTING, "is starting for 4 s") for number in range(23)]
    text = str(NotReadyError(0.5, 1, 24, "agents", missing, 7))
    assert text.startswith("1 of 24 agents ready after 0.5 s: 'agent-0' is starting for 4 s; 'agent-1' is ")
    assert text.endswith("'agent-19' is starting for 4 s; and 10 more")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("one\ntwo"), "one"),
        (ValueError("\n one "), "one"),
        (ValueError(), "ValueError"),
        (KeyError(), "KeyError"),
        (ValueError("raised in \x1b[36mray::Agent.start()\x1b[39m (pid=7)"), "raised in ray::Agent.start() (pid=7)"),
        (ValueError("\x1b[0m"), "ValueError"),
    ],
)
def test_first_line_is_short_plain_and_never_empty(error: Exception, line: str) -> None:
    assert first_line(error) == line


@pytest.mark.parametrize(
    ("error", "line"), [(ValueError("one\n\x1b[1mtwo\x1b[0m\n"), "two"), (ValueError(), "ValueError")]
)
def test_last_line_is_as_plain(error: Exception, line: str) -> None:
    assert last_line(error) == line


def test_dead_agent_that_gets_work_names_the_remedy() -> None:
    assert str(NotAcceptingWorkError("a", "draining")) == "agent 'a' is draining and takes no new work"
    assert "dead is final, make a new one" in str(NotAcceptingWorkError("a", "dead"))
