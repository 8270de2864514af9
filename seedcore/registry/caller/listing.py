"""Listings of all agents, page by page."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import aclosing
from dataclasses import replace

from seedcore.core.answers import InstanceFilter, Listing
from seedcore.core.lifecycle import Status
from seedcore.core.limits import MAX_LISTED, MAX_PAGE, check_statuses
from seedcore.registry.following.pages import pages_of
from seedcore.registry.protocol.connection import RegistryConnection, shared_connection
from seedcore.settings import Settings, get_settings


async def list_active_instances(
    organ_id: str | None = None,
    labels: Mapping[str, str] | None = None,
    *,
    endpoint: str | None = None,
    settings: Settings | None = None,
) -> Listing:
    """Every alive instance of the current epoch, from the registry: all pages. `endpoint` is the name of one that it
    must have.

    Raises RegistryUnavailableError if the registry does not answer: an empty list means that there are no agents.
    """
    settings = settings if settings is not None else get_settings()
    connection = shared_connection(settings.namespace, settings.call_timeout_s)
    return await every_page(connection, organ_id=organ_id, labels=labels, endpoint=endpoint)


async def every_page(
    connection: RegistryConnection,
    statuses: tuple[Status, ...] | None = (Status.ALIVE,),
    organ_id: str | None = None,
    labels: Mapping[str, str] | None = None,
    *,
    fresh_only: bool = True,
    page_size: int = MAX_LISTED,
    endpoint: str | None = None,
) -> Listing:
    """All pages of `list_active` as one listing. It is as old, and as complete, as its first page."""
    wanted = InstanceFilter(
        statuses=check_statuses(statuses),
        organ_id=organ_id,
        labels=labels if labels is not None else {},
        fresh_only=fresh_only,
        endpoint=endpoint,
    )
    return await every_match(connection, wanted, page_size)


async def every_match(connection: RegistryConnection, wanted: InstanceFilter, page_size: int = MAX_LISTED) -> Listing:
    """As `every_page`, for any filter."""
    if wanted.statuses is not None and Status.DEAD in wanted.statuses:
        # the dead are in the database only
        page_size = min(page_size, MAX_PAGE)
    async with aclosing(pages_of(connection, wanted, page_size)) as found:
        pages = [page async for page in found]
    return replace(
        pages[0],
        items=tuple(instance for page in pages for instance in page.items),
        complete=all(page.complete for page in pages),
        next_cursor=None,
    )
