"""The document at /openapi.json is what the API does: requests made from it, good ones and bad ones, meet no fault and no
answer that it does not name."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
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
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) == sum(len(path) for path in document["paths"].values())
    for operation in operations:
        for mode in GenerationMode:
            await asyncio.to_thread(_try, operation, mode, world.url)
    assert (await world.registry.health()).is_ready


def _try(operation: Any, mode: GenerationMode, url: str) -> None:
    @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=mode))
    def run(case: Any) -> None:
        case.call_and_validate(base_url=url, checks=CHECKS)

    run()
