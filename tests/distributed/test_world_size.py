"""World size changes neither samples nor gradients: the same parameters after 20 steps."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import Tensor

from sgan_dist import checkpoint
from sgan_dist.config import Config
from sgan_dist.errors import UserError
from sgan_dist.gan import losses
from sgan_dist.run.trainer import train
from tests.conftest import small_config
from tests.distributed.runs import (
    CONSISTENCY,
    EXACT,
    MLP,
    TERMS,
    TUTORIAL,
    largest_difference,
    metrics,
    parameters,
    train_rank,
)
from tests.ranks import run_ranks

pytestmark = pytest.mark.process

EXPLICIT = ("--loss.form=explicit", "--loss.generator=non_saturating", "--optim.clip_norm=1")
TUTORIAL_PAIR = (
    *TUTORIAL,
    "--model.generator=tutorial",
    "--model.generator_args={}",
    "--loss.generator=non_saturating",
    "--optim.lr=1e-3",
    "--optim.generator_lr=1e-3",
    "--train.steps=8",
)
# 3 and 8 ranks have unequal shares, and at 8 some have no labeled or no generated image
UNEVEN = ("--batch.labeled=4", "--batch.unlabeled=11", "--batch.fake=5")
ALONE = (
    "--train.supervised_only=true",
    "--batch.labeled=4",
    "--optim.clip_norm=0.1",
)  # of 8 ranks, 4 have none
MLP_PAIR = (*MLP, "--model.generator=mlp", '--model.generator_args={"width": 20}')


def train_with_naive_matching(rank: int, config: Config) -> int:
    """What most code does: each rank matches its own means, and gradients are averaged."""

    def per_rank(
        real_mean: Tensor, fake_features: Tensor, fake_mean: Tensor, count: int, shares: int
    ) -> Tensor:
        return (real_mean - fake_features.mean(0)).square().mean() / shares

    losses.feature_matching = per_rank
    return train_rank(rank, config)


@pytest.mark.parametrize(
    ("worlds", "dataset", "options"),
    [
        ((4,), "digits", ()),
        ((2,), "digits", EXPLICIT),
        ((2,), "digits", TUTORIAL_PAIR),
        ((3,), "digits", MLP_PAIR),
        ((3,), "windowed", CONSISTENCY),
        ((2,), "digits", TERMS),
        ((3,), "digits", (*UNEVEN, *TERMS)),
        ((5,), "digits", (*ALONE, "--augment.elastic=1")),
        pytest.param((8,), "digits", UNEVEN, marks=pytest.mark.slow),
        pytest.param((8,), "digits", ALONE, marks=pytest.mark.slow),
        pytest.param((3, 5), "digits", (*UNEVEN, *TUTORIAL_PAIR), marks=pytest.mark.slow),
        pytest.param((3,), "digits", (*UNEVEN, *MLP_PAIR), marks=pytest.mark.slow),
        pytest.param((5,), "windowed", CONSISTENCY, marks=pytest.mark.slow),
        pytest.param((2, 3), "digits", (), marks=pytest.mark.slow),
        pytest.param((3, 4), "digits", EXPLICIT, marks=pytest.mark.slow),
        pytest.param((3, 4), "digits", TUTORIAL_PAIR, marks=pytest.mark.slow),
        pytest.param((2, 4), "digits", MLP_PAIR, marks=pytest.mark.slow),
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
        assert run_ranks(world_size, train_rank, config) == [config.train.steps] * world_size
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
        (2, 4, (*UNEVEN, *CONSISTENCY)),
        pytest.param(3, 2, MLP_PAIR, marks=pytest.mark.slow),
    ],
)
def test_accumulation_trains_as_one_pass(
    world_size: int, parts: int, options: tuple[str, ...], digits: Path, tmp_path: Path
) -> None:
    run_ranks(1, train_rank, small_config(digits, tmp_path / "whole", *EXACT, *options))
    config = small_config(
        digits, tmp_path / "parts", *EXACT, *options, f"--batch.accumulation={parts}"
    )
    run_ranks(world_size, train_rank, config)
    assert (
        largest_difference(parameters(tmp_path / "whole"), parameters(tmp_path / "parts")) < 1e-12
    )


def test_what_cannot_be_accumulated_is_refused(digits: Path, tmp_path: Path) -> None:
    config = small_config(digits, tmp_path, *TUTORIAL_PAIR, "--batch.accumulation=2")
    with pytest.raises(UserError, match="accumulation is 2, and the discriminator has batch norm"):
        train(config)


def test_replicas_that_differ_stop_the_run(digits: Path, tmp_path: Path) -> None:
    own = "--model.discriminator=tests.own_models:ChangesOnRankOne"
    every = ("--machine.replica_check_every=4", "--checkpoint.every=4")
    config = small_config(digits, tmp_path, own, "--model.discriminator_args={}", *every)
    message = "step 8: .*discriminator.*differs between ranks.*--machine.replica_check_every"
    with pytest.raises(RuntimeError, match=message):
        run_ranks(2, train_rank, config)
    path, _ = checkpoint.latest(tmp_path)
    assert path is not None and path.name == "step-00000004"


def test_accumulation_changes_nothing_in_bf16(digits: Path, tmp_path: Path) -> None:
    """Positions of the augmentation are fp32 in every pass, with autocast on too."""
    options = ("--machine.precision=bf16", "--train.steps=1", "--train.log_every=1")
    unmoved = "--optim.lr=1e-12"  # so that G's loss is compared at equal weights of D
    values = []
    for parts in (1, 2):
        run = tmp_path / str(parts)
        config = small_config(digits, run, *options, unmoved, f"--batch.accumulation={parts}")
        run_ranks(1, train_rank, config)
        values.append(metrics(run)[0]["g/feature_matching"])
    assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_matching_means_rank_by_rank_is_another_loss(digits: Path, tmp_path: Path) -> None:
    run_ranks(1, train_rank, small_config(digits, tmp_path / "1", *EXACT))
    run_ranks(2, train_with_naive_matching, small_config(digits, tmp_path / "2", *EXACT))
    assert largest_difference(parameters(tmp_path / "1"), parameters(tmp_path / "2")) > 1e-6


def test_world_size_may_change_at_any_checkpoint(digits: Path, tmp_path: Path) -> None:
    for world_size, steps in ((2, 7), (1, 12), (4, 20)):
        config = small_config(
            digits, tmp_path / "changing", *EXACT, f"--train.steps={steps}", "--optim.decay=0"
        )
        run_ranks(world_size, train_rank, config)
    straight = small_config(digits, tmp_path / "constant", *EXACT, "--optim.decay=0")
    run_ranks(1, train_rank, straight)
    same = largest_difference(parameters(tmp_path / "constant"), parameters(tmp_path / "changing"))
    assert same < 1e-12


@pytest.mark.parametrize("options", [(), TERMS])
def test_bf16_trains_on_two_ranks(options: tuple[str, ...], digits: Path, tmp_path: Path) -> None:
    config = small_config(digits, tmp_path, *options, "--machine.precision=bf16", "--train.steps=4")
    assert run_ranks(2, train_rank, config) == [4, 4]
    assert all(tensor.isfinite().all() for tensor in parameters(tmp_path).values())
