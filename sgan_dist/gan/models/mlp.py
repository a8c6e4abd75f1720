"""The fully connected networks for MNIST of Improved GAN (Salimans et al. 2016, arXiv:1606.03498)."""

from __future__ import annotations

import itertools
import math

import torch.nn.functional as F
from torch import Tensor, nn

from sgan_dist.gan.models.base import CHW, GAIN, DiscriminatorOutput, gaussian_noise, normed
from sgan_dist.parallel.batchnorm import GlobalBatchNorm
from sgan_dist.parallel.random import GlobalRandom


class MLPDiscriminator(nn.Module):
    """1000-500-250-250-250 ReLU with weight norm; Gaussian noise on the input and after each layer.

    Noise is in units of pixels in [0, 1]. The scale of the weights is trained in the last layer only.
    """

    def __init__(
        self,
        image_chw: CHW,
        outputs: int,
        sizes: tuple[int, ...] = (1000, 500, 250, 250, 250),
        input_noise: float = 0.3,
        noise: float = 0.5,
    ) -> None:
        super().__init__()
        self.input_noise, self.noise = input_noise, noise
        inputs = (math.prod(image_chw), *sizes)
        self.layers = nn.ModuleList(_dense(a, b) for a, b in itertools.pairwise(inputs))
        for layer in self.layers:
            layer.get_parameter(GAIN).requires_grad_(False)
        self.head = _dense(inputs[-1], outputs)

    def forward(self, images: Tensor, rng: GlobalRandom | None = None) -> DiscriminatorOutput:
        features = (images.flatten(1) + 1) / 2
        for number, layer in enumerate(self.layers):
            noisy = gaussian_noise(features, self.noise if number else self.input_noise, rng)
            features = F.relu(layer(noisy))
        return DiscriminatorOutput(self.head(gaussian_noise(features, self.noise, rng)), features)


def _dense(inputs: int, outputs: int) -> nn.Module:
    """A weight-normed layer, from N(0, 0.1^2) as in the paper's code.

    Weight norm removes the scale, but not its effect on Adam, which turns long rows more slowly:
    with torch's default, whose rows are shorter, D outruns G in the first epoch.
    """
    layer = nn.Linear(inputs, outputs)
    nn.init.normal_(layer.weight, std=0.1)
    return normed(layer)


class MLPGenerator(nn.Module):
    """Latent U(0, 1)^100 -> two layers of 500 softplus units with batch norm -> sigmoid pixels."""

    def __init__(self, image_chw: CHW, latent_size: int = 100, width: int = 500) -> None:
        super().__init__()
        self.image_chw, self.latent_size = image_chw, latent_size
        self.dense1 = nn.Linear(latent_size, width, bias=False)
        self.norm1 = GlobalBatchNorm(width)
        self.dense2 = nn.Linear(width, width, bias=False)
        self.norm2 = GlobalBatchNorm(width)
        self.pixels = nn.Linear(width, math.prod(image_chw))

    def latent(self, rng: GlobalRandom) -> Tensor:
        return rng.uniform(self.latent_size)

    def forward(self, z: Tensor) -> Tensor:
        x = F.softplus(self.norm1(self.dense1(z)))
        x = F.softplus(self.norm2(self.dense2(x)))
        return (2 * F.sigmoid(self.pixels(x)) - 1).view(-1, *self.image_chw)
