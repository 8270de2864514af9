"""Logging of the registry and of discovery: to stderr, which Ray stores, as text or as one JSON object per line."""

from __future__ import annotations

import logging
from typing import Literal

from pythonjsonlogger.json import JsonFormatter

LogFormat = Literal["text", "json"]

_PLAIN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class FieldsFormatter(logging.Formatter):
    """Formats a record as text, followed by its fields as key=value."""

    def format(self, record: logging.LogRecord) -> str:
        fields = " ".join(f"{key}={value}" for key, value in vars(record).items() if key not in _PLAIN)
        line, newline, traceback = super().format(record).partition("\n")
        return f"{line} [{fields}]{newline}{traceback}" if fields else f"{line}{newline}{traceback}"


def log_to_stderr(log_format: LogFormat = "text") -> None:
    """Log to stderr from level INFO. Idempotent."""
    ours = logging.getLogger("seedcore")
    if any(isinstance(handler.formatter, (FieldsFormatter, JsonFormatter)) for handler in ours.handlers):
        return
    handler = logging.StreamHandler()
    if log_format == "json":
        names = {"asctime": "at", "levelname": "level", "name": "logger"}
        handler.setFormatter(JsonFormatter("%(asctime)s %(levelname)s %(name)s %(message)s", rename_fields=names))
    else:
        handler.setFormatter(FieldsFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    ours.addHandler(handler)
    ours.setLevel(logging.INFO)
    ours.propagate = False
