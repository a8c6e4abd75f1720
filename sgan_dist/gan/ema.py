"""The averaged copy of the discriminator (EMA), which is evaluated and kept."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from sgan_dist.config import EmaConfig
from sgan_dist.gan.brake import Brake


@torch.no_grad()
def update(
    average: nn.Module, network: nn.Module, seen: int, batch: int, config: EmaConfig, brake: Brake
) -> None:
    """Moves `average` towards `network`, after a step of `batch` images, the last of `seen` images.

    The half-life is counted in images, so it means the same at any batch size. At first it is
    `rampup` times the images seen, so that the average forgets the initial weights: `ema_rampup` in
    the code of StyleGAN2-ADA (Karras et al. 2020, arXiv:2006.06676). Buffers and extra state are
    copied.
    """
    half_life = min(config.half_life, config.rampup * seen) if config.rampup else config.half_life
    keep = 0.5 ** (batch / half_life)
    old: list[Tensor] = list(average.parameters())
    new: list[Tensor] = list(network.parameters())
    brake.assign(old, torch._foreach_lerp(old, new, 1 - keep))
    brake.assign(average.buffers(), network.buffers())
    for target_module, module in zip(average.modules(), network.modules(), strict=True):
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            target_module.set_extra_state(copy.deepcopy(module.get_extra_state()))
