"""JSON of the database as HTTP shows it. Another program may have stored any object: no answer fails because of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator

from seedcore.core.limits import MAX_METADATA_DEPTH


def as_texts(labels: Mapping[str, Any]) -> dict[str, str]:
    """Labels as text; a value that is no text as JSON."""
    return {key: value if isinstance(value, str) else _json_text(value) for key, value in labels.items()}


def _without_depths(value: Any, depth_left: int = MAX_METADATA_DEPTH) -> Any:
    if not isinstance(value, (Mapping, list)):
        return value
    if depth_left == 0:
        return _json_text(value)
    if isinstance(value, Mapping):
        return {key: _without_depths(child, depth_left - 1) for key, child in value.items()}
    return [_without_depths(child, depth_left - 1) for child in value]


def _json_text(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except RecursionError:
        return "nested too deeply to be shown"


Labels = Annotated[dict[str, str], BeforeValidator(as_texts)]
Metadata = Annotated[dict[str, Any], BeforeValidator(_without_depths)]
