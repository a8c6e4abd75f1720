"""Batch norm over the global batch of all ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sgan_dist.parallel.collectives import differentiable_sum


class GlobalBatchNorm(nn.Module):
    """Batch norm over the global batch, for (n, C) and (n, C, H, W), on CPU and GPU.

    Statistics are summed over ranks, with gradient, in at least fp32. torch's SyncBatchNorm refuses
    CPU tensors. Eval mode uses the running averages.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.normalize([x], [True])[0]

    def normalize(self, parts: Sequence[Tensor], tracked: Sequence[bool]) -> list[Tensor]:
        """Returns each part normalized by its own global statistics; in eval mode by the averages.

        The running averages follow the tracked parts, in order, unless the layer is frozen. One
        collective forward and one backward for all parts; ranks may hold different numbers of rows.
        """
        if not self.training:
            return [self._affine(x, self.running_mean, self.running_var) for x in parts]
        channels = len(self.running_mean)
        shift = self.running_mean.clone()  # the same on all ranks
        sums = torch.stack([_sums(x, shift) for x in parts])
        totals = differentiable_sum(sums)
        counts, first, second = torch.split(totals, [1, channels, channels], 1)
        deviations = first / counts
        means, variances = shift + deviations, second / counts - deviations.square()
        if self.weight.requires_grad:
            self._track(means, variances * (counts / (counts - 1).clamp_min(1)), tracked)
        return [self._affine(*part) for part in zip(parts, means, variances, strict=True)]

    @torch.no_grad()
    def _track(self, means: Tensor, variances: Tensor, tracked: Sequence[bool]) -> None:
        for mean, variance, track in zip(means, variances, tracked, strict=True):
            if track:
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
                self.running_var.lerp_(variance.to(self.running_var.dtype), self.momentum)

    def _affine(self, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        scale = self.weight * torch.rsqrt(var + self.eps)
        view = (1, -1) + (1,) * (x.dim() - 2)
        out = x * scale.view(view) + (self.bias - mean * scale).view(view)
        return out.to(x.dtype)


def _sums(x: Tensor, shift: Tensor) -> Tensor:
    """Number of values a channel, and the sums of `x - shift` and of its square: (1 + 2C,).

    Without the shift the variance, E[x^2] - E[x]^2, would cancel where the mean is large.
    """
    values = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    deviations = values - shift.view(1, -1, *[1] * (x.dim() - 2))
    axes = [d for d in range(x.dim()) if d != 1]
    count = values.new_full((1,), x.numel() // x.shape[1])
    return torch.cat([count, deviations.sum(axes), deviations.square().sum(axes)])
