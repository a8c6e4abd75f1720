"""On a CUDA GPU, run by `make test-gpu`: what tests/cuda can only foresee."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from sgan_dist import train
from sgan_dist.config import Config
from sgan_dist.gan.brake import Brake
from sgan_dist.parallel.engine import make_optimizer
from sgan_dist.parallel.random import GlobalRandom
from sgan_dist.run import trainer
from sgan_dist.run.session import Session
from tests.conftest import small_config
from tests.distributed.runs import CONSISTENCY, EXACT, TERMS, largest_difference, parameters
from tests.ranks import run_ranks

pytestmark = [pytest.mark.gpu, pytest.mark.process]
CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


@pytest.fixture(autouse=True)
def _a_gpu() -> None:
    assert torch.cuda.is_available(), "these tests need a CUDA GPU, and a torch with CUDA"


def on_cpu(rank: int, config: Config) -> None:
    train(config)


def on_one_gpu(rank: int, config: Config) -> str:
    """A rank of several that share a GPU, which NCCL refuses and gloo does not."""
    for name in ("ACCELERATE_USE_CPU", "LOCAL_WORLD_SIZE"):
        os.environ.pop(name, None)
    if "RANK" in os.environ:
        os.environ["LOCAL_RANK"] = "0"
        dist.init_process_group("gloo")
    train(config)
    return torch.cuda.get_device_name()


def test_random_numbers_are_those_of_the_cpu() -> None:
    def draw(device: torch.device) -> list[torch.Tensor]:
        rng = GlobalRandom(3, "test", 7, {"a": range(5, 90), "b": range(40)}, device)
        return [rng.normal(1000).cpu(), rng.uniform(3, 77).cpu(), rng.normal(1).cpu()]

    assert all(torch.equal(a, b) for a, b in zip(draw(CPU), draw(CUDA), strict=True))


def test_a_set_brake_keeps_weights_and_moments(digits: Path, tmp_path: Path) -> None:
    network = torch.nn.Linear(64, 64).to(CUDA)
    optimizer: Any = make_optimizer(network, 0.1, small_config(digits, tmp_path).optim)
    brake = Brake.released(CUDA)

    def step(factor: float) -> list[torch.Tensor]:
        loss = network(torch.ones(2, 64, device=CUDA)).sum() * factor
        loss.backward()
        brake.check(loss.detach())
        optimizer.found_inf, optimizer.grad_scale = brake.flag, None
        optimizer.step()
        optimizer.zero_grad()
        moments = [v for state in optimizer.state.values() for v in state.values()]
        return [tensor.detach().clone() for tensor in (*network.parameters(), *moments)]

    before = step(1.0)
    for factor in (float("nan"), 1.0):  # and no later step either
        assert all(torch.equal(a, b) for a, b in zip(step(factor), before, strict=True))


class Watched(Session):
    """Raises where the host waits for the GPU in a step that does not log."""

    def train_step(self, batch: Any) -> None:
        first, logs = self.state.step < 2, (self.state.step + 1) % self.config.train.log_every == 0
        if first or logs:
            super().train_step(batch)
            return
        torch.cuda.set_sync_debug_mode("error")
        try:
            super().train_step(batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def watched(rank: int, config: Config) -> int:
    os.environ.pop("ACCELERATE_USE_CPU", None)
    trainer.Session = Watched  # type: ignore[attr-defined]
    return int(train(config)["step"])


@pytest.mark.parametrize("options", [(), CONSISTENCY, TERMS])
def test_the_host_does_not_wait_in_a_step(
    options: tuple[str, ...], digits: Path, tmp_path: Path
) -> None:
    config = small_config(digits, tmp_path, *options, "--machine.precision=bf16")
    assert run_ranks(1, watched, config) == [20]


@pytest.mark.parametrize("options", [(), CONSISTENCY])
def test_a_gpu_trains_as_the_cpu_does(
    options: tuple[str, ...], digits: Path, tmp_path: Path
) -> None:
    runs = {name: tmp_path / name for name in ("cpu", "gpu")}
    for name, work in (("cpu", on_cpu), ("gpu", on_one_gpu)):
        config = small_config(digits, runs[name], *EXACT, *options, "--train.steps=6")
        run_ranks(1, work, config)
    assert largest_difference(parameters(runs["cpu"]), parameters(runs["gpu"])) < 1e-9


def test_two_ranks_on_one_gpu_train_as_one(digits: Path, tmp_path: Path) -> None:
    for world_size in (1, 2):
        run = tmp_path / str(world_size)
        config = small_config(digits, run, *EXACT, *CONSISTENCY, "--train.steps=6")
        run_ranks(world_size, on_one_gpu, config)
    assert largest_difference(parameters(tmp_path / "1"), parameters(tmp_path / "2")) < 1e-10
