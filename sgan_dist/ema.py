"""The averaged copy of the discriminator, the one that is evaluated and kept."""

from __future__ import annotations

import copy

import torch
from torch import nn

from sgan_dist.config import EmaConfig


def averaged_copy(network: nn.Module) -> nn.Module:
    """A frozen copy in eval mode to average into."""
    return copy.deepcopy(network).eval().requires_grad_(False)


@torch.no_grad()
def update(
    average: nn.Module, network: nn.Module, seen: int, batch: int, config: EmaConfig
) -> None:
    """Moves `average` towards `network` after a step of `batch` images, `seen` with it in all.

    The half-life is counted in images, so it means the same at any batch size. Early on it is
    `rampup` of the images seen, so that the average forgets the initial weights (Karras et al. 2023,
    StyleGAN's EMA ramp-up). Buffers are copied.
    """
    half_life = min(config.half_life, config.rampup * seen) if config.rampup else config.half_life
    keep = 0.5 ** (batch / half_life)
    torch._foreach_lerp_(list(average.parameters()), list(network.parameters()), 1 - keep)
    for mine, theirs in zip(average.buffers(), network.buffers(), strict=True):
        mine.copy_(theirs)
