"""Discriminators as a user might write them."""

from __future__ import annotations

import os
import time

import torch.nn.functional as F
from torch import Tensor, nn

from sgan_dist.distributed import GlobalBatchNorm
from sgan_dist.models.base import DiscriminatorOutput
from sgan_dist.noise import Draw


class WithBatchNorm(nn.Module):
    """Takes batch norm by its mode, train or eval, as torch's own layers do."""

    def __init__(self, image_shape: tuple[int, int, int], outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(image_shape[0], 8, 5, stride=4)
        self.norm = GlobalBatchNorm(8)
        self.head = nn.Linear(8, outputs)

    def forward(self, images: Tensor, draw: Draw | None = None) -> DiscriminatorOutput:
        features = F.relu(self.norm(self.conv(images))).mean((2, 3))
        return DiscriminatorOutput(self.head(features), features)


class WithUnusedParameter(WithBatchNorm):
    def __init__(self, image_shape: tuple[int, int, int], outputs: int) -> None:
        super().__init__(image_shape, outputs)
        self.forgotten = nn.Linear(3, 3)


class HangsAtTheFirstStart(WithBatchNorm):
    """Rank 1 hangs after some steps, as without its file system, unless SLURM has restarted it."""

    forwards = 0

    def forward(self, images: Tensor, draw: Draw | None = None) -> DiscriminatorOutput:
        HangsAtTheFirstStart.forwards += 1
        first = "SLURM_RESTART_COUNT" not in os.environ
        if first and HangsAtTheFirstStart.forwards == 100 and os.environ.get("RANK") == "1":
            wait_for_nothing()
        return super().forward(images, draw)


class Crashes(WithBatchNorm):
    """With an error that no one has foreseen."""

    def forward(self, images: Tensor, draw: Draw | None = None) -> DiscriminatorOutput:
        raise RuntimeError("no such kernel")


class CrashesWhenToldToLeave(WithBatchNorm):
    """At the first start it waits, in the middle of a step, for the batch script's file, and fails."""

    forwards = 0

    def forward(self, images: Tensor, draw: Draw | None = None) -> DiscriminatorOutput:
        CrashesWhenToldToLeave.forwards += 1
        if "SLURM_RESTART_COUNT" not in os.environ and CrashesWhenToldToLeave.forwards == 150:
            print("waits to be told", flush=True)
            while not os.path.exists(os.environ["SGAN_PREEMPTED"]):  # noqa: PTH110
                time.sleep(0.1)
            raise RuntimeError("out of memory")
        return super().forward(images, draw)


class TakesItsTime(WithBatchNorm):
    """A fifth of a second a step, whatever the machine."""

    def forward(self, images: Tensor, draw: Draw | None = None) -> DiscriminatorOutput:
        if draw is not None:
            time.sleep(0.07)
        return super().forward(images, draw)


def wait_for_nothing() -> None:
    while True:
        time.sleep(1)
