"""A discriminator and a generator of your own. Start training from the folder that holds this file:

    cd examples
    sgan-dist train --config digits --run_dir=runs/own \
        --model.discriminator=own_network:ResidualDiscriminator \
        --model.generator=own_network:ResizeGenerator --model.generator_args='{"width": 16}'

The contract is in sgan_dist/gan/models/base.py. In short: D returns logits and features, all
randomness comes from `rng`, and no layer of D mixes samples. So GroupNorm, not BatchNorm or
nn.Dropout; then any number of processes trains the same network, and a resumed run continues exactly.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from sgan_dist.gan.models.base import DiscriminatorOutput, dropout, gaussian_noise
from sgan_dist.parallel.random import GlobalRandom


class Block(nn.Module):
    """Halves height and width, with a shortcut around two 3x3 convolutions."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride=2)
        self.norm = nn.GroupNorm(4, outputs)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.leaky_relu(self.norm(self.conv1(x)), 0.1)
        return F.leaky_relu(self.shortcut(x) + self.conv2(inner), 0.1)


class ResidualDiscriminator(nn.Module):
    """Two residual blocks and a linear layer; `outputs` logits."""

    def __init__(
        self, image_chw: tuple[int, int, int], outputs: int, width: int = 16, noise: float = 0.1
    ) -> None:
        super().__init__()
        self.noise = noise
        self.block1 = Block(image_chw[0], width)
        self.block2 = Block(width, 4 * width)
        self.head = nn.Linear(4 * width, outputs)

    def forward(self, images: Tensor, rng: GlobalRandom | None = None) -> DiscriminatorOutput:
        x = self.block1(gaussian_noise(images, self.noise, rng))  # (n, width, H/2, W/2)
        x = self.block2(dropout(x, 0.2, rng))  # (n, 4 width, H/4, W/4)
        features = x.mean((2, 3))
        return DiscriminatorOutput(self.head(features), features)


class ResizeGenerator(nn.Module):
    """A dense layer, then two times nearest-neighbor resize and a 3x3 convolution."""

    def __init__(
        self, image_chw: tuple[int, int, int], latent_size: int = 64, width: int = 32
    ) -> None:
        super().__init__()
        channels, height, width_px = image_chw
        self.latent_size, self.start = latent_size, (2 * width, height // 4, width_px // 4)
        self.dense = nn.Linear(latent_size, 2 * width * (height // 4) * (width_px // 4))
        self.norm = nn.GroupNorm(4, 2 * width)
        self.conv1 = nn.Conv2d(2 * width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, channels, 3, padding=1)

    def latent(self, rng: GlobalRandom) -> Tensor:
        return rng.normal(self.latent_size)

    def forward(self, z: Tensor) -> Tensor:
        x = F.relu(self.norm(self.dense(z).unflatten(1, self.start)))
        x = F.relu(self.conv1(F.interpolate(x, scale_factor=2)))
        return F.tanh(self.conv2(F.interpolate(x, scale_factor=2)))
