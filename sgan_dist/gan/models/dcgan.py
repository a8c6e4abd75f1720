"""A small convolutional pair for images of 28x28 and 32x32 (any height and width divisible by 4)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sgan_dist.gan.models.base import (
    CHW,
    DiscriminatorOutput,
    check_divisible,
    dropout,
    gaussian_noise,
    normed,
)
from sgan_dist.parallel.batchnorm import GlobalBatchNorm
from sgan_dist.parallel.random import GlobalRandom


class DCGANDiscriminator(nn.Module):
    """Strided convolutions with weight norm, noise and dropout, global average pooling.

    A small form of the discriminators of Salimans et al. 2016 (arXiv:1606.03498): 84 k parameters at
    width 24.
    """

    def __init__(
        self,
        image_chw: CHW,
        outputs: int,
        width: int = 24,
        noise: float = 0.1,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        self.noise, self.dropout = noise, dropout
        self.conv1 = normed(nn.Conv2d(image_chw[0], width, 5, stride=2, padding=2))
        self.conv2 = normed(nn.Conv2d(width, 2 * width, 3, padding=1))
        self.conv3 = normed(nn.Conv2d(2 * width, 2 * width, 3, stride=2, padding=1))
        self.conv4 = normed(nn.Conv2d(2 * width, 4 * width, 3, padding=1))
        self.conv5 = normed(nn.Conv2d(4 * width, 4 * width, 1))
        self.head = normed(nn.Linear(4 * width, outputs))

    def forward(self, images: Tensor, rng: GlobalRandom | None = None) -> DiscriminatorOutput:
        x = gaussian_noise(images, self.noise, rng)
        # Channels last is fastest; an image of one channel does not carry that memory format.
        x = F.leaky_relu(self.conv1(x), 0.1).contiguous(memory_format=torch.channels_last)
        x = F.leaky_relu(self.conv2(x), 0.1)
        x = F.leaky_relu(self.conv3(x), 0.1)
        x = dropout(x, self.dropout, rng)
        x = F.leaky_relu(self.conv4(x), 0.1)
        x = F.leaky_relu(self.conv5(x), 0.1)
        features = x.mean((2, 3))
        return DiscriminatorOutput(self.head(features), features)


class DCGANGenerator(nn.Module):
    """Latent N(0, 1) vectors -> dense -> two transposed convolutions, batch norm over all ranks."""

    def __init__(self, image_chw: CHW, latent_size: int = 100, width: int = 64) -> None:
        super().__init__()
        channels, height, width_px = image_chw
        check_divisible("dcgan", height, width_px)
        self.latent_size = latent_size
        self.start = (2 * width, height // 4, width_px // 4)
        self.dense = nn.Linear(latent_size, 2 * width * height * width_px // 16, bias=False)
        self.norm1 = GlobalBatchNorm(2 * width)
        self.up1 = nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1, bias=False)
        self.norm2 = GlobalBatchNorm(width)
        self.up2 = nn.ConvTranspose2d(width, channels, 4, stride=2, padding=1)
        for layer in (self.dense, self.up1, self.up2):
            nn.init.normal_(layer.weight, std=0.05)

    def latent(self, rng: GlobalRandom) -> Tensor:
        return rng.normal(self.latent_size)

    def forward(self, z: Tensor) -> Tensor:
        x = self.dense(z).unflatten(1, self.start)
        x = F.relu(self.norm1(x))
        x = F.relu(self.norm2(self.up1(x)))
        return F.tanh(self.up2(x))
