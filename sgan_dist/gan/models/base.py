"""What a discriminator and a generator must be, and the pieces that networks share.

A user's own network is any `nn.Module` with these signatures, named `package.module:Class` in the
config; it is built as `Class(image_chw=(C, H, W), outputs=..., **args)` for a discriminator and
`Class(image_chw=(C, H, W), **args)` for a generator.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from sgan_dist.errors import UserError
from sgan_dist.parallel.random import GlobalRandom

CHW = tuple[int, int, int]  # channels, height and width of an image
GAIN = "parametrizations.weight.original0"  # g of torch's weight norm


class DiscriminatorOutput(NamedTuple):
    """D's output for n images."""

    logits: Tensor
    """(n, N) in the implied form; (n, N+1), the fake class last, in the explicit form"""
    features: Tensor
    """(n, F), the layer whose means feature matching compares"""


class Discriminator(Protocol):
    def __call__(self, images: Tensor, rng: GlobalRandom | None = None) -> DiscriminatorOutput:
        """Logits and features of images (n, C, H, W) in [-1, 1]; without `rng`, for evaluation.

        All randomness comes from `rng`. Only functions of `sgan_dist.parallel` may mix samples: the
        images are a rank's slices of three global batches (labeled, unlabeled, generated), joined.
        """
        ...


class Generator(Protocol):
    def latent(self, rng: GlobalRandom) -> Tensor:
        """Latent vectors (n, Z), one for each row of `rng`."""
        ...

    def __call__(self, z: Tensor) -> Tensor:
        """Images (n, C, H, W) in [-1, 1] from latent vectors (n, Z)."""
        ...


def gaussian_noise(x: Tensor, std: float, rng: GlobalRandom | None) -> Tensor:
    """`x` plus N(0, std^2) noise; `x` itself in evaluation."""
    if rng is None or std == 0:
        return x
    return x + std * rng.normal(*x.shape[1:]).to(x.dtype)


def dropout(x: Tensor, rate: float, rng: GlobalRandom | None) -> Tensor:
    """`x` with elements zeroed at `rate`, the rest scaled up; `x` itself in evaluation."""
    if rng is None or rate == 0:
        return x
    keep = rng.uniform(*x.shape[1:]) >= rate
    return x * keep.to(x.dtype) / (1 - rate)


def check_divisible(name: str, height: int, width: int) -> None:
    """Raises UserError for a size that a generator which doubles its maps twice cannot make."""
    if height % 4 or width % 4:
        raise UserError(
            f"model {name} generates images whose sides are divisible by 4, and the dataset's are"
            f" {height}x{width}: resize them, or use a model.generator of your own"
        )


def normed(layer: nn.Module) -> nn.Module:
    """`layer` with weight normalization, weight = g v / |v| (arXiv:1602.07868)."""
    return weight_norm(layer)  # type: ignore[no-any-return]


@torch.no_grad()
def data_dependent_init(network: nn.Module, *inputs: object) -> None:
    """Scales weight-normed layers so that their outputs have mean 0 and variance 1 on `inputs`.

    Salimans & Kingma 2016, arXiv:1602.07868, sec. 3. Call it on every rank with the same inputs,
    noise included. The variance is over the batch and, for maps, over positions. Layers without a
    bias keep their mean; layers without weight norm are not changed.
    """

    def standardize(layer: nn.Module, _: object, out: Tensor) -> Tensor:
        axes = [d for d in range(out.dim()) if d != 1]
        mean, std = out.mean(axes), out.std(axes, correction=0) + 1e-8
        gain = layer.get_parameter(GAIN)
        gain.div_(std.view(-1, *[1] * (gain.dim() - 1)))
        if layer.bias is None:
            mean = torch.zeros_like(mean)
        else:
            layer.get_parameter("bias").sub_(mean).div_(std)
        view = (1, -1) + (1,) * (out.dim() - 2)
        return (out - mean.view(view)) / std.view(view)

    layers = [
        layer
        for layer in network.modules()
        if isinstance(layer, nn.Linear | nn.Conv2d) and GAIN in dict(layer.named_parameters())
    ]
    hooks = [layer.register_forward_hook(standardize) for layer in layers]
    try:
        with torch.compiler.set_stance("force_eager"):  # hooks in compiled code are not seen
            network(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
