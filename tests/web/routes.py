"""Every route of the HTTP API, and what each token gets from it."""

from __future__ import annotations

from typing import Any

import httpx

from tests.serving import World

NOBODY = "00000000-0000-4000-8000-000000000009"

# what a request is answered once it is allowed
OPEN = {
    ("GET", "/"): 200,
    ("GET", "/page/app.js"): 200,
    ("GET", "/page/none.js"): 404,
    ("GET", "/docs"): 200,
    ("GET", "/openapi.json"): 200,
    ("GET", "/static-offline-docs/swagger-ui.css"): 200,
    ("GET", "/healthz"): 200,
    ("GET", "/readyz"): 200,
    ("GET", "/v1/access"): 200,
}
READ = {
    ("GET", "/v1/overview"): 200,
    ("GET", "/v1/instances"): 200,
    ("GET", f"/v1/instances/{NOBODY}"): 404,
    ("GET", "/v1/agents/ant"): 200,
    ("GET", "/v1/history/ant"): 200,
    ("GET", "/v1/deaths"): 200,
    ("GET", "/v1/epoch"): 200,
    ("GET", "/v1/watch"): 200,
    ("GET", "/v1/endpoints?name=http"): 200,
    ("GET", "/v1/sd/prometheus?name=http"): 200,
    ("POST", "/v1/resolve"): 200,
    ("GET", "/v1/resolve/ant"): 200,
    ("GET", "/v1/resolve/nobody"): 404,
    ("GET", "/no/such/route"): 404,
}
WRITE = {
    ("POST", "/v1/agents/nobody/drain"): 404,
    ("POST", "/v1/agents/nobody/undrain"): 404,
    ("DELETE", "/v1/agents/nobody"): 404,
    ("DELETE", f"/v1/instances/{NOBODY}"): 404,
    ("PUT", "/v1/instances"): 405,
    ("POST", "/v1/resolve/ant"): 405,
    ("POST", "/healthz"): 405,
}


async def status_of(world: World, method: str, path: str, headers: dict[str, str]) -> httpx.Response:
    body: dict[str, Any] = {"json": {"logical_ids": ["ant"]} if path.endswith("resolve") else {}}
    async with (
        httpx.AsyncClient(base_url=world.url, timeout=30) as client,
        client.stream(method, path, headers=headers, **(body if method == "POST" else {})) as answer,
    ):
        # a stream of events has no end
        if "event-stream" not in answer.headers.get("content-type", ""):
            await answer.aread()
        return answer


async def check_every_route(world: World) -> None:
    """Every route gives each caller what was granted, and no more."""
    document = await world.get("/openapi.json")
    named = {(method.upper(), path) for path, operations in document["paths"].items() for method in operations}
    tried = {(method, path.split("?")[0]) for method, path in (*OPEN, *READ, *WRITE)}
    shapes = {
        (method, path.replace("{logical_id}", "nobody").replace("{instance_id}", NOBODY)) for method, path in named
    }
    missing = {(method, path.replace("nobody", "ant")) for method, path in shapes - tried} - tried
    assert missing == set(), "a route that nobody tries here"

    secrets = {"none": None, "wrong": "sct_wrong", "expired": world.tokens.expired}
    secrets |= {"read": world.tokens.read, "write": world.tokens.write}
    for (method, path), allowed in {**OPEN, **READ, **WRITE}.items():
        for who, secret in secrets.items():
            headers = {} if secret is None else {"Authorization": f"Bearer {secret}"}
            answer = await status_of(world, method, path, headers)
            is_refused = (method, path) not in OPEN and who not in {"read", "write"}
            expected = 401 if is_refused else 403 if who == "read" and (method, path) in WRITE else allowed
            assert answer.status_code == expected, (method, path, who)
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert answer.headers["x-frame-options"] == "DENY"
