"""Whole runs under DeepSpeed: the numbers of DDP, its checkpoints, and runs that change over."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sgan_dist.config import Config
from sgan_dist.trainer import fit
from tests.conftest import small_config
from tests.distributed.test_world_size import parameters
from tests.ranks import REPOSITORY, free_port, launch, run, run_ranks

DDP = "ddp"
OPTIONS = (
    "--optim.clip_norm=1",
    "--optim.decay=0.5",
    "--train.accumulation=2",
    "--loss.consistency=1",
    "--teacher_augment.translate=1",
)


def config(root: Path, run: Path, backend: str, *options: str) -> Config:
    named = () if backend == DDP else (f"--train.deepspeed={zero(backend)}",)
    return small_config(root, run, *OPTIONS, *named, *options)


def zero(name: str) -> Path:
    return REPOSITORY / "configs" / "deepspeed" / f"{name}.json"


def train(rank: int, config: Config) -> int:
    return fit(config)


def first_values(root: Path, run: Path, options: tuple[str, ...]) -> dict[str, Tensor]:
    """The parameters after one step of a hundred-millionth of the rate."""
    slow = ("--optim.lr=1e-12", "--optim.generator_lr=1e-12", "--train.steps=1")
    run_ranks(1, train, config(root, run, DDP, *options, *slow))
    return parameters(run)


def update(run: Path, first: dict[str, Tensor]) -> Tensor:
    """How far D and G have come, end to end."""
    now = parameters(run)
    keys = [key for key in now if not key.startswith("ema.")]
    return torch.cat([(now[key].double() - first[key].double()).flatten() for key in keys])


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("generator", ["feature_matching", "non_saturating"])
def test_zero_trains_as_ddp_and_as_one_process(
    generator: str, digits: Path, tmp_path: Path
) -> None:
    # Steps and a seed in which no activation lies so near the kink of its leaky ReLU that the last
    # bits, in which orders of summation differ, decide its slope.
    options = (f"--loss.generator={generator}", "--seed=1", "--train.steps=8")
    first = first_values(digits, tmp_path / "first", options)
    run_ranks(1, train, config(digits, tmp_path / "alone", DDP, *options))
    for backend in (DDP, "zero1", "zero2"):
        run_ranks(2, train, config(digits, tmp_path / backend, backend, *options))
    alone, ddp = update(tmp_path / "alone", first), update(tmp_path / DDP, first)
    for backend in ("zero1", "zero2"):
        moved = update(tmp_path / backend, first)
        print(backend, float((moved - ddp).norm() / ddp.norm()))
        assert (moved - ddp).norm() < 1e-6 * ddp.norm()
        lines = zip(metrics(tmp_path / DDP), metrics(tmp_path / backend), strict=True)
        for ours, theirs in lines:
            for key in ("d/gradient_norm", "g/gradient_norm", "d/supervised"):
                assert ours[key] == pytest.approx(theirs[key], rel=1e-5)
    print("one process", float((ddp - alone).norm() / alone.norm()))
    assert (ddp - alone).norm() < 1e-4 * alone.norm()


@pytest.mark.slow
def test_a_run_may_change_its_backend_and_its_world(digits: Path, tmp_path: Path) -> None:
    first = first_values(digits, tmp_path / "first", ())
    run_ranks(2, train, config(digits, tmp_path / "straight", DDP, "--optim.decay=0"))
    changes = ((DDP, 2, 5), ("zero2", 2, 10), ("zero1", 3, 13), (DDP, 1, 16), ("zero2", 1, 20))
    for backend, world_size, steps in changes:
        run_ranks(
            world_size,
            train,
            config(
                digits,
                tmp_path / "changing",
                backend,
                "--optim.decay=0",
                "--train.accumulation=1",
                f"--train.steps={steps}",
            ),
        )
    straight, changing = update(tmp_path / "straight", first), update(tmp_path / "changing", first)
    assert (changing - straight).norm() < 1e-4 * straight.norm()


@pytest.mark.slow
def test_a_resumed_run_under_zero_equals_an_uninterrupted_one(digits: Path, tmp_path: Path) -> None:
    options = ("--optim.decay=0", "--train.accumulation=1")
    straight = config(digits, tmp_path / "a", "zero2", *options, "--train.steps=10")
    run_ranks(2, train, straight)
    for steps in (5, 10):
        resumed = config(digits, tmp_path / "b", "zero2", *options, f"--train.steps={steps}")
        run_ranks(2, train, resumed)
    hashes = [
        json.loads((tmp_path / run / "summary.json").read_text())["weights_sha256"] for run in "ab"
    ]
    assert hashes[0] == hashes[1]


@pytest.mark.slow
@pytest.mark.timeout(280)
@pytest.mark.parametrize(
    "launcher",
    [
        ("deepspeed", "--num_accelerators", "2", "--master_port", "PORT"),
        ("accelerate", "launch", "--config_file", "configs/accelerate/deepspeed_zero2.yaml"),
        ("torchrun", "--standalone", "--nproc_per_node=2"),
    ],
    ids=["deepspeed", "accelerate", "torchrun"],
)
def test_killed_under_each_launcher_it_goes_on(
    launcher: tuple[str, ...], digits: Path, tmp_path: Path
) -> None:
    launcher = tuple(str(free_port()) if word == "PORT" else word for word in launcher)
    for name, killed in (("straight", False), ("killed", True)):
        options = (
            f"--data.root={digits}",
            "--data.source=null",
            f"--run_dir={tmp_path / name}",
            "--train.steps=60",
            "--train.log_every=10",
            "--train.baseline_steps=0",
            "--checkpoint.every=10",
            "--tracking.wandb=false",
            '--model.discriminator_args={"width": 4}',
            '--model.generator_args={"width": 4, "latent_size": 8}',
        )
        command = (*launcher, "launch/train.py", *options)
        if killed:
            process = launch(*command, DS_ACCELERATOR="cpu")
            try:
                while not (tmp_path / name / "checkpoints" / "step-00000020").exists():
                    assert process.poll() is None
                    time.sleep(0.01)
            finally:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
            assert not (tmp_path / name / "DONE").exists()
        code, output = run(*command, DS_ACCELERATOR="cpu")
        assert code == 0 and ("resuming after step" in output) == killed, output
    hashes = [
        json.loads((tmp_path / name / "summary.json").read_text())["weights_sha256"]
        for name in ("straight", "killed")
    ]
    assert hashes[0] == hashes[1]
