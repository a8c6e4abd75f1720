"""Discriminators as a user might write them."""

from __future__ import annotations

import os
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sgan_dist.gan.models.base import DiscriminatorOutput
from sgan_dist.parallel.batchnorm import GlobalBatchNorm
from sgan_dist.parallel.random import GlobalRandom


class WithBatchNorm(nn.Module):
    """Batch norm that follows the module's mode, train or eval, as torch's own layers do."""

    def __init__(self, image_chw: tuple[int, int, int], outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(image_chw[0], 8, 5, stride=4)
        self.norm = GlobalBatchNorm(8)
        self.head = nn.Linear(8, outputs)
        self.forwards = 0  # of this network: others of its class are tried before a run

    def forward(self, images: Tensor, rng: GlobalRandom | None = None) -> DiscriminatorOutput:
        features = F.relu(self.norm(self.conv(images))).mean((2, 3))
        return DiscriminatorOutput(self.head(features), features)


class WithUnusedParameter(WithBatchNorm):
    def __init__(self, image_chw: tuple[int, int, int], outputs: int) -> None:
        super().__init__(image_chw, outputs)
        self.forgotten = nn.Linear(3, 3)


class HangsAtTheFirstStart(WithBatchNorm):
    """Rank 1 hangs after some steps, as if its file system were gone, until SLURM restarts it."""

    def forward(self, images: Tensor, rng: GlobalRandom | None = None) -> DiscriminatorOutput:
        self.forwards += 1
        first = "SLURM_RESTART_COUNT" not in os.environ
        if first and self.forwards == 100 and os.environ.get("RANK") == "1":
            wait_for_nothing()
        return super().forward(images, rng)


class ChangesOnRankOne(WithBatchNorm):
    """Changes one of its weights on rank 1 after some steps, so that the replicas differ."""

    def forward(self, images: Tensor, rng: GlobalRandom | None = None) -> DiscriminatorOutput:
        self.forwards += 1
        if self.forwards == 20 and os.environ.get("RANK") == "1":
            with torch.no_grad():
                self.head.weight[0, 0] += 1e-6
        return super().forward(images, rng)


class Crashes(WithBatchNorm):
    """Raises an error that is no UserError."""

    def forward(self, images: Tensor, rng: GlobalRandom | None = None) -> DiscriminatorOutput:
        raise RuntimeError("no such kernel")


class CrashesWhenToldToLeave(WithBatchNorm):
    """At the first start it waits in the middle of a step for the batch script's file, then fails."""

    def forward(self, images: Tensor, rng: GlobalRandom | None = None) -> DiscriminatorOutput:
        self.forwards += 1
        if "SLURM_RESTART_COUNT" not in os.environ and self.forwards == 150:
            print("waits to be told", flush=True)
            while not os.path.exists(os.environ["SGAN_PREEMPTED"]):  # noqa: PTH110
                time.sleep(0.1)
            raise RuntimeError("out of memory")
        return super().forward(images, rng)


class TakesItsTime(WithBatchNorm):
    """Takes at least a fifth of a second a step on any machine."""

    def forward(self, images: Tensor, rng: GlobalRandom | None = None) -> DiscriminatorOutput:
        if rng is not None:
            time.sleep(0.07)
        return super().forward(images, rng)


def wait_for_nothing() -> None:
    while True:
        time.sleep(1)


class OutOfMemory(WithBatchNorm):
    """Uses up the memory of a GPU at its 20th forward in training, on the last rank."""

    def forward(self, images: Tensor, rng: GlobalRandom | None = None) -> DiscriminatorOutput:
        self.forwards += rng is not None
        last = int(os.environ.get("RANK", "0")) == int(os.environ.get("WORLD_SIZE", "1")) - 1
        if self.forwards == 20 and last:
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2.00 GiB.\nMore text"
            )
        return super().forward(images, rng)
