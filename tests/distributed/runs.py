"""Short runs on gloo ranks: options that switch everything on, and what a run leaves behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from sgan_dist import checkpoint
from sgan_dist.config import Config
from sgan_dist.run.trainer import train

EXACT = (
    "--machine.precision=fp64",
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
TERMS = (
    *CONSISTENCY,
    "--optim.lr=1e-3",
    "--optim.generator_lr=1e-3",
    "--loss.threshold=0.4",
    "--loss.prior=labeled",
    "--loss.class_weights=balanced",
)
MLP = ("--model.discriminator=mlp", '--model.discriminator_args={"sizes": [40, 20]}')
TUTORIAL = ("--model.discriminator=tutorial", "--model.discriminator_args={}")


def train_rank(rank: int, config: Config) -> int:
    """Trains on a rank of `run_ranks`; returns the step that the run ended at."""
    return int(train(config)["step"])


def parameters(run: Path) -> dict[str, Tensor]:
    """All tensors of the networks in the last checkpoint."""
    path, _ = checkpoint.latest(run)
    assert path is not None
    state = checkpoint.read_state(path)
    networks = {"d": state["discriminator"]["network"], "ema": state["average"]}
    if "generator" in state:
        networks["g"] = state["generator"]["network"]
    return {f"{name}.{k}": v for name, part in networks.items() for k, v in part.items()}


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest absolute difference between two runs' parameters."""
    assert a.keys() == b.keys()
    return max(float((a[key] - b[key]).abs().max()) for key in a)


def summary(run: Path) -> dict[str, Any]:
    """The content of summary.json."""
    content: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return content


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without their times."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]
