"""Networks as people write them: those that the gate refuses, and odd ones that must work."""

from __future__ import annotations

import random
import threading
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from sgan_dist.gan.models.base import DiscriminatorOutput, dropout
from sgan_dist.parallel.batchnorm import GlobalBatchNorm
from sgan_dist.parallel.random import GlobalRandom

Rng = GlobalRandom | None


class Plain(nn.Module):
    """A small discriminator in which subclasses change one thing."""

    def __init__(self, image_chw: tuple[int, int, int], outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(image_chw[0], 8, 5, stride=4)
        self.head = nn.Linear(8, outputs)

    def features(self, images: Tensor, rng: Rng) -> Tensor:
        return F.leaky_relu(self.conv(images), 0.1).mean((2, 3))

    def forward(self, images: Tensor, rng: Rng = None) -> Any:
        features = self.features(images, rng)
        return DiscriminatorOutput(self.head(features), features)


class ReturnsATuple(Plain):
    def forward(self, images: Tensor, rng: Rng = None) -> Any:
        return tuple(super().forward(images, rng))


class ReturnsLogits(Plain):
    def forward(self, images: Tensor, rng: Rng = None) -> Any:
        return super().forward(images, rng).logits


class TakesNoRng(Plain):
    def forward(self, images: Tensor) -> Any:  # type: ignore[override]
        return super().forward(images)


class NeedsRng(Plain):
    def forward(self, images: Tensor, rng: Rng) -> Any:  # type: ignore[override]
        return super().forward(images, rng)


class OneLogitTooFew(Plain):
    def __init__(self, image_chw: tuple[int, int, int], outputs: int) -> None:
        super().__init__(image_chw, outputs - 1)


class FeatureMaps(Plain):
    def forward(self, images: Tensor, rng: Rng = None) -> Any:
        maps = self.conv(images)
        return DiscriminatorOutput(self.head(maps.mean((2, 3))), maps)


class Lazy(Plain):
    def __init__(self, image_chw: tuple[int, int, int], outputs: int) -> None:
        super().__init__(image_chw, outputs)
        self.head = nn.LazyLinear(outputs)


class LegacyWeightNorm(Plain):
    def __init__(self, image_chw: tuple[int, int, int], outputs: int) -> None:
        super().__init__(image_chw, outputs)
        self.head = torch.nn.utils.weight_norm(self.head)


class TorchDropout(Plain):
    def features(self, images: Tensor, rng: Rng) -> Tensor:
        return F.dropout(super().features(images, rng), 0.2, self.training)


class DropoutInEvaluation(Plain):
    def features(self, images: Tensor, rng: Rng) -> Tensor:
        features = super().features(images, rng)
        return features if rng is not None else F.dropout(features, 0.2)


class StochasticDepth(Plain):
    def features(self, images: Tensor, rng: Rng) -> Tensor:
        features = super().features(images, rng)
        return features if random.random() < 0.5 else 2 * features


class NumpyNoise(Plain):
    def features(self, images: Tensor, rng: Rng) -> Tensor:
        features = super().features(images, rng)
        return features + torch.from_numpy(np.random.standard_normal(features.shape)).to(features)


class CountsForwards(Plain):
    def features(self, images: Tensor, rng: Rng) -> Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        return super().features(images, rng) * self.calls


class TorchBatchNorm(Plain):
    def __init__(self, image_chw: tuple[int, int, int], outputs: int) -> None:
        super().__init__(image_chw, outputs)
        self.norm = nn.BatchNorm2d(8)

    def features(self, images: Tensor, rng: Rng) -> Tensor:
        return F.leaky_relu(self.norm(self.conv(images)), 0.1).mean((2, 3))


class MinibatchDiscrimination(Plain):
    def features(self, images: Tensor, rng: Rng) -> Tensor:
        features = super().features(images, rng)
        return features + torch.cdist(features, features).mean(1, keepdim=True)


class ZeroInit(TorchBatchNorm):
    """Batch norm on a branch that has no influence at first."""

    def __init__(self, image_chw: tuple[int, int, int], outputs: int) -> None:
        super().__init__(image_chw, outputs)
        self.gain = nn.Parameter(torch.zeros(1))

    def features(self, images: Tensor, rng: Rng) -> Tensor:
        maps = self.conv(images)
        return F.leaky_relu(maps + self.gain * self.norm(maps), 0.1).mean((2, 3))


class RunningSum(Plain):
    """An image's features depend on those before it."""

    def features(self, images: Tensor, rng: Rng) -> Tensor:
        return super().features(images, rng).cumsum(0)


class CentersInEvaluation(Plain):
    def features(self, images: Tensor, rng: Rng) -> Tensor:
        features = super().features(images, rng)
        return features if rng is not None else features - features.mean(0)


class Unused(Plain):
    def __init__(self, image_chw: tuple[int, int, int], outputs: int) -> None:
        super().__init__(image_chw, outputs)
        self.forgotten = nn.Linear(3, 3)


class NoGradient(Plain):
    def forward(self, images: Tensor, rng: Rng = None) -> Any:
        return super().forward(images.detach(), rng)


class PickledState(Plain):
    def get_extra_state(self) -> Any:
        return {1, 2}

    def set_extra_state(self, state: Any) -> None: ...


class OnlyGetsState(Plain):
    def get_extra_state(self) -> Any:
        return {"a": 1}


class HoldsALock(Plain):
    def __init__(self, image_chw: tuple[int, int, int], outputs: int) -> None:
        super().__init__(image_chw, outputs)
        self.lock = threading.Lock()


class Buggy(Plain):
    def features(self, images: Tensor, rng: Rng) -> Tensor:
        return self.helper(images)  # type: ignore[call-arg]

    def helper(self) -> Tensor:
        raise NotImplementedError


class Counting(Plain):
    """An int64 buffer comes first in the state, as `num_batches_tracked` may."""

    def __init__(self, image_chw: tuple[int, int, int], outputs: int) -> None:
        super().__init__(image_chw, outputs)
        self.register_buffer("a_table", torch.arange(10))

    def features(self, images: Tensor, rng: Rng) -> Tensor:
        return super().features(images, rng) + self.get_buffer("a_table").sum()


class Tied(Plain):
    """One layer under two names, and one parameter in two layers."""

    def __init__(self, image_chw: tuple[int, int, int], outputs: int) -> None:
        super().__init__(image_chw, outputs)
        self.inner = nn.Linear(8, 8)
        self.again = self.inner
        self.third = nn.Linear(8, 8, bias=False)
        self.third.weight = self.inner.weight

    def features(self, images: Tensor, rng: Rng) -> Tensor:
        features = F.leaky_relu(self.inner(super().features(images, rng)), 0.1)
        return features + self.third(self.again(features))


class ExtraState(Plain):
    """A scale outside of parameters and buffers, which the classifier needs too."""

    def __init__(self, image_chw: tuple[int, int, int], outputs: int) -> None:
        super().__init__(image_chw, outputs)
        self.scales = [1.0]

    def get_extra_state(self) -> dict[str, list[float]]:
        return {"scales": self.scales}

    def set_extra_state(self, state: dict[str, list[float]]) -> None:
        self.scales = state["scales"]

    def features(self, images: Tensor, rng: Rng) -> Tensor:
        features = super().features(images, rng) * self.scales[-1]
        if rng is not None and self.training and self.conv.weight.requires_grad:
            # changes with each step, and is a function of what a checkpoint holds
            self.scales = [1.0 + float(self.conv.weight.detach().abs().mean())]
        return features


class TensorState(Plain):
    """Extra state that is a tensor."""

    def __init__(self, image_chw: tuple[int, int, int], outputs: int) -> None:
        super().__init__(image_chw, outputs)
        self.scale = torch.full((1,), 1.5)

    def get_extra_state(self) -> Tensor:
        return self.scale

    def set_extra_state(self, state: Tensor) -> None:
        self.scale = state.cpu()

    def features(self, images: Tensor, rng: Rng) -> Tensor:
        return super().features(images, rng) * self.scale.to(images)


class Spectral(Plain):
    def __init__(self, image_chw: tuple[int, int, int], outputs: int) -> None:
        super().__init__(image_chw, outputs)
        for layer in (self.conv, self.head):
            spectral_norm(layer)

    def features(self, images: Tensor, rng: Rng) -> Tensor:
        return dropout(super().features(images, rng), 0.2, rng)


class Half(Plain):
    def __init__(self, image_chw: tuple[int, int, int], outputs: int) -> None:
        super().__init__(image_chw, outputs)
        self.half()


class Compiled(Plain):
    def __init__(self, image_chw: tuple[int, int, int], outputs: int) -> None:
        super().__init__(image_chw, outputs)
        self.inner = torch.compile(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), backend="eager")

    def features(self, images: Tensor, rng: Rng) -> Tensor:
        return self.inner(super().features(images, rng))


