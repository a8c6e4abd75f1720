"""train(config) as a library function: called again in one process, it returns or raises."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from sgan_dist.errors import NonFiniteLoss, StopRequested, UserError
from sgan_dist.evaluation.metrics import evaluate_run
from sgan_dist.run import rundir
from sgan_dist.run.trainer import train
from tests.conftest import small_config
from tests.ranks import run_ranks

pytestmark = pytest.mark.process


def train_again_and_again(rank: int, root: Path, run: Path) -> list[dict[str, Any]]:
    """A run that is extended, stopped, refused and resumed by calls in one process."""
    summaries = [train(small_config(root, run, "--train.steps=6"))]
    assert train(small_config(root, run, "--train.steps=6")) == summaries[0]
    (run / "STOP").touch()
    with pytest.raises(StopRequested, match="stopped after 6 of 12 steps by a STOP file") as stop:
        train(small_config(root, run, "--train.steps=12"))
    assert stop.value.by_hand
    # in_use takes the lock for a moment, so two ranks must not ask at once
    assert rank > 0 or not rundir.in_use(run)
    with pytest.raises(UserError, match="seed was 0 and is now 1"):
        train(small_config(root, run, "--train.steps=12", "--seed=1"))
    summaries.append(train(small_config(root, run, "--train.steps=12")))
    return summaries


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_process_trains_again_and_again(world_size: int, digits: Path, tmp_path: Path) -> None:
    ranks = run_ranks(world_size, train_again_and_again, digits, tmp_path)
    assert all(summaries == ranks[0] for summaries in ranks)
    first, last = ranks[0]
    assert (first["step"], last["step"], last["restarts"]) == (6, 12, 2)
    assert last == json.loads((tmp_path / "summary.json").read_text())
    assert (tmp_path / "DONE").exists() and not (tmp_path / "STOP").exists()


def fail_and_recover(rank: int, root: Path, run: Path) -> None:
    """A run whose weights become NaN in its first process, and a bug in a user's network."""
    from tests import own_models

    own = ("--model.discriminator=tests.own_models:WithBatchNorm", "--model.discriminator_args={}")
    config = small_config(root, run, *own, "--train.steps=4", "--checkpoint.every=2")
    forward = own_models.WithBatchNorm.forward

    def not_finite(self: Any, images: torch.Tensor, rng: Any = None) -> Any:
        output = forward(self, images, rng)
        return type(output)(output.logits * float("nan"), output.features)

    def bug(self: Any, images: torch.Tensor, rng: Any = None) -> Any:
        raise ZeroDivisionError("a bug")

    def interrupt(self: Any, images: torch.Tensor, rng: Any = None) -> Any:
        raise KeyboardInterrupt

    for replacement, error in (
        (not_finite, NonFiniteLoss),
        (bug, ZeroDivisionError),
        (interrupt, KeyboardInterrupt),
    ):
        own_models.WithBatchNorm.forward = replacement  # type: ignore[method-assign]
        with pytest.raises(error):
            train(config)
        assert not rundir.in_use(run)
    own_models.WithBatchNorm.forward = forward  # type: ignore[method-assign]
    assert train(config)["step"] == 4
    assert evaluate_run(run, "test", None).images == 1000


def test_after_an_error_the_same_call_works(digits: Path, tmp_path: Path) -> None:
    run_ranks(1, fail_and_recover, digits, tmp_path)
    ids = json.loads((tmp_path / "nonfinite-step-00000000.json").read_text())
    assert len(ids["ranks"][0]["labeled"]) == 12 and len(ids["ranks"][0]["unlabeled"]) == 24
    # an error is for the caller: only the command line writes FAILED
    assert not (tmp_path / "FAILED").exists()


def log_of(rank: int, root: Path, run: Path) -> tuple[list[str], bool]:
    messages: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    package = logging.getLogger("sgan_dist")
    untouched = not package.handlers and package.propagate and package.level == logging.NOTSET
    logging.getLogger().addHandler(Handler())
    logging.getLogger().setLevel(logging.INFO)
    train(small_config(root, run, "--train.steps=8"))
    return messages, untouched and not package.handlers


def test_logging_is_left_to_the_caller(digits: Path, tmp_path: Path) -> None:
    ((messages, untouched),) = run_ranks(1, log_of, digits, tmp_path)
    assert untouched
    assert any("a step is 12 labeled + 24 unlabeled + 12 generated" in line for line in messages)
    assert any(line.startswith("step 4/8 ") for line in messages)


def test_a_run_keeps_the_precision_with_which_it_began(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    auto = "--machine.precision=auto"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    train(small_config(digits, tmp_path, auto, "--train.steps=2"))
    assert "bf16 (--mixed_precision)" in log.text
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    log.clear()
    assert train(small_config(digits, tmp_path, auto, "--train.steps=3"))["step"] == 3
    assert "bf16 (auto: as the run began)" in log.text
    with pytest.raises(UserError, match="precision was 'bf16' and is now 'fp64'"):
        train(small_config(digits, tmp_path, "--machine.precision=fp64", "--train.steps=3"))
