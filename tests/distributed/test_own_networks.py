"""Odd networks of a user train, resume, are exported and evaluated, at one rank and at two."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sgan_dist import checkpoint
from sgan_dist.evaluation.classifier import load_classifier
from sgan_dist.evaluation.metrics import evaluate_run
from tests.conftest import small_config
from tests.distributed.runs import summary, train_rank
from tests.ranks import run_ranks

# The rate must not depend on train.steps, which is what ends the first half.
OPTIONS = ("--model.discriminator_args={}", "--optim.decay=0", "--train.evaluate_every=0")


NAMES = ("Counting", "Tied", "ExtraState", "TensorState", "Spectral", "Half", "Compiled")
SOON = (("Tied", 1), ("ExtraState", 2))  # in `make test`; the others take long


@pytest.mark.parametrize(
    ("name", "world_size"),
    [
        pytest.param(name, ranks, marks=() if (name, ranks) in SOON else pytest.mark.slow)
        for name in NAMES
        for ranks in (1, 2)
    ],
)
def test_an_odd_network_resumes_and_is_exported(
    name: str, world_size: int, digits: Path, tmp_path: Path
) -> None:
    options = (f"--model.discriminator=tests.gan.odd_networks:{name}", *OPTIONS)
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    for run, steps in ((straight, 6), (resumed, 3), (resumed, 6)):
        config = small_config(digits, run, *options, f"--train.steps={steps}")
        run_ranks(world_size, train_rank, config)
    assert summary(straight)["weights_sha256"] == summary(resumed)["weights_sha256"]
    path, _ = checkpoint.latest(resumed)
    assert path is not None
    average = checkpoint.read_state(path)["average"]
    exported = load_classifier(resumed / "classifier.safetensors").network.state_dict()
    assert exported.keys() == average.keys()
    for key, value in average.items():
        if isinstance(value, torch.Tensor):
            assert exported[key].dtype == value.dtype and torch.equal(exported[key], value)
        else:
            assert exported[key] == value
    assert evaluate_run(resumed, "test", None).error == summary(resumed)["test_error"]