class OwnBatchNorm(Plain):
    def __init__(self, image_chw: tuple[int, int, int], outputs: int) -> None:
        super().__init__(image_chw, outputs)
        self.norm = GlobalBatchNorm(8)

    def features(self, images: Tensor, rng: Rng) -> Tensor:
        return F.leaky_relu(self.norm(self.conv(images)), 0.1).mean((2, 3))


class OwnOutput(NamedTuple):
    """The fields of `DiscriminatorOutput`, in another order and with one more."""

    features: Tensor
    logits: Tensor
    maps: Tensor


class OtherTuple(Plain):
    def forward(self, images: Tensor, rng: Rng = None) -> Any:
        output = super().forward(images, rng)
        return OwnOutput(output.features, output.logits, output.features.detach())


class PlainGenerator(nn.Module):
    """A small generator in which subclasses change one thing."""

    def __init__(self, image_chw: tuple[int, int, int]) -> None:
        super().__init__()
        self.image_chw = image_chw
        self.dense = nn.Linear(5, image_chw[0] * image_chw[1] * image_chw[2])

    def latent(self, rng: GlobalRandom) -> Tensor:
        return rng.normal(5)

    def forward(self, z: Tensor) -> Any:
        return torch.tanh(self.dense(z)).unflatten(1, self.image_chw)


