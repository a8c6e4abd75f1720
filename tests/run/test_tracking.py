"""metrics.jsonl over restarts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sgan_dist.config import parse
from sgan_dist.errors import UserError
from sgan_dist.run.tracking import Tracker


def track(run: Path, start: int, steps: list[int]) -> None:
    run.mkdir(exist_ok=True)
    tracker = Tracker(run, parse(["--tracking.wandb=false"]), start, active=True)
    for step in steps:
        tracker.log(step, {"loss": step / 2})
    tracker.close()


def steps(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_metrics_after_the_restored_step_are_removed(tmp_path: Path) -> None:
    track(tmp_path, 0, [10, 20, 30])
    track(tmp_path, 20, [30, 40])
    assert steps(tmp_path) == [10, 20, 30, 40]


def test_a_line_that_a_kill_cut_short_is_removed(tmp_path: Path) -> None:
    track(tmp_path, 0, [10, 20])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 30, "lo')
    track(tmp_path, 20, [30])
    assert steps(tmp_path) == [10, 20, 30]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    Tracker(tmp_path, parse([]), 0, active=False).log(1, {"loss": 1})
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    track(tmp_path, 0, [10, 20])
    text = (tmp_path / "metrics.jsonl").read_text().replace('"step": 10', '"step" 10')
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(UserError, match=r"damaged in line 1"):
        track(tmp_path, 20, [30])
