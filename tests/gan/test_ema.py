"""The averaged discriminator: its half-life, and how it starts."""

from __future__ import annotations

import torch
from torch import nn

from sgan_dist.config import EmaConfig
from sgan_dist.gan import ema
from sgan_dist.gan.brake import Brake

BRAKE = Brake.released(torch.device("cpu"))


def test_ema_half_life_is_in_images() -> None:
    average, network = nn.Linear(1, 1), nn.Linear(1, 1)
    nn.init.zeros_(average.weight), nn.init.ones_(network.weight)
    config = EmaConfig(half_life=1000, rampup=0)
    for step in range(1, 11):
        ema.update(average, network, 100 * step, 100, config, BRAKE)
    assert torch.allclose(average.weight, torch.tensor(0.5))


def test_ema_follows_closely_at_first() -> None:
    average, network = nn.Linear(1, 1), nn.Linear(1, 1)
    nn.init.zeros_(average.weight), nn.init.ones_(network.weight)
    ema.update(average, network, 100, 100, EmaConfig(half_life=1e9, rampup=0.1), BRAKE)
    assert average.weight.item() > 0.99
