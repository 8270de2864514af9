"""Programs that some tests need: without one they are skipped, or fail where CI asks for it."""

from __future__ import annotations

from typing import NoReturn

import pytest


def is_missing(request: pytest.FixtureRequest, what: str, package: str, option: str) -> NoReturn:
    """Skip the test for want of Debian's `package`, or fail with the option of pytest that requires it."""
    missing = f"{what} is not installed here (apt-get install {package})"
    if request.config.getoption(option):
        pytest.fail(missing)
    pytest.skip(missing)
