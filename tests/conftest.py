"""Datasets that the tests share: the embedded digits, prepared once for all."""

from __future__ import annotations

from pathlib import Path

import pytest

from sgan_dist.config import Config, check, parse
from sgan_dist.data.prepare import prepare


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded digits as `make train` prepares them: packed, held in memory."""
    out = tmp_path_factory.mktemp("data") / "digits"
    prepare("digits", str(out), labels_per_class=10, label_seed=0, progress=False)
    return out


@pytest.fixture(scope="session")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded digits in several shards, streamed in the windowed order."""
    out = tmp_path_factory.mktemp("data") / "windowed"
    prepare(
        "digits",
        str(out),
        labels_per_class=30,
        label_seed=0,
        order="windowed",
        samples_per_shard=512,
        progress=False,
    )
    return out


def small_config(root: Path, run: Path, *overrides: str) -> Config:
    """A run of a few seconds: small networks, every source of randomness on."""
    config, _ = parse(
        [
            f"--data.root={root}",
            f"--run_dir={run}",
            "--name=small",
            "--data.labeled_batch=12",
            "--data.unlabeled_batch=24",
            "--data.lanes=12",
            "--train.fake_batch=12",
            '--model.discriminator_args={"width": 4, "noise": 0.2, "dropout": 0.3}',
            '--model.generator_args={"width": 4, "latent_size": 8}',
            "--augment.rotation=10",
            "--augment.translate=2",
            "--train.steps=20",
            "--train.log_every=4",
            "--train.evaluate_every=0",
            "--train.sample_every=0",
            "--checkpoint.every=1000",
            "--tracking.wandb=false",
            *overrides,
        ]
    )
    return check(config)
