"""Alarms: each is raised by what it is for, and by nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sgan_dist.config import Config
from sgan_dist.gan import losses
from sgan_dist.run import alarms
from sgan_dist.run.trainer import train
from tests.conftest import small_config
from tests.ranks import run_ranks


def train_rank(rank: int, config: Config) -> dict[str, Any]:
    return train(config)


def train_with_the_tutorials_bracket(rank: int, config: Config) -> dict[str, Any]:
    """The tutorial writes p(real) as 1 - (1 / Z + 1), which is -1 / Z; it means Z / (Z + 1)."""

    def log_clipped(log_odds: Tensor) -> Tensor:
        p = 1 - (1 / log_odds.exp() + 1)
        return p.clamp(1e-7, 1 - 1e-7).log()

    losses.real = lambda log_odds, count: -log_clipped(log_odds).sum() / count
    return train(config)


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.process
def test_the_tutorials_dead_head_raises_the_alarm(digits: Path, tmp_path: Path) -> None:
    run_ranks(2, train_with_the_tutorials_bracket, small_config(digits, tmp_path))
    assert lines(tmp_path)
    assert all("the unlabeled loss has no gradient" in line["alarm"] for line in lines(tmp_path))
    # the loss that the tutorial prints: stuck at 15.42 or 16.12 by its clip
    assert all(15 < line["d/unlabeled"] < 17 for line in lines(tmp_path))


@pytest.mark.process
def test_a_sound_run_is_quiet(digits: Path, tmp_path: Path) -> None:
    run_ranks(1, train_rank, small_config(digits, tmp_path, "--train.sample_every=20"))
    assert all("alarm" not in line for line in lines(tmp_path))


def test_a_generator_whose_images_are_detected_for_long() -> None:
    state: dict[str, float] = {}
    raised = [alarms.check({"d/fakes_detected": 0.995}, 100, state) for _ in range(6)]
    assert [bool(messages) for messages in raised] == [False] * 4 + [True] * 2
    assert alarms.check({"validation_error": 0.1}, 100, state) == []
    assert alarms.check({"d/fakes_detected": 0.9}, 100, state) == []
    assert alarms.check({"d/fakes_detected": 0.995}, 100, state) == []


def test_mode_collapse_and_a_dead_generator() -> None:
    (message,) = alarms.check({"samples/spread": 0.001}, 1, {})
    assert "mode collapse" in message and "nearly identical" in message
    assert alarms.check({"samples/spread": 0.4}, 1, {}) == []
    assert "no gradient" in alarms.check({"g/gradient_norm": 0.0}, 1, {})[0]


def test_consistency_without_a_confident_target_yet_is_no_alarm() -> None:
    line = {"d/squared_logit_gradient/consistency": 0.0}
    assert "consistency loss has no gradient" in alarms.check(line, 50, {})[0]
    assert "no gradient" in alarms.check(line | {"d/confident": 0.9}, 50, {})[0]
    assert alarms.check(line | {"d/confident": 0.01}, 50, {}) == []
    other = {"d/squared_logit_gradient/unlabeled": 0.0, "d/confident": 0.01}
    assert "unlabeled" in alarms.check(other, 50, {})[0]


def test_a_saturated_but_living_loss_is_no_alarm() -> None:
    odds = torch.tensor([30.0], requires_grad=True)
    (gradient,) = torch.autograd.grad(losses.real(odds, 1), odds)
    assert float(gradient.square()) > 0
