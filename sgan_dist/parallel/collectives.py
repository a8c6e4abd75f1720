"""Collectives: sums, gathers and replica checks over all ranks.

One contract for gradients: a rank back-propagates its additive *share* of the global loss. Shares
add up over ranks to the global loss, in value and in gradient; only the engines undo the averaging
of data-parallel wrappers (see `sgan_dist.parallel.engine`).

Without a process group every function works as in a world of one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sgan_dist.parallel.random import digest


def world_size() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's rank; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def all_sum(value: Tensor) -> Tensor:
    """The sum over ranks, without gradient; same shape and dtype."""
    total = value.detach().clone()
    if world_size() > 1:
        dist.all_reduce(total)
    return total


class _DifferentiableSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return all_sum(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return differentiable_sum(gradient)  # differentiable again


def differentiable_sum(value: Tensor) -> Tensor:
    """The sum over ranks; its gradient is the sum of the gradients of all ranks' loss shares."""
    return _DifferentiableSum.apply(value) if world_size() > 1 else value  # type: ignore[no-untyped-call]


def gather(local: Tensor) -> Tensor:
    """The slices of all ranks end to end, ranks in order; equal shapes, without gradient."""
    if world_size() == 1:
        return local
    slices = [torch.empty_like(local) for _ in range(world_size())]
    dist.all_gather(slices, local.contiguous())
    return torch.cat(slices)


def first_rows(local: Tensor, rows: range, count: int) -> Tensor:
    """The first `count` rows of a global batch, of which this rank holds the rows `rows` as `local`.

    No gradient. Costs `count` rows at any world size: ranks add what they have of them.
    """
    first = local.new_zeros(count, *local.shape[1:])
    own = range(min(rows.start, count), min(rows.stop, count))
    first[own.start : own.stop] = local[: len(own)]
    return all_sum(first)


def broadcast(tensors: Iterable[Tensor]) -> None:
    """Gives every rank the values of rank 0, in place."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def as_bytes(tensor: Tensor) -> bytes:
    """The bytes of a tensor's values, in row-major order."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def differing_replica(tensors: dict[str, Tensor]) -> str | None:
    """The name of the first tensor that is not the same on all ranks, by a hash of its bytes."""
    if world_size() == 1:
        return None
    digests = torch.stack([digest(tensor) for tensor in tensors.values()])
    largest = torch.stack([digests, ~digests])  # the largest ~digest is that of the smallest
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    differ = (largest[0] != ~largest[1]).tolist()
    return next((name for name, differs in zip(tensors, differ, strict=True) if differs), None)
