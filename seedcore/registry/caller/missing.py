"""The agents that are missing at the deadline of a wait, each with its reason: the registry is asked once, in bounded
time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Protocol, TypeVar

from seedcore.core.answers import InstanceFilter, Listing
from seedcore.core.errors import RegistryError
from seedcore.core.instances import Instance, Verdict
from seedcore.core.limits import MAX_PAGE
from seedcore.core.not_ready import MissingAgent, NotReady
from seedcore.core.timeouts import end, within
from seedcore.registry.caller.reasons import of_dead, of_description, of_live, of_refusal, one_line
from seedcore.registry.caller.resolver import Resolver
from seedcore.registry.protocol.messages import Observed

T = TypeVar("T")

_DESCRIBED = 100
_AT_ONCE = 16
_NAMED = 20
_DEATHS = 200
_DEAD_WITHIN_S = 3600.0


class Awaited(Protocol):
    """What a wait is for: see waiting.AwaitedAgents."""

    @property
    def ids(self) -> tuple[str, ...] | None: ...
    @property
    def wanted(self) -> InstanceFilter: ...
    @property
    def count(self) -> int: ...


async def missing_of(
    of: Awaited, ready: Collection[str], refusals: Mapping[str, RegistryError], resolver: Resolver, timeout_s: float
) -> tuple[list[MissingAgent], int]:
    """The agents that are not ready, and how many more there are. `refusals` are what the last resolutions raised:
    they are the reasons of what the registry does not answer within `timeout_s` seconds."""
    if of.ids is not None:
        absent = [logical_id for logical_id in of.ids if logical_id not in ready]
        found: dict[str, MissingAgent] = {}
        if resolver.records:
            await _within(_describe_all(absent[:_DESCRIBED], refusals, resolver, found), timeout_s)
        return [found.get(one) or of_refusal(one, refusals.get(one)) for one in absent], 0
    listed: list[MissingAgent] = []
    is_known = await _within(_list(of, ready, refusals, resolver, listed), timeout_s)
    lacking = of.count - len(ready)
    if not is_known and not listed:
        refused = [of_refusal(one, refusal) for one, refusal in refusals.items() if one not in ready]
        listed = refused or [MissingAgent(None, NotReady.UNKNOWN, "no source that could know them answers")]
    living = [one for one in listed if one.reason is not NotReady.DEAD]
    total, unknown = len(listed), lacking - len(living)
    if unknown > 0 and NotReady.UNKNOWN not in {one.reason for one in living}:
        words = not_registered(unknown, of.wanted)
        never = MissingAgent(None, NotReady.NEVER_REGISTERED, words)
        # named even where there is no place for all of them
        listed = [*living[: _NAMED - 1], never, *(one for one in listed if one.reason is NotReady.DEAD)]
        total += 1
    named = listed[:_NAMED]
    return named, total - len(named)


def not_registered(count: int, wanted: InstanceFilter) -> str:
    """So many agents that a filter wants are not known."""
    at = "" if wanted.endpoint is None else f" with endpoint {wanted.endpoint!r}"
    return f"{count} {'has' if count == 1 else 'have'} not registered{at}"


async def _describe_all(
    ids: Sequence[str],
    refusals: Mapping[str, RegistryError],
    resolver: Resolver,
    found: dict[str, MissingAgent],
) -> None:
    slots = asyncio.Semaphore(_AT_ONCE)

    async def one(logical_id: str) -> None:
        async with slots:
            try:
                described = await resolver.recorded(logical_id, lambda source: source.describe(logical_id))
            except RegistryError as error:
                found[logical_id] = of_refusal(logical_id, refusals.get(logical_id, error))
            else:
                found[logical_id] = of_description(described, refusals.get(logical_id))

    tasks = [asyncio.create_task(one(logical_id)) for logical_id in ids]
    try:
        await asyncio.gather(*tasks)
    finally:
        await end(*tasks)


async def _list(
    of: Awaited,
    ready: Collection[str],
    refusals: Mapping[str, RegistryError],
    resolver: Resolver,
    listed: list[MissingAgent],
) -> bool:
    """Of a filter: the live agents that are not ready, then those that died recently and have no live instance. Returns
    whether a source that knows them answered."""
    try:
        page = await resolver.page(of.wanted, MAX_PAGE, None, consistent=True)
    except RegistryError as error:
        why = one_line(getattr(error, "why", str(error)))
        listed.append(MissingAgent(None, NotReady.UNKNOWN, f"the others cannot be known: {why}"))
        return False
    if not isinstance(page, Listing):
        return False
    rows = {row.logical_id: row for row in page if row.logical_id not in ready}
    for row in rows.values():
        observed = Observed(row, page.verdicts.get(row.instance_id, Verdict.FRESH), 0.0)
        listed.append(of_live(observed, page.as_of, refusals.get(row.logical_id)))
    try:
        dead = await resolver.recorded("*", lambda source: source.deaths(_DEATHS, None, _DEAD_WITHIN_S))
    except RegistryError:
        return True
    last: dict[str, Instance] = {}
    any_epoch = replace(of.wanted, statuses=None)
    for row in dead:
        is_wanted = any_epoch.matches(row, row.cluster_epoch)
        if is_wanted and row.logical_id not in rows and row.logical_id not in ready:
            last.setdefault(row.logical_id, row)
    listed.extend(of_dead(row, dead.as_of) for row in last.values())
    return True


async def _within(asking: Awaitable[T], timeout_s: float) -> T | None:
    """The result; None if there is none in time."""
    try:
        return await within(asking, timeout_s)
    except TimeoutError:
        return None
