"""Batch norm over all ranks, against torch's own on one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor.debug import CommDebugMode

from sgan_dist.gan.models.tutorial import PartwiseBatchNorm
from sgan_dist.parallel.batchnorm import GlobalBatchNorm
from tests.ranks import run_ranks


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


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 0.02)])
def test_a_mean_far_from_zero_does_not_cancel(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    values = torch.randn(512, 3, dtype=torch.float64)
    layer = GlobalBatchNorm(3, eps=0).to(dtype)
    layer.running_mean.fill_(100)  # as after some steps
    out = layer((100 + 0.01 * values).to(dtype)).double()
    expected = (values - values.mean(0)) / values.std(0, correction=0)
    assert (out - expected).abs().max() < tolerance


def normalized(rank: int, world_size: int, cuts: list[int]) -> tuple[int, dict[str, Any]]:
    """Two parts of 12 rows through one layer; this rank has the rows from cuts[rank] to the next.

    Returns the number of collectives, and arrays.
    """
    if world_size > 1:
        dist.init_process_group("gloo")
    torch.manual_seed(0)
    parts = [3 * torch.randn(12, 5, 2, 2, dtype=torch.float64) + 7 for _ in range(2)]
    factors = [torch.randn_like(part) for part in parts]
    layer = PartwiseBatchNorm(5).double()
    nn.init.normal_(layer.weight)
    rows = slice(cuts[rank], cuts[rank + 1])
    leaves = [part[rows].clone().requires_grad_() for part in parts]
    with CommDebugMode() as communication:
        outputs = layer.normalize(leaves, [True, False])
        pairs = zip(outputs, factors, strict=True)
        torch.stack([(out * factor[rows]).pow(3).sum() for out, factor in pairs]).sum().backward()
    values = {"mean": layer.running_mean, "var": layer.running_var, "weight": layer.weight.grad}
    values |= {f"output {i}": out.detach() for i, out in enumerate(outputs)}
    values |= {f"gradient {i}": leaf.grad for i, leaf in enumerate(leaves)}
    arrays = {name: value.numpy() for name, value in values.items() if value is not None}
    return communication.get_total_counts(), arrays


@pytest.mark.process
def test_ranks_with_unequal_rows_normalize_as_one_by_one_collective_each_way() -> None:
    ((_, alone),) = run_ranks(1, normalized, 1, [0, 12])
    for cuts in ([0, 3, 12], [0, 0, 7, 12]):  # a rank may have no rows
        ranks = run_ranks(len(cuts) - 1, normalized, len(cuts) - 1, cuts)
        assert {calls for calls, _ in ranks} == {2}
        for name, expected in alone.items():
            values = [arrays[name] for _, arrays in ranks]
            if name in ("mean", "var"):
                joined = values[-1]
            else:  # the gradient of the weight is a share of the whole
                joined = sum(values) if name == "weight" else np.concatenate(values)
            assert np.allclose(joined, expected, rtol=1e-12, atol=1e-12), name
