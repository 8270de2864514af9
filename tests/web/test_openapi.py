"""The document at /openapi.json is what the API does: requests made from it, good ones and bad ones, meet no fault and
no answer that it does not name."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from tests.serving import World

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    unsupported_method,
]
EXAMPLES = 15
# a stream has no end
ENDLESS = "/v1/watch"


@pytest.mark.timeout(300)
async def test_no_request_that_the_document_allows_or_forbids_is_a_fault(world: World) -> None:
    document: dict[str, Any] = await world.get("/openapi.json")
    del document["paths"][ENDLESS]
    schema = schemathesis.openapi.from_dict(document)
    operations = [found.ok() for found in schema.get_all_operations() if isinstance(found, Ok)]
    assert len(operations) == sum(len(path) for path in document["paths"].values())
    for operation in operations:
        await asyncio.to_thread(_try, operation, GenerationMode.POSITIVE, world.url)
        # where any text will do there is nothing to get wrong
        with suppress(Unsatisfiable):
            await asyncio.to_thread(_try, operation, GenerationMode.NEGATIVE, world.url)
    assert (await world.registry.health()).is_ready


def _try(operation: Any, mode: GenerationMode, url: str) -> None:
    @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=mode))
    def run(case: Any) -> None:
        case.call_and_validate(base_url=url, checks=CHECKS)

    run()
