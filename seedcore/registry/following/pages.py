"""The pages of a listing, one after the other."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from seedcore.core.answers import InstanceFilter, Listing
from seedcore.core.limits import MAX_LISTED
from seedcore.core.timeouts import abandon
from seedcore.registry.following.nearby import FeedSource


async def pages_of(
    source: FeedSource, wanted: InstanceFilter, page_size: int = MAX_LISTED
) -> AsyncGenerator[Listing, None]:
    """Every page, in order; the registry makes the next one while a page is read. Close it at the end."""
    asked: asyncio.Task[Listing] | None = _asked(source, wanted, page_size, None)
    try:
        while asked is not None:
            page = await asked
            asked = _asked(source, wanted, page_size, page.next_cursor) if page.next_cursor else None
            yield page.unpacked()
    finally:
        if asked is not None:
            abandon(asked)


def _asked(source: FeedSource, wanted: InstanceFilter, page_size: int, cursor: str | None) -> asyncio.Task[Listing]:
    return asyncio.create_task(source.page(wanted, page_size, cursor, packed=True), name="page-asked")
