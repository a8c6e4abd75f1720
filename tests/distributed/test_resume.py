"""A resumed run equals an uninterrupted one, bit for bit at equal world size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sgan_dist.config import Config
from sgan_dist.trainer import fit
from tests.conftest import small_config
from tests.ranks import run_ranks

# The rate must not depend on train.steps, which is what ends the first half.
OPTIONS = ("--optim.decay=0", "--train.evaluate_every=5")


def train(rank: int, config: Config) -> int:
    return fit(config)


def summary(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text())  # type: ignore[no-any-return]


def metrics(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]


OWN = ("--model.discriminator=tests.own_models:WithBatchNorm", "--model.discriminator_args={}")
BOOK = ("--model.discriminator=book", "--model.discriminator_args={}")
MLP = ("--model.discriminator=mlp", '--model.discriminator_args={"sizes": [40, 20]}')
CONSISTENCY = ("--loss.consistency=1", "--teacher_augment.translate=1")


@pytest.mark.parametrize(
    ("world_size", "dataset", "options"),
    [
        (1, "digits", ()),
        (2, "digits", ()),
        (4, "digits", ()),
        (2, "windowed", CONSISTENCY),
        (1, "digits", OWN),
        (2, "digits", BOOK),
        (2, "digits", MLP),
        pytest.param(1, "windowed", (), marks=pytest.mark.slow),
        pytest.param(4, "windowed", (), marks=pytest.mark.slow),
        pytest.param(4, "digits", BOOK, marks=pytest.mark.slow),
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
    run_ranks(world_size, train, small_config(root, tmp_path / "a", *options, "--train.steps=10"))
    for steps in (5, 10):
        config = small_config(root, tmp_path / "b", *options, f"--train.steps={steps}")
        run_ranks(world_size, train, config)
    straight, resumed = summary(tmp_path / "a"), summary(tmp_path / "b")
    assert straight["weights_sha256"] == resumed["weights_sha256"]
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")
    assert straight["test_error"] == resumed["test_error"]
