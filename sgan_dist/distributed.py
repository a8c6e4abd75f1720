"""Collectives: sums over all ranks, batch norm over the global batch, and agreement on errors.

One contract for gradients: what a rank back-propagates is its additive *share* of the global loss.
Shares add up over ranks to the global loss, in value and in gradient; `backend.py` alone undoes the
averaging of data-parallel wrappers.

All of it works without a process group too, as a world of one.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sgan_dist.errors import Outage, UserError

T = TypeVar("T")


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def is_rank_zero() -> bool:
    """Whether this process may print, from the launcher's environment: no process group is needed."""
    return os.environ.get("RANK", "0") == "0"


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
        return differentiable_sum(gradient)  # with a gradient of its own, where that is asked for


def differentiable_sum(value: Tensor) -> Tensor:
    """The sum over ranks; its gradient gathers what every rank's share of the loss makes of it."""
    return _DifferentiableSum.apply(value) if world_size() > 1 else value  # type: ignore[no-untyped-call]


def gather_batch(local: Tensor) -> Tensor:
    """The global batch, ranks in order, from equal parts; no gradient."""
    if world_size() == 1:
        return local
    parts = [torch.empty_like(local) for _ in range(world_size())]
    dist.all_gather(parts, local.contiguous())
    return torch.cat(parts)


class GlobalBatchNorm(nn.Module):
    """Batch norm over the global batch, for (n, C) and (n, C, H, W), on CPU and GPU.

    Sums, squared sums and counts are summed over ranks, with gradient, in at least fp32. (torch's
    SyncBatchNorm refuses CPU tensors.) In eval mode the running averages are used.
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
        if self.training:
            return self.normalize(x, track=True)
        return self._affine(x, self.running_mean, self.running_var)

    def normalize(self, x: Tensor, track: bool) -> Tensor:
        """`x` by its own global moments, which the running averages follow if `track`.

        They stand still while the layer is frozen.
        """
        values = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        axes = [d for d in range(values.dim()) if d != 1]
        count = x.numel() // x.shape[1] * world_size()  # every rank holds as many
        mean = differentiable_sum(values.sum(axes)) / count
        # Second pass over centered values: squared sums alone would cancel in fp32.
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


def as_bytes(tensor: Tensor) -> bytes:
    """A tensor's values as they lie in memory, in row order."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def differing_replica(tensors: dict[str, Tensor]) -> str | None:
    """The name of the first tensor that is not the same on all ranks, by its bytes."""
    if world_size() == 1:
        return None
    digests = {name: hashlib.sha256(as_bytes(v)).digest() for name, v in tensors.items()}
    others = gather_objects(digests)
    return next((name for name in digests if any(o[name] != digests[name] for o in others)), None)


def gather_objects(mine: T) -> list[T]:
    """One small picklable object from every rank, ranks in order, on every rank."""
    if world_size() == 1:
        return [mine]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, mine, group=_host_group())
    return found


@functools.lru_cache(maxsize=1)
def _host_group() -> Any:
    """A gloo group for messages between hosts: with NCCL they would stall the GPU's stream."""
    return None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")


def agree(error: UserError | None = None, *flags: bool) -> list[bool]:
    """Makes one rank's trouble everyone's, at a point that all ranks reach.

    Returns for each flag whether any rank raised it. Where any rank brings an error, the lowest
    rank's is raised on all.
    """
    failed, raised = error is not None, list(flags)
    if world_size() > 1:
        tensor = torch.tensor([failed, *flags], dtype=torch.int32)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=_host_group())
        failed, *raised = (bool(flag) for flag in tensor.tolist())
    if failed:
        raise next(found for found in gather_objects(error) if found is not None)
    return raised


def together(work: Callable[[], T]) -> T:
    """Runs `work` on every rank; a UserError or OSError on any of them is raised on all."""
    result, error = attempt(work)
    agree(error)
    return result  # type: ignore[return-value]


def on_rank_zero(work: Callable[[], T]) -> T:
    """Runs `work` on rank 0 alone, and returns its (picklable) result, or raises its error, on all."""
    result, error = attempt(work) if rank() == 0 else (None, None)
    agree(error)
    if world_size() > 1:
        box = [result]
        dist.broadcast_object_list(box, src=0, group=_host_group())
        result = box[0]
    return result  # type: ignore[return-value]


def attempt(work: Callable[[], T]) -> tuple[T | None, UserError | None]:
    """The result of `work`, or its UserError, or an OSError as an Outage, to `agree` on."""
    try:
        return work(), None
    except UserError as error:
        return None, error
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        return None, Outage(f"{error.strerror or error}{where}")


def limit_waits(seconds: float) -> None:
    """How long, from now on, a collective waits for the other ranks before it fails on this one."""
    if dist.is_initialized():
        for group in {None, _host_group()}:
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)
