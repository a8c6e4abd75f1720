"""A resumed run equals an uninterrupted one, bit for bit at equal world size."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import small_config
from tests.distributed.runs import MLP, TUTORIAL, metrics, summary, train_rank
from tests.ranks import run_ranks

pytestmark = pytest.mark.process

# The rate must not depend on train.steps, which is what ends the first half.
OPTIONS = ("--optim.decay=0", "--train.evaluate_every=5")
OWN = ("--model.discriminator=tests.own_models:WithBatchNorm", "--model.discriminator_args={}")
CONSISTENCY = ("--loss.consistency=1", "--teacher_augment.translate=1")


@pytest.mark.parametrize(
    ("world_size", "dataset", "options"),
    [
        (1, "digits", ()),
        (2, "digits", ()),
        (4, "digits", ()),
        (2, "windowed", CONSISTENCY),
        (1, "digits", OWN),
        (2, "digits", TUTORIAL),
        (2, "digits", MLP),
        pytest.param(1, "windowed", (), marks=pytest.mark.slow),
        pytest.param(4, "windowed", (), marks=pytest.mark.slow),
        pytest.param(4, "digits", TUTORIAL, marks=pytest.mark.slow),
        pytest.param(4, "digits", CONSISTENCY, marks=pytest.mark.slow),
    ],
)
def test_ten_steps_equal_five_and_five(
    world_size: int,
    dataset: str,
    options: tuple[str, ...],
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    root = request.getfixturevalue(dataset)
    options = (*OPTIONS, *options)
    straight_config = small_config(root, tmp_path / "a", *options, "--train.steps=10")
    run_ranks(world_size, train_rank, straight_config)
    for steps in (5, 10):
        config = small_config(root, tmp_path / "b", *options, f"--train.steps={steps}")
        run_ranks(world_size, train_rank, config)
    straight, resumed = summary(tmp_path / "a"), summary(tmp_path / "b")
    assert straight["weights_sha256"] == resumed["weights_sha256"]
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")
    assert straight["test_error"] == resumed["test_error"]
