"""The dashboard page, the page of the API and their parts, from the files beside this module."""

from __future__ import annotations

import mimetypes
from functools import lru_cache
from importlib import resources

from fastapi import APIRouter, Response
from starlette.exceptions import HTTPException

router = APIRouter(include_in_schema=False)

_FOLDER = resources.files("seedcore.discovery") / "page_files"
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
# Swagger UI has its icons in its style sheet
_DOCS_POLICY = _POLICY.replace("img-src 'self'", "img-src 'self' data:")
_HEADERS = {
    "Cache-Control": "no-cache",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


@router.get("/")
async def index() -> Response:
    """The page."""
    return _file("index.html")


@router.get("/docs")
async def docs() -> Response:
    """The HTTP API, by Swagger UI."""
    return _file("docs.html", _DOCS_POLICY)


@router.get("/page/{name}")
async def part(name: str) -> Response:
    """A file of the page."""
    return _file(name)


def _file(name: str, policy: str = _POLICY) -> Response:
    files = _files()
    if name not in files:
        raise HTTPException(404, "the page has no such file")
    media_type = mimetypes.guess_type(name)[0] or "application/octet-stream"
    return Response(files[name], media_type=media_type, headers={**_HEADERS, "Content-Security-Policy": policy})


@lru_cache(maxsize=1)
def _files() -> dict[str, bytes]:
    return {entry.name: entry.read_bytes() for entry in _FOLDER.iterdir() if entry.is_file()}
