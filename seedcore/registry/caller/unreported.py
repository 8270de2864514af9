"""Which agents may be found by Ray's listing although a registry answers: those that do not report to it.

An agent that has reported is resolved by its records alone: its actor may live on after the agent is dead.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from seedcore.core.answers import NotResolved
from seedcore.core.errors import NotResolvableError
from seedcore.core.instances import Instance
from seedcore.core.lifecycle import Status
from seedcore.registry.caller.sources import NoAnswerError, RecordSource

logger = logging.getLogger(__name__)


async def recorded_instances(source: RecordSource, logical_id: str) -> Sequence[Instance]:
    """Every instance that the source knows, newest first; none if it cannot be read."""
    try:
        described = await source.describe(logical_id)
    except NoAnswerError as error:
        logger.debug("its instances cannot be read: %s", error, extra={"logical_id": logical_id})
        return ()
    if not described.complete:
        return ()
    committed = {row.instance_id for row in described.instances}
    # a new registration is in the registry's memory before it is in the database
    newer = (each.instance for each in described.live if each.instance.instance_id not in committed)
    return (*newer, *described.instances)


def require_unreported(refusal: NotResolvableError, instances: Sequence[Instance]) -> None:
    """Raise NotResolvableError if the agent has reported. One exception: while its first instance is starting, an actor
    of the agent's own name that does not report stays usable."""
    if not instances:
        return
    logical_id = refusal.logical_id
    if instances[0].status is not Status.DEAD:
        # one that is not ready has reported that
        is_first = all(row.status is Status.STARTING and not row.holds for row in instances)
        if is_first and all(row.actor_name != logical_id for row in instances):
            return
        raise refusal
    cause = f" ({instances[0].cause})" if instances[0].cause else ""
    detail = f"no live instance is registered, the last one is dead{cause}"
    raise NotResolvableError(logical_id, NotResolved.DIED, detail)
