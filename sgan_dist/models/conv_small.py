"""The nine-layer discriminator of Improved GAN's natural images, known as Conv-Small."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sgan_dist.errors import UserError
from sgan_dist.models.base import DiscriminatorOutput, dropout, gaussian_noise, normed
from sgan_dist.noise import Draw


class ConvSmallDiscriminator(nn.Module):
    """Three blocks of three convolutions with weight norm, global average pooling.

    Salimans et al. 2016, their CIFAR-10 network at width 96, with leaky ReLUs of 0.1 for their 0.2
    and less dropout. 353 k parameters at width 48.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        outputs: int,
        width: int = 48,
        noise: float = 0.1,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        channels, *sides = image_shape
        if min(sides) < 9:
            raise UserError(
                f"model conv_small takes images of 9x9 pixels or more, and these are"
                f" {sides[0]}x{sides[1]}: resize them, or name your own model.discriminator"
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

    def forward(self, images: Tensor, draw: Draw | None = None) -> DiscriminatorOutput:
        x = gaussian_noise(images, self.noise, draw)
        # Convolutions are fastest with channels last; one channel has no such order to pass on.
        x = F.leaky_relu(self.conv1(x), 0.1).contiguous(memory_format=torch.channels_last)
        x = dropout(self.block1(x), self.dropout, draw)
        x = dropout(self.block2(x), self.dropout, draw)
        features = self.block3(x).mean((2, 3))
        return DiscriminatorOutput(self.head(features), features)


def _conv(
    inputs: int, outputs: int, size: int = 3, stride: int = 1, padding: int = 1
) -> list[nn.Module]:
    layer = nn.Conv2d(inputs, outputs, size, stride=stride, padding=padding)
    return [normed(layer), nn.LeakyReLU(0.1)]
