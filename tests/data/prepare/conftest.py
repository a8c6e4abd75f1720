"""Tars to index, and the log, for all tests of preparing."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.prepare.tars import classified, downloaded, write_tar


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    """A folder of three unlabeled shards, two labeled, one for validation, and one for the test."""
    root = tmp_path / "tars"
    for number in range(3):
        failed = {number * 10 + 1, number * 10 + 9} if number else set()
        write_tar(root / f"web-{number:03d}.tar", downloaded(number * 10, 10, failed))
    for number in range(2):
        write_tar(root / f"train-{number}.tar", classified(100 + 6 * number, 6))
    write_tar(root / "val.tar", classified(200, 6))
    write_tar(root / "test.tar", classified(300, 9))
    return root
