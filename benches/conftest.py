"""Where the data sets lie, for the benches that use them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def data():
    """The folder with the data sets: `WHISPER_FAST_DATA`, else `../shared/data` beside the project."""
    folder = Path(os.environ.get("WHISPER_FAST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"there are no data sets in {folder} (WHISPER_FAST_DATA says where they are)")
    return folder
