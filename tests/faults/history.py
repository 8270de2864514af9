"""A history: what every client of one run called, when, and what each call was answered, with what the database has.

Owns the values and their file format, JSON lines. `recording` writes them, `linearizability` and `sessions` check them.
All times are of the machine's monotonic clock, which its processes share.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from seedcore.core.lifecycle import Status


class Outcome(StrEnum):
    """What the caller knows of a call."""

    ANSWERED = "answered"
    REFUSED = "refused"
    """An error of the registry, after which nothing has changed."""
    UNKNOWN = "unknown"
    """No answer, or one that does not say whether the call was carried out."""


class Source(StrEnum):
    """Where a read was answered from."""

    REGISTRY = "registry"
    SNAPSHOT = "snapshot"
    POSTGRES = "postgres"
    RAY = "ray"
    DATABASE = "database"
    """The test's own look into the tables."""


@dataclass(frozen=True, slots=True)
class Seen:
    """An instance as a read showed it, or as the database has it. `seq` None: the answer has no numbers."""

    instance_id: str
    logical_id: str
    status: Status
    seq: int | None

    def to_json(self) -> list[Any]:
        return [self.instance_id, self.logical_id, self.status.value, self.seq]

    @classmethod
    def from_json(cls, value: list[Any]) -> Seen:
        instance_id, logical_id, status, seq = value
        return cls(instance_id, logical_id, Status(status), seq)


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a client. `ended_s` None: it never ended.

    Of a write: the instance, the agent's number, the wanted status (`starting` of a registration), and of its receipt
    whether it is durable and which registry process answered. Of a read: the source and the stamp of the answer,
    whether it lists every live instance, and what it showed.
    """

    process: str
    name: str
    began_s: float
    ended_s: float | None
    outcome: Outcome
    error: str | None = None
    instance_id: str | None = None
    logical_id: str | None = None
    seq: int | None = None
    status: Status | None = None
    durable: bool | None = None
    registry: str | None = None
    source: Source | None = None
    version: int | None = None
    stream: str | None = None
    as_of: str | None = None
    complete: bool | None = None
    lists_all: bool = False
    seen: tuple[Seen, ...] = ()

    @property
    def is_write(self) -> bool:
        """Whether it registers an instance or changes its status."""
        return self.name in {"register", "set_status"}

    @property
    def is_durable(self) -> bool:
        """Whether it was acknowledged as committed."""
        return self.outcome is Outcome.ANSWERED and self.durable is True

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Call:
        known = dict(value)
        known["outcome"] = Outcome(known["outcome"])
        for name, kind in (("status", Status), ("source", Source)):
            if known.get(name) is not None:
                known[name] = kind(known[name])
        known["seen"] = tuple(map(Seen.from_json, known.get("seen", ())))
        return cls(**known)


@dataclass(frozen=True, slots=True)
class Step:
    """A row of the database's history. `seq` None: the agent did not send the change. `is_hold`: a hold changed."""

    instance_id: str
    seq: int | None
    status: Status
    is_hold: bool = False


@dataclass(frozen=True, slots=True)
class History:
    """One run of one seed. `before` is what lived when it began, `after` what the database has at its end of everything
    that lived then or since, and `steps` are the rows that it wrote meanwhile, in the order of their commits.

    `refusals_are_final`: no copy of a refused call can arrive later, as it can where a relay sends it too. `superseded`
    has for the stream of a registry that another one superseded when it was in force for the last time: for `unaware_s`
    seconds it may answer without knowing of the other.
    """

    harness: str
    seed: int
    began_s: float
    ended_s: float
    refusals_are_final: bool
    superseded: dict[str, float]
    unaware_s: float
    before: tuple[Seen, ...]
    calls: tuple[Call, ...]
    steps: tuple[Step, ...]
    after: tuple[Seen, ...]

    def write(self, file: Path) -> None:
        """One line for the run, and one for each value of it."""
        head = {
            "harness": self.harness,
            "seed": self.seed,
            "began_s": self.began_s,
            "ended_s": self.ended_s,
            "refusals_are_final": self.refusals_are_final,
            "superseded": self.superseded,
            "unaware_s": self.unaware_s,
        }
        lines: list[dict[str, Any]] = [{"history": head}]
        lines += [{"before": seen.to_json()} for seen in self.before]
        lines += [{"call": plain(call)} for call in self.calls]
        lines += [{"step": [step.instance_id, step.seq, step.status.value, step.is_hold]} for step in self.steps]
        lines += [{"after": seen.to_json()} for seen in self.after]
        file.write_text("".join(f"{json.dumps(line, separators=(',', ':'))}\n" for line in lines))

    @classmethod
    def read(cls, file: Path) -> History:
        """The history that `write` wrote."""
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        steps = (Step(one, seq, Status(status), is_hold) for one, seq, status, is_hold in _of(lines, "step"))
        return cls(
            **next(_of(lines, "history")),
            before=tuple(map(Seen.from_json, _of(lines, "before"))),
            calls=tuple(map(Call.from_json, _of(lines, "call"))),
            steps=tuple(steps),
            after=tuple(map(Seen.from_json, _of(lines, "after"))),
        )


def plain(call: Call) -> dict[str, Any]:
    """A call as JSON has it, without what is not set."""
    known = {name: getattr(call, name) for name in Call.__slots__}
    found = {name: value for name, value in known.items() if value is not None and name not in {"seen", "lists_all"}}
    # what never ended has to be read as that
    found["ended_s"] = call.ended_s
    if call.lists_all:
        found["lists_all"] = True
    if call.seen:
        found["seen"] = [seen.to_json() for seen in call.seen]
    return found


def _of(lines: Iterable[dict[str, Any]], kind: str) -> Iterator[Any]:
    return (line[kind] for line in lines if kind in line)
