"""metrics.jsonl over restarts, and W&B: offline by itself, online with one id, never in the way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sgan_dist.config import parse
from sgan_dist.errors import UserError
from sgan_dist.tracking import Meters, Tracker


def track(run: Path, start: int, steps: list[int]) -> None:
    run.mkdir(exist_ok=True)
    tracker = Tracker(run, parse(["--tracking.wandb=false"])[0], start, active=True)
    for step in steps:
        tracker.log(step, {"loss": step / 2})
    tracker.close()


def steps(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_metrics_are_cut_back_to_the_restored_step(tmp_path: Path) -> None:
    track(tmp_path, 0, [10, 20, 30])
    track(tmp_path, 20, [30, 40])
    assert steps(tmp_path) == [10, 20, 30, 40]


def test_a_line_that_a_kill_cut_short_is_dropped(tmp_path: Path) -> None:
    track(tmp_path, 0, [10, 20])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 30, "lo')
    track(tmp_path, 20, [30])
    assert steps(tmp_path) == [10, 20, 30]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    Tracker(tmp_path, parse([])[0], 0, active=False).log(1, {"loss": 1})
    assert list(tmp_path.iterdir()) == []


def test_meters_go_on_from_a_checkpoint() -> None:
    straight, first = Meters({}), Meters({})
    for meters in (straight, first):
        meters.add({"loss": 1.0})
    second = Meters(json.loads(json.dumps(first.state)))
    for meters in (straight, second):
        meters.add({"loss": 4.0, "now_and_then": 7.0})
    assert straight.take() == second.take() == {"loss": 2.5, "now_and_then": 7.0}
    assert straight.state == {}


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    track(tmp_path, 0, [10, 20])
    text = (tmp_path / "metrics.jsonl").read_text().replace('"step": 10', '"step" 10')
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(UserError, match=r"damaged in line 1"):
        track(tmp_path, 20, [30])
