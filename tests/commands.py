"""The `seedcore` command in the tests' own process: for what it refuses before it needs a cluster."""

from __future__ import annotations

import io
import sys
from contextlib import redirect_stderr, redirect_stdout
from typing import NamedTuple

import pytest

from seedcore.cli import main


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    stdout: str
    stderr: str


def command(*words: str, **environment: str) -> Ended:
    """Run the command as its program does, these variables set."""
    stdout, stderr, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(stdout), redirect_stderr(stderr):
        patch.setattr(sys, "argv", ["seedcore", *words])
        for name, value in environment.items():
            patch.setenv(name, value)
        try:
            main()
        except SystemExit as ended:
            code = int(ended.code or 0)
    return Ended(code, stdout.getvalue(), stderr.getvalue())
