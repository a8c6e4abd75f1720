"""The nine-layer discriminator of Improved GAN's natural images, known as Conv-Small."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sgan_dist.errors import UserError
from sgan_dist.gan.models.base import CHW, DiscriminatorOutput, dropout, gaussian_noise, normed
from sgan_dist.parallel.random import GlobalRandom


class ConvSmallDiscriminator(nn.Module):
    """Three blocks of three convolutions with weight norm, global average pooling.

    The CIFAR-10 network of Salimans et al. 2016 (arXiv:1606.03498), which has width 96, leaky ReLUs
    of 0.2 instead of 0.1, and more dropout. 353 k parameters at width 48.
    """

    def __init__(
        self,
        image_chw: CHW,
        outputs: int,
        width: int = 48,
        noise: float = 0.1,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        channels, *sides = image_chw
        if min(sides) < 9:
            raise UserError(
                f"model conv_small takes images of 9x9 pixels or more, and the dataset's are"
                f" {sides[0]}x{sides[1]}: resize them, or use a model.discriminator of your own"
            )
        self.noise, self.dropout = noise, dropout
        n, m = width, 2 * width
        self.conv1 = normed(nn.Conv2d(channels, n, 3, padding=1))
        self.block1 = nn.Sequential(*_conv(n, n), *_conv(n, n, stride=2))
        self.block2 = nn.Sequential(*_conv(n, m), *_conv(m, m), *_conv(m, m, stride=2))
        self.block3 = nn.Sequential(
            *_conv(m, m, padding=0), *_conv(m, m, 1, padding=0), *_conv(m, m, 1, padding=0)
        )
        self.head = normed(nn.Linear(m, outputs))

    def forward(self, images: Tensor, rng: GlobalRandom | None = None) -> DiscriminatorOutput:
        x = gaussian_noise(images, self.noise, rng)
        # Channels last is fastest; an image of one channel does not carry that memory format.
        x = F.leaky_relu(self.conv1(x), 0.1).contiguous(memory_format=torch.channels_last)
        x = dropout(self.block1(x), self.dropout, rng)
        x = dropout(self.block2(x), self.dropout, rng)
        features = self.block3(x).mean((2, 3))
        return DiscriminatorOutput(self.head(features), features)


def _conv(
    inputs: int, outputs: int, size: int = 3, stride: int = 1, padding: int = 1
) -> list[nn.Module]:
    layer = nn.Conv2d(inputs, outputs, size, stride=stride, padding=padding)
    return [normed(layer), nn.LeakyReLU(0.1)]
