"""Programs that some tests need and that pip cannot bring."""

from __future__ import annotations

import os
import shutil

import pytest


def needs(program):
    """Return the program's path; without it the test is skipped with the reason, or fails where CI=true."""
    if path := shutil.which(program):
        return path
    reason = f"{program} is not installed (apt-get install {program})"
    if os.environ.get("CI") == "true":
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)
