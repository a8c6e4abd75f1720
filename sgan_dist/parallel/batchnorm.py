"""Batch norm over the global batch of all ranks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sgan_dist.parallel.collectives import differentiable_sum, world_size


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
        return self.normalize(x, track=True)

    def normalize(self, x: Tensor, track: bool) -> Tensor:
        """Returns `x` normalized by its own global mean and variance; in eval mode by the averages.

        With `track`, the running averages follow them, unless the layer is frozen.
        """
        if not self.training:
            return self._affine(x, self.running_mean, self.running_var)
        values = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        axes = [d for d in range(values.dim()) if d != 1]
        count = x.numel() // x.shape[1] * world_size()  # equal on all ranks
        mean = differentiable_sum(values.sum(axes)) / count
        # A second pass, over centered values: E[x^2] - E[x]^2 would cancel in fp32.
        view = (1, -1) + (1,) * (x.dim() - 2)
        var = differentiable_sum((values - mean.view(view)).square().sum(axes)) / count
        if track and self.weight.requires_grad:
            with torch.no_grad():
                unbiased = var * (count / max(count - 1, 1))
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
                self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
        return self._affine(x, mean, var)

    def _affine(self, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        scale = self.weight * torch.rsqrt(var + self.eps)
        view = (1, -1) + (1,) * (x.dim() - 2)
        out = x * scale.view(view) + (self.bias - mean * scale).view(view)
        return out.to(x.dtype)
