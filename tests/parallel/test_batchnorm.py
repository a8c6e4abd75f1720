"""Batch norm over all ranks, against torch's own on one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sgan_dist.parallel.batchnorm import GlobalBatchNorm


@pytest.mark.parametrize("shape", [(64, 5), (16, 5, 3, 4)])
def test_batch_norm_is_torchs_own_on_one_rank(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    reference = (nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d)(5).double()
    layer = GlobalBatchNorm(5).double()
    nn.init.normal_(reference.weight)
    layer.load_state_dict(reference.state_dict(), strict=False)
    a = (3 * torch.randn(shape, dtype=torch.float64) + 2).requires_grad_()
    b = a.detach().clone().requires_grad_()
    weights = torch.randn(shape, dtype=torch.float64)
    (layer(a) * weights).sum().backward()
    (reference(b) * weights).sum().backward()
    assert a.grad is not None and b.grad is not None
    assert torch.allclose(a.grad, b.grad, atol=1e-12)
    assert layer.weight.grad is not None and reference.weight.grad is not None
    assert torch.allclose(layer.weight.grad, reference.weight.grad)
    assert reference.running_var is not None
    assert torch.allclose(layer.running_var, reference.running_var)
    layer.eval(), reference.eval()
    assert torch.allclose(layer(a), reference(b))
