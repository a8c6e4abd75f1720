"""Agreement between ranks: one rank's error is raised on all, one rank's result is used by all.

Messages go over the store at which the ranks have met, with rank 0 in the middle: this needs no
connections between all ranks, and nobody waits for a GPU. Each costs rank 0 a few requests a rank, so
none is made between one step and the next. Without a process group every function works as in a world
of one.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import pickle
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from sgan_dist.errors import TransientError, UserError
from sgan_dist.parallel.collectives import rank, world_size

T = TypeVar("T")
R = TypeVar("R")

STORED_BYTES = 64 * 1024  # larger results are broadcast by the process group, rank to rank
LOOK_SECONDS = 1.0  # how often a waiting rank looks whether the other one has ended

_numbers = itertools.count()  # of messages: all ranks make the same calls in the same order
_patience = 1800.0


def synchronize(error: UserError | None = None, *flags: bool) -> list[bool]:
    """Raises one rank's error on every rank. A collective: all ranks must call it.

    Returns for each flag whether any rank set it.

    Raises:
        UserError: the `error` of the lowest rank that has one.
    """

    def reduce(values: list[tuple[UserError | None, list[bool]]]) -> Any:
        errors, rows = zip(*values, strict=True)
        first = next((e for e in errors if e is not None), None)
        return first, [any(column) for column in zip(*rows, strict=True)]

    first, result = reduce_objects((error, list(flags)), reduce)
    if first is not None:
        raise first
    return result  # type: ignore[no-any-return]


def run_on_all(work: Callable[[], T]) -> T:
    """Runs `work` on every rank; raises a UserError or OSError of any rank on all of them."""
    result, error = catch(work)
    synchronize(error)
    return result  # type: ignore[return-value]


def run_on_main(work: Callable[[], T]) -> T:
    """Runs `work` on rank 0 only; returns its (picklable) result, or raises its error, on all."""
    result, error = _from_main(catch(work) if rank() == 0 else None)
    if error is not None:
        raise error
    return result  # type: ignore[no-any-return]


def catch(work: Callable[[], T]) -> tuple[T | None, UserError | None]:
    """Returns the result of `work`, or its error, for `synchronize`; OSError as TransientError."""
    try:
        return work(), None
    except UserError as error:
        return None, error
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        return None, TransientError(f"{error.strerror or error}{where}")


def reduce_objects(value: T, reduce: Callable[[list[T]], R]) -> R:
    """What `reduce` makes on rank 0 of a small picklable object of each rank, ranks in order."""
    n = world_size()
    if n == 1:
        return reduce([value])
    store, name = _store(), f"sgan_dist/values/{next(_numbers)}"
    store.set(f"{name}/{rank()}", pickle.dumps(value))
    reduced: Any = None
    if rank() == 0:
        keys = [f"{name}/{number}" for number in range(n)]
        _wait_for(store, keys, range(n))
        reduced = reduce([pickle.loads(data) for data in store.multi_get(keys)])
    return _from_main(reduced)  # type: ignore[no-any-return]


def limit_waits(seconds: float) -> None:
    """Sets how long a rank waits for the others, here and in collectives, before it fails."""
    global _patience
    if dist.is_initialized():
        _patience = seconds
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), None)


def leave_at_exit() -> None:
    """Makes this process leave its process group at its exit; it could not join one again."""
    atexit.unregister(_leave)
    atexit.register(_leave)


def _from_main(value: Any) -> Any:
    """The object of rank 0, on every rank. Rank 0, which may have the store, returns last."""
    n = world_size()
    if n == 1:
        return value
    store, name = _store(), f"sgan_dist/message/{next(_numbers)}"
    box = [value]
    if rank() == 0:
        data = pickle.dumps(value)
        stored = len(data) <= STORED_BYTES
        store.set(name, data if stored else b"")
        _wait_for(store, [f"{name}/{number}" for number in range(1, n)], range(1, n))
    else:
        _wait_for(store, [name], [0])
        data = store.get(name)
        stored = bool(data)
        store.set(f"{name}/{rank()}", b"")  # it is read
        box = [pickle.loads(data) if stored else None]
    if not stored:
        dist.broadcast_object_list(box, src=0)
    return box[0]


def _wait_for(store: Any, keys: Sequence[str], writers: Sequence[int]) -> None:
    """Waits until each of the ranks `writers` has written its key.

    Raises:
        RuntimeError: one of them has ended, or `limit_waits` is over.
    """
    deadline = time.monotonic() + _patience
    missing = dict(zip(writers, keys, strict=True))
    while missing:
        try:
            store.wait(list(missing.values()), timedelta(seconds=LOOK_SECONDS))
            return
        except dist.DistStoreError:  # not yet
            ended = [writer for writer in missing if store.check([_ended(writer)])]
            missing = {w: key for w, key in missing.items() if not store.check([key])}
            lost = [writer for writer in ended if writer in missing]
            if lost:
                raise RuntimeError(
                    f"rank {lost[0]} has ended with an error of its own, and rank {rank()} waits for it"
                ) from None
            if time.monotonic() > deadline:
                waited = (
                    f"rank {rank()} has waited {_patience:g} s for rank {min(missing, default=0)}"
                )
                raise RuntimeError(waited) from None


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()


def _ended(number: int) -> str:
    return f"sgan_dist/ended/{number}"


def _leave() -> None:
    if not dist.is_initialized():
        return
    if world_size() > 1:
        # the process that keeps the store may have ended already
        with contextlib.suppress(dist.DistNetworkError):
            _store().set(_ended(rank()), b"")
    dist.destroy_process_group()
