"""`seedcore wait`: asks a backend until enough agents are ready, or explains at the deadline which ones are not."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from time import monotonic
from typing import Annotated

import typer
from pydantic import BaseModel, Field
from rich.live import Live

from seedcore.cli.backend import Backend, ListQuery, backend_of
from seedcore.cli.errors import EXIT_CANNOT_KNOW, HttpProblemError, NeverRegisteredError
from seedcore.cli.output import JsonOption, Text, out, parse_duration, print_json
from seedcore.cli.queries import EndpointOption, OrganOption, answered
from seedcore.cli.render import show_missing
from seedcore.cli.why import reason_of
from seedcore.core.backoff import Backoff
from seedcore.core.errors import (
    CannotKnowError,
    RegistryError,
    RegistryUnavailableError,
    StoreUnavailableError,
    first_line,
)
from seedcore.core.instances import Verdict
from seedcore.core.lifecycle import Status
from seedcore.core.timeouts import within
from seedcore.discovery.api import InstanceOut
from seedcore.registry.caller.awaited import AwaitedAgents, awaited, check_deadline
from seedcore.registry.caller.missing import not_registered
from seedcore.settings import load_settings

_RESOLVED_AT_ONCE = 100
_EXPLAINED = 20
_DEATHS = 200
_DEAD_WITHIN_S = 3600.0
_READY_VERDICTS = frozenset({None, Verdict.FRESH.value})
_UNKNOWN = "unknown"
# of a question at the deadline
_GRACE_S = 2.0

Report = Callable[[str], None]


class MissingOut(BaseModel):
    """An agent that is not ready. `why` is for people. `logical_id` null: agents that no source knows."""

    logical_id: str | None
    state: str
    why: str
    since: datetime | None = None


class WaitAnswer(BaseModel):
    """How a wait ended: with `wanted` ready agents, or with the reasons of those that are missing."""

    wanted: int
    ready: list[str]
    missing: list[MissingOut] = []
    others: int = Field(0, description="missing agents that are not explained")


@dataclass(slots=True)
class Seen:
    """What the last answer had: the ready agents, and the states of the others. `problem`: there was none since."""

    ready: list[str] = field(default_factory=list)
    others: dict[str, str] = field(default_factory=dict)
    problem: str | None = None


async def wait(
    backend: Backend, of: AwaitedAgents, query: ListQuery, timeout_s: float, report: Report, backoff: Backoff
) -> WaitAnswer:
    """Wait for the agents. `report` is called with a line of progress after each answer.

    An outage does not end the wait. Raises InvalidInputError, and what a deployment refuses.
    """
    began_s = monotonic()
    seen = Seen()
    while True:
        left_s = max(_GRACE_S, began_s + timeout_s - monotonic())
        try:
            asked = _of_ids(backend, of.ids) if of.ids is not None else _of_filter(backend, query)
            found = await within(asked, left_s)
        except (CannotKnowError, RegistryUnavailableError, StoreUnavailableError) as error:
            found = replace(seen, problem=first_line(error))
        except TimeoutError:
            found = replace(seen, problem="no answer in time")
        if len(found.ready) > len(seen.ready):
            backoff.reset()
        seen = found
        if seen.problem is None and len(seen.ready) >= of.count:
            return WaitAnswer(wanted=of.count, ready=seen.ready[: of.count])
        waited_s = monotonic() - began_s
        report(_progress(seen, of.count, waited_s))
        if waited_s >= timeout_s:
            return await _missed(backend, of, seen)
        await asyncio.sleep(min(backoff.next_s(), max(0.0, timeout_s - waited_s)))


def wait_command(
    agents: Annotated[list[str] | None, typer.Argument(metavar="[ID]...", help="Logical ids of agents.")] = None,
    count: Annotated[
        int | None, typer.Option("--count", "-n", help="How many of them. Default: all the given ids.")
    ] = None,
    organ: OrganOption = None,
    selector: Annotated[
        str | None, typer.Option("--selector", "-l", help="Labels as in kubectl: 'env in (a, b), tier!=x, !spot'.")
    ] = None,
    endpoint: EndpointOption = None,
    timeout: Annotated[str, typer.Option(help="Give up after 90, 90s, 5m, 1h.")] = "5m",
    as_json: JsonOption = False,
) -> None:
    """Wait until agents are ready: those given, or --count of an organ or a selector. Exit code 4 at the deadline."""
    of = awaited(agents or None, organ, selector, count, endpoint)
    timeout_s = parse_duration("--timeout", timeout, check_deadline)
    assert timeout_s is not None
    query = ListQuery(statuses=(), organ=organ, selector=selector or "", with_lapsed=True, endpoint=endpoint)
    query.parameters()
    backend = backend_of(load_settings())
    backoff = Backoff(0.25, 2.0)
    if out.is_terminal and not as_json:
        with Live(console=out, transient=True, refresh_per_second=4) as live:
            answer = answered(wait(backend, of, query, timeout_s, lambda line: live.update(Text(line)), backoff))
    else:
        answer = answered(wait(backend, of, query, timeout_s, lambda _: None, backoff))
    if as_json:
        print_json(answer)
    elif answer.missing:
        head = f"{len(answer.ready)} of {answer.wanted} {of.about} ready after {timeout}"
        show_missing(out, head, [(one.logical_id, one.state, one.since, one.why) for one in answer.missing])
        if answer.others:
            out.print(f"and {answer.others} more", style="dim")
    else:
        for logical_id in answer.ready:
            out.print(Text(logical_id), soft_wrap=True)
    if answer.missing:
        raise typer.Exit(EXIT_CANNOT_KNOW)


async def _of_ids(backend: Backend, ids: Sequence[str]) -> Seen:
    seen = Seen()
    for start in range(0, len(ids), _RESOLVED_AT_ONCE):
        answer = await backend.resolve(ids[start : start + _RESOLVED_AT_ONCE])
        for found in answer.results:
            if found.instance is not None:
                seen.ready.append(found.logical_id)
            else:
                seen.others[found.logical_id] = _UNKNOWN if found.reason is None else found.reason.value
    return seen


async def _of_filter(backend: Backend, query: ListQuery) -> Seen:
    """Of several instances of an agent, one that is ready is enough."""
    page = await backend.listing(query)
    ready = {row.logical_id for row in page.items if _is_ready(row)}
    return Seen(sorted(ready), {row.logical_id: _state_of(row) for row in page.items if row.logical_id not in ready})


def _is_ready(row: InstanceOut) -> bool:
    # only a source that receives beats knows verdicts
    return row.status == Status.ALIVE.value and row.verdict in _READY_VERDICTS


def _state_of(row: InstanceOut) -> str:
    return (row.verdict if row.status == Status.ALIVE.value else row.status) or _UNKNOWN


def _progress(seen: Seen, wanted: int, waited_s: float) -> str:
    states = Counter(seen.others.values())
    parts = [
        f"{len(seen.ready)} of {wanted} ready",
        *(f"{n} {state.replace('_', ' ')}" for state, n in sorted(states.items())),
    ]
    problem = [] if seen.problem is None else [seen.problem]
    return ", ".join([*parts, *problem, f"{waited_s:.0f} s"])


# The deadline


async def _missed(backend: Backend, of: AwaitedAgents, seen: Seen) -> WaitAnswer:
    """The reasons of the first missing agents, and the number of the others."""
    ready = set(seen.ready)
    if seen.problem is not None:
        names = [None] if of.ids is None else [one for one in of.ids if one not in ready]
        named = [MissingOut(logical_id=name, state=_UNKNOWN, why=seen.problem) for name in names[:_EXPLAINED]]
        return WaitAnswer(wanted=of.count, ready=seen.ready, missing=named, others=len(names) - len(named))
    absent = [one for one in of.ids if one not in ready] if of.ids is not None else sorted(seen.others)
    missing = list(await asyncio.gather(*(_reason(backend, one) for one in absent[:_EXPLAINED])))
    total = len(absent)
    if of.ids is None:
        unknown = of.count - len(ready) - len(absent)
        if unknown > 0:
            words = not_registered(unknown, of.wanted)
            missing.append(MissingOut(logical_id=None, state="never_registered", why=words))
            total += 1
        dead = await _dead(backend, of, {*ready, *absent})
        missing += dead[: max(0, _EXPLAINED - len(missing))]
        total += len(dead)
    return WaitAnswer(wanted=of.count, ready=seen.ready, missing=missing, others=total - len(missing))


async def _reason(backend: Backend, logical_id: str) -> MissingOut:
    try:
        reason = reason_of(await within(backend.agent(logical_id), _GRACE_S))
    except TimeoutError:
        return MissingOut(logical_id=logical_id, state=_UNKNOWN, why="no answer in time")
    except NeverRegisteredError as error:
        return MissingOut(logical_id=logical_id, state="never_registered", why=error.known)
    except HttpProblemError as error:
        state = "never_registered" if error.status == 404 else _UNKNOWN
        return MissingOut(logical_id=logical_id, state=state, why=error.detail)
    except RegistryError as error:
        return MissingOut(logical_id=logical_id, state=_UNKNOWN, why=first_line(error))
    return MissingOut(logical_id=logical_id, state=reason.state, why=reason.why, since=reason.since)


async def _dead(backend: Backend, of: AwaitedAgents, living: Collection[str]) -> list[MissingOut]:
    """The last deaths of agents that match and do not live."""
    try:
        deaths = await within(backend.deaths(_DEATHS, _DEAD_WITHIN_S), _GRACE_S)
    except (RegistryError, TimeoutError):
        return []
    last: dict[str, InstanceOut] = {}
    wanted = of.wanted
    for row in deaths.items:
        is_of_organ = wanted.organ_id is None or row.organ_id == wanted.organ_id
        is_there = wanted.endpoint is None or wanted.endpoint in row.endpoints
        matches = is_of_organ and is_there and all(requirement.holds(row.labels) for requirement in wanted.selector)
        if matches and row.logical_id not in living:
            last.setdefault(row.logical_id, row)
    return [
        MissingOut(
            logical_id=row.logical_id,
            state=Status.DEAD.value,
            why="no cause was given" if row.cause is None else str(row.cause),
            since=row.stopped_at,
        )
        for row in last.values()
    ]
