"""Datasets that the tests of data/ share."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def digits_copy(digits: Path, tmp_path: Path) -> Path:
    """A copy of the embedded digits for one test, which may change it."""
    return Path(shutil.copytree(digits, tmp_path / "digits"))
