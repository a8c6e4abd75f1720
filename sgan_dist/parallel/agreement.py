"""Agreement between ranks: one rank's error is raised on all, one rank's result is used by all.

Without a process group every function works as in a world of one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from sgan_dist.errors import TransientError, UserError
from sgan_dist.parallel.collectives import gather_objects, host_group, rank, world_size

T = TypeVar("T")


def synchronize(error: UserError | None = None, *flags: bool) -> list[bool]:
    """Raises one rank's error on every rank. A collective: all ranks must call it.

    Returns for each flag whether any rank set it.

    Raises:
        UserError: the `error` of the lowest rank that has one.
    """
    failed, result = error is not None, list(flags)
    if world_size() > 1:
        tensor = torch.tensor([failed, *flags], dtype=torch.int32)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=host_group())
        failed, *result = (bool(flag) for flag in tensor.tolist())
    if failed:
        raise next(e for e in gather_objects(error) if e is not None)
    return result


def run_on_all(work: Callable[[], T]) -> T:
    """Runs `work` on every rank; raises a UserError or OSError of any rank on all of them."""
    result, error = catch(work)
    synchronize(error)
    return result  # type: ignore[return-value]


def run_on_main(work: Callable[[], T]) -> T:
    """Runs `work` on rank 0 only; returns its (picklable) result, or raises its error, on all."""
    result, error = catch(work) if rank() == 0 else (None, None)
    synchronize(error)
    if world_size() > 1:
        box = [result]
        dist.broadcast_object_list(box, src=0, group=host_group())
        result = box[0]
    return result  # type: ignore[return-value]


def catch(work: Callable[[], T]) -> tuple[T | None, UserError | None]:
    """Returns the result of `work`, or its error, for `synchronize`; OSError as TransientError."""
    try:
        return work(), None
    except UserError as error:
        return None, error
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        return None, TransientError(f"{error.strerror or error}{where}")