class NoLatent(PlainGenerator):
    latent = None  # type: ignore[assignment]


class FlatLatent(PlainGenerator):
    def latent(self, rng: GlobalRandom) -> Tensor:
        return rng.normal(5).flatten()


class TorchLatent(PlainGenerator):
    def latent(self, rng: GlobalRandom) -> Tensor:
        return torch.randn(len(rng.normal(5)), 5)


class ChannelsLast(PlainGenerator):
    def forward(self, z: Tensor) -> Any:
        return super().forward(z).movedim(1, -1)


class Unbounded(PlainGenerator):
    def forward(self, z: Tensor) -> Any:
        return super().forward(z) * 255


class NoisyGenerator(PlainGenerator):
    def forward(self, z: Tensor) -> Any:
        return super().forward(z + 0.1 * torch.randn_like(z))


class BatchNormGenerator(PlainGenerator):
    def __init__(self, image_chw: tuple[int, int, int]) -> None:
        super().__init__(image_chw)
        self.norm = nn.BatchNorm1d(5)

    def forward(self, z: Tensor) -> Any:
        return super().forward(self.norm(z))


class ZeroInitGenerator(BatchNormGenerator):
    def __init__(self, image_chw: tuple[int, int, int]) -> None:
        super().__init__(image_chw)
        nn.init.zeros_(self.dense.weight)


class UnusedInGenerator(PlainGenerator):
    def __init__(self, image_chw: tuple[int, int, int]) -> None:
        super().__init__(image_chw)
        self.forgotten = nn.Linear(3, 3)


class NeedsImages(Plain):
    """Looks at its first image, also where it has none."""

    def forward(self, images: Tensor, rng: Rng = None) -> DiscriminatorOutput:
        assert images[0].dim() == 3
        return super().forward(images, rng)
