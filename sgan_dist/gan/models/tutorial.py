"""The tutorial's networks for MNIST, with batch norm in the discriminator.

The tutorial is Jakub Langr and Vladimir Bok, "GANs in Action" (Manning, 2019), chapter 7,
"Semi-Supervised GAN"; its code: https://github.com/GANs-in-Action/gans-in-action. The layers are the
same; initial values and the constants of batch norm are torch's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sgan_dist.gan.models.base import CHW, DiscriminatorOutput, check_divisible, dropout
from sgan_dist.parallel.batchnorm import GlobalBatchNorm
from sgan_dist.parallel.random import GlobalRandom

SLOPE = 0.01
TRACKED = ("labeled", "unlabeled")  # the real images


class PartwiseBatchNorm(GlobalBatchNorm):
    """Batch norm that normalizes labeled, unlabeled and generated images separately, in one forward.

    Each of these parts is normalized over all ranks, like a batch of its own. The running averages,
    for evaluation on real images, follow only the parts in `TRACKED`, and nothing while the network
    is frozen.
    """

    def partwise(self, x: Tensor, rng: GlobalRandom | None) -> Tensor:
        """`x` normalized part by part, by the sizes in `rng`; without it, as in evaluation."""
        if rng is None:
            return self.forward(x)
        parts = torch.split(x, list(rng.sizes.values()))
        return torch.cat(self.normalize(parts, [name in TRACKED for name in rng.sizes]))


class TutorialDiscriminator(nn.Module):
    """Three strided 3x3 convolutions of 32, 64 and 128 channels, dropout, one dense layer."""

    def __init__(self, image_chw: CHW, outputs: int, dropout: float = 0.5) -> None:
        super().__init__()
        channels, height, width = image_chw
        self.dropout = dropout
        self.conv1 = nn.Conv2d(channels, 32, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, stride=2, padding=1)
        self.norm2 = PartwiseBatchNorm(64)
        self.conv3 = nn.Conv2d(64, 128, 3, stride=2, padding=1)
        self.norm3 = PartwiseBatchNorm(128)
        self.head = nn.Linear(128 * (-(-height // 8)) * (-(-width // 8)), outputs)

    def forward(self, images: Tensor, rng: GlobalRandom | None = None) -> DiscriminatorOutput:
        x = F.leaky_relu(self.conv1(images), SLOPE)
        x = F.leaky_relu(self.norm2.partwise(self.conv2(x), rng), SLOPE)
        x = F.leaky_relu(self.norm3.partwise(self.conv3(x), rng), SLOPE)
        features = dropout(x, self.dropout, rng).flatten(1)
        return DiscriminatorOutput(self.head(features), features)


class TutorialGenerator(nn.Module):
    """Latent N(0, 1)^100 -> dense -> three 3x3 transposed convolutions of 128, 64 and C channels."""

    def __init__(self, image_chw: CHW, latent_size: int = 100) -> None:
        super().__init__()
        channels, height, width = image_chw
        check_divisible("tutorial", height, width)
        self.latent_size = latent_size
        self.start = (256, height // 4, width // 4)
        self.dense = nn.Linear(latent_size, 256 * height * width // 16)
        self.up1 = nn.ConvTranspose2d(256, 128, 3, stride=2, padding=1, output_padding=1)
        self.norm1 = GlobalBatchNorm(128)
        self.up2 = nn.ConvTranspose2d(128, 64, 3, stride=1, padding=1)
        self.norm2 = GlobalBatchNorm(64)
        self.up3 = nn.ConvTranspose2d(64, channels, 3, stride=2, padding=1, output_padding=1)

    def latent(self, rng: GlobalRandom) -> Tensor:
        return rng.normal(self.latent_size)

    def forward(self, z: Tensor) -> Tensor:
        x = self.dense(z).unflatten(1, self.start)
        x = F.leaky_relu(self.norm1(self.up1(x)), SLOPE)
        x = F.leaky_relu(self.norm2(self.up2(x)), SLOPE)
        return F.tanh(self.up3(x))
