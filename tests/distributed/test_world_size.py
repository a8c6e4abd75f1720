"""World size changes neither samples nor gradients: the same parameters after 20 steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sgan_dist import checkpoint, losses, trainer
from sgan_dist.config import Config
from sgan_dist.errors import UserError
from sgan_dist.trainer import fit
from tests.conftest import small_config
from tests.ranks import run_ranks

EXACT = (
    "--train.precision=fp64",
    "--optim.name=sgd",
    "--optim.lr=0.005",
    "--optim.generator_lr=0.005",
)


CONSISTENCY = (
    "--loss.consistency=1",
    "--teacher_augment.translate=1",
    "--augment.elastic=1",
    "--augment.thickness=0.5",
    "--augment.flip=0.5",
)
EXPLICIT = ("--loss.form=explicit", "--loss.generator=non_saturating", "--optim.clip_norm=1")
TERMS = (
    *CONSISTENCY,
    "--optim.lr=1e-3",
    "--optim.generator_lr=1e-3",
    "--loss.threshold=0.4",
)
BOOK = (
    "--model.discriminator=book",
    "--model.generator=book",
    "--model.discriminator_args={}",
    "--model.generator_args={}",
    "--loss.generator=non_saturating",
    "--optim.lr=1e-3",
    "--optim.generator_lr=1e-3",
    "--train.steps=8",
)
MLP = (
    "--model.discriminator=mlp",
    "--model.generator=mlp",
    '--model.discriminator_args={"sizes": [40, 20]}',
    '--model.generator_args={"width": 20}',
)


def parameters(run: Path) -> dict[str, Tensor]:
    """All tensors of the last checkpoint's networks."""
    path, _ = checkpoint.latest(run)
    assert path is not None
    state = checkpoint.read_state(path)
    return {
        **{f"d.{k}": v for k, v in state["discriminator"]["network"].items()},
        **{f"g.{k}": v for k, v in state["generator"]["network"].items()},
        **{f"ema.{k}": v for k, v in state["average"].items()},
    }


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[key] - b[key]).abs().max()) for key in a)


def train(rank: int, config: Config) -> int:
    return fit(config)


def train_with_naive_matching(rank: int, config: Config) -> int:
    """What most code does: each rank matches its own means, and gradients are averaged."""

    def per_rank(
        real_mean: Tensor, fake: Tensor, fake_mean: Tensor, count: int, shares: int
    ) -> Tensor:
        return (real_mean - fake.mean(0)).square().mean() / shares

    losses.feature_matching = per_rank
    return fit(config)


@pytest.mark.parametrize(
    ("worlds", "dataset", "options"),
    [
        ((2, 3, 4), "digits", ()),
        ((2,), "digits", EXPLICIT),
        ((2,), "digits", BOOK),
        ((3,), "digits", MLP),
        ((3,), "windowed", CONSISTENCY),
        ((2,), "digits", TERMS),
        pytest.param((3, 4), "digits", EXPLICIT, marks=pytest.mark.slow),
        pytest.param((3, 4), "digits", BOOK, marks=pytest.mark.slow),
        pytest.param((2, 4), "digits", MLP, marks=pytest.mark.slow),
        pytest.param((2, 4), "windowed", CONSISTENCY, marks=pytest.mark.slow),
        pytest.param((3,), "digits", (*TERMS, *EXPLICIT), marks=pytest.mark.slow),
    ],
)
def test_ranks_train_as_one(
    worlds: tuple[int, ...],
    dataset: str,
    options: tuple[str, ...],
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    root = request.getfixturevalue(dataset)
    for world_size in (1, *worlds):
        config = small_config(root, tmp_path / str(world_size), *EXACT, *options)
        assert run_ranks(world_size, train, config) == [0] * world_size
    alone = parameters(tmp_path / "1")
    for world_size in worlds:
        assert largest_difference(alone, parameters(tmp_path / str(world_size))) < 1e-12


@pytest.mark.parametrize(
    ("world_size", "parts", "options"),
    [
        (1, 4, ()),
        (2, 3, CONSISTENCY),
        (2, 2, EXPLICIT),
        (2, 2, TERMS),
        pytest.param(3, 2, MLP, marks=pytest.mark.slow),
    ],
)
def test_accumulation_trains_as_one_pass(
    world_size: int, parts: int, options: tuple[str, ...], digits: Path, tmp_path: Path
) -> None:
    run_ranks(1, train, small_config(digits, tmp_path / "whole", *EXACT, *options))
    config = small_config(
        digits, tmp_path / "parts", *EXACT, *options, f"--train.accumulation={parts}"
    )
    run_ranks(world_size, train, config)
    assert (
        largest_difference(parameters(tmp_path / "whole"), parameters(tmp_path / "parts")) < 1e-12
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (BOOK, "train.accumulation is 2, and the discriminator has batch norm"),
        (("--data.labeled_batch=6", "--data.unlabeled_batch=25"), "train.accumulation is 2.*25"),
    ],
)
def test_what_can_not_be_accumulated_is_refused(
    options: tuple[str, ...], message: str, digits: Path, tmp_path: Path
) -> None:
    config = small_config(digits, tmp_path, *options, "--train.accumulation=2")
    with pytest.raises(UserError, match=message):
        fit(config)


def train_with_a_stray_replica(rank: int, config: Config) -> int:
    """Rank 1 goes its own way, in one weight, after some steps."""
    original = trainer.generator_step

    def stray(networks: Any, batch: Any, *rest: Any) -> Any:
        if rank == 1 and batch.step == 5:
            with torch.no_grad():
                list(networks.discriminator.network.parameters())[2].view(-1)[0] += 1e-6
        return original(networks, batch, *rest)

    trainer.generator_step = stray
    return fit(config)


def test_replicas_that_differ_stop_the_run(digits: Path, tmp_path: Path) -> None:
    config = small_config(digits, tmp_path, "--train.replica_check_every=4", "--checkpoint.every=4")
    message = "step 8: .*discriminator.*differs between ranks.*--train.replica_check_every"
    with pytest.raises(RuntimeError, match=message):
        run_ranks(2, train_with_a_stray_replica, config)
    path, _ = checkpoint.latest(tmp_path)
    assert path is not None and path.name == "step-00000004"


def test_matching_means_rank_by_rank_is_another_loss(digits: Path, tmp_path: Path) -> None:
    run_ranks(1, train, small_config(digits, tmp_path / "1", *EXACT))
    run_ranks(2, train_with_naive_matching, small_config(digits, tmp_path / "2", *EXACT))
    assert largest_difference(parameters(tmp_path / "1"), parameters(tmp_path / "2")) > 1e-6


def test_world_size_may_change_at_any_checkpoint(digits: Path, tmp_path: Path) -> None:
    for world_size, steps in ((2, 7), (1, 12), (4, 20)):
        config = small_config(
            digits, tmp_path / "changing", *EXACT, f"--train.steps={steps}", "--optim.decay=0"
        )
        run_ranks(world_size, train, config)
    straight = small_config(digits, tmp_path / "constant", *EXACT, "--optim.decay=0")
    run_ranks(1, train, straight)
    same = largest_difference(parameters(tmp_path / "constant"), parameters(tmp_path / "changing"))
    assert same < 1e-12


@pytest.mark.parametrize("options", [(), TERMS])
def test_bf16_trains_on_two_ranks(options: tuple[str, ...], digits: Path, tmp_path: Path) -> None:
    config = small_config(digits, tmp_path, *options, "--train.precision=bf16", "--train.steps=4")
    assert run_ranks(2, train, config) == [0, 0]
    assert all(tensor.isfinite().all() for tensor in parameters(tmp_path).values())
