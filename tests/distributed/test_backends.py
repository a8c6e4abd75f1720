"""Whole runs under DeepSpeed: DDP's numbers, its checkpoints, and runs that change the backend."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sgan_dist.config import Config
from tests.conftest import small_config
from tests.distributed.runs import metrics, parameters, summary, train_rank
from tests.ranks import free_port, launch, run, run_ranks

pytestmark = [pytest.mark.process, pytest.mark.slow]

DDP = "ddp"
OPTIONS = (
    "--optim.clip_norm=1",
    "--optim.decay=0.5",
    "--batch.accumulation=2",
    "--loss.consistency=1",
    "--teacher_augment.translate=1",
)


def config(root: Path, run: Path, backend: str, *options: str) -> Config:
    named = () if backend == DDP else (f"--machine.deepspeed=deepspeed/{backend}",)
    return small_config(root, run, *OPTIONS, *named, *options)


def first_values(root: Path, run: Path, options: tuple[str, ...]) -> dict[str, Tensor]:
    """The parameters after one step at a rate that changes nothing."""
    slow = ("--optim.lr=1e-12", "--optim.generator_lr=1e-12", "--train.steps=1")
    run_ranks(1, train_rank, config(root, run, DDP, *options, *slow))
    return parameters(run)


def update(run: Path, first: dict[str, Tensor]) -> Tensor:
    """The change of all parameters of D and G since `first`, as one vector."""
    last = parameters(run)
    keys = [key for key in last if not key.startswith("ema.")]
    return torch.cat([(last[key].double() - first[key].double()).flatten() for key in keys])


@pytest.mark.parametrize("generator", ["feature_matching", "non_saturating"])
def test_zero_trains_as_ddp_and_as_one_process(
    generator: str, digits: Path, tmp_path: Path
) -> None:
    # Steps and a seed in which no activation is so near the kink of its leaky ReLU that the order of
    # a sum, which changes the last bits, decides its slope.
    options = (f"--loss.generator={generator}", "--seed=1", "--train.steps=8")
    first = first_values(digits, tmp_path / "first", options)
    run_ranks(1, train_rank, config(digits, tmp_path / "alone", DDP, *options))
    for backend in (DDP, "zero1", "zero2"):
        run_ranks(2, train_rank, config(digits, tmp_path / backend, backend, *options))
    alone, ddp = update(tmp_path / "alone", first), update(tmp_path / DDP, first)
    for backend in ("zero1", "zero2"):
        moved = update(tmp_path / backend, first)
        print(backend, float((moved - ddp).norm() / ddp.norm()))
        assert (moved - ddp).norm() < 1e-6 * ddp.norm()
        lines = zip(metrics(tmp_path / DDP), metrics(tmp_path / backend), strict=True)
        for expected, line in lines:
            for key in ("d/gradient_norm", "g/gradient_norm", "d/supervised"):
                assert expected[key] == pytest.approx(line[key], rel=1e-5)
    print("one process", float((ddp - alone).norm() / alone.norm()))
    assert (ddp - alone).norm() < 1e-4 * alone.norm()


def test_a_run_may_change_its_backend_and_its_world(digits: Path, tmp_path: Path) -> None:
    first = first_values(digits, tmp_path / "first", ())
    run_ranks(2, train_rank, config(digits, tmp_path / "straight", DDP, "--optim.decay=0"))
    changes = ((DDP, 2, 5), ("zero2", 2, 10), ("zero1", 3, 13), (DDP, 1, 16), ("zero2", 1, 20))
    for backend, world_size, steps in changes:
        run_ranks(
            world_size,
            train_rank,
            config(
                digits,
                tmp_path / "changing",
                backend,
                "--optim.decay=0",
                "--batch.accumulation=1",
                f"--train.steps={steps}",
            ),
        )
    straight, changing = update(tmp_path / "straight", first), update(tmp_path / "changing", first)
    assert (changing - straight).norm() < 1e-4 * straight.norm()


def test_a_resumed_run_under_zero_equals_an_uninterrupted_one(digits: Path, tmp_path: Path) -> None:
    options = ("--optim.decay=0", "--batch.accumulation=1")
    straight = config(digits, tmp_path / "a", "zero2", *options, "--train.steps=10")
    run_ranks(2, train_rank, straight)
    for steps in (5, 10):
        resumed = config(digits, tmp_path / "b", "zero2", *options, f"--train.steps={steps}")
        run_ranks(2, train_rank, resumed)
    hashes = [summary(tmp_path / run)["weights_sha256"] for run in "ab"]
    assert hashes[0] == hashes[1]


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
def test_a_run_killed_under_each_launcher_resumes(
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
    hashes = [summary(tmp_path / name)["weights_sha256"] for name in ("straight", "killed")]
    assert hashes[0] == hashes[1]
