"""Errors, flags and objects between ranks, over the store at which they have met."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch.distributed as dist

from sgan_dist.errors import TransientError, UserError
from sgan_dist.parallel import agreement
from sgan_dist.parallel.agreement import (
    STORED_BYTES,
    leave_at_exit,
    limit_waits,
    reduce_objects,
    run_on_all,
    run_on_main,
    synchronize,
)
from tests.ranks import run_ranks

pytestmark = pytest.mark.process


def join() -> None:
    dist.init_process_group("gloo")


def outcome(work: Any) -> str:
    try:
        return str(work())
    except UserError as error:
        return f"{type(error).__name__}: {error}"


def agree(rank: int) -> list[str]:
    join()

    def fail(*ranks: int) -> int:
        if rank in ranks:
            raise UserError(f"rank {rank} failed")
        return rank

    def lose() -> None:
        raise FileNotFoundError(2, "no such file", "x.tar")

    large = "x" * (STORED_BYTES + 1)
    before = dict(dist.distributed_c10d._world.pg_map)
    results = [
        outcome(lambda: reduce_objects(rank * 10, list)),
        outcome(lambda: reduce_objects("ab"[rank % 2] * (rank + 1), "".join)),
        outcome(lambda: synchronize(None, rank == 1, rank == 7, True)),
        outcome(lambda: run_on_all(lambda: fail(1, 2))),
        outcome(lambda: run_on_main(lambda: fail(0))),
        outcome(lambda: run_on_main(lambda: fail(1))),
        outcome(lambda: run_on_all(lose)),
        outcome(lambda: run_on_main(lambda: len(large)) == len(run_on_main(lambda: large))),
        outcome(lambda: reduce_objects(large[:60_000], lambda parts: len("".join(parts)))),
    ]
    assert dist.distributed_c10d._world.pg_map == before  # no group beside that of the device
    return results


def test_all_ranks_get_the_same() -> None:
    expected = [
        "[0, 10, 20]",
        "abbaaa",
        "[True, False, True]",
        "UserError: rank 1 failed",
        "UserError: rank 0 failed",
        "0",
        "TransientError: no such file: x.tar",
        "True",
        "180000",
    ]
    assert run_ranks(3, agree) == [expected] * 3


def test_alone_nothing_is_sent() -> None:
    assert reduce_objects(3, list) == [3]
    assert synchronize(None, False, True) == [False, True]
    with pytest.raises(TransientError, match="full"):
        run_on_main(lambda: (_ for _ in ()).throw(OSError(28, "full")))


def wait_for_lost(rank: int, lost: int) -> tuple[str, float]:
    """What a rank sees that waits for another one, which has ended with an error of its own."""
    join()
    start = time.monotonic()
    if rank == lost:
        agreement._leave()  # as at its exit
        return "", 0.0
    message = ""
    try:
        synchronize()
    except RuntimeError as error:
        message = str(error).splitlines()[0]
    return message, time.monotonic() - start


def test_a_rank_that_has_ended_is_named() -> None:
    results = run_ranks(2, wait_for_lost, 1)
    message, seconds = results[0]
    assert message == "rank 1 has ended with an error of its own, and rank 0 waits for it"
    assert seconds < 60  # far from the time that `limit_waits` allows


def wait_in_vain(rank: int) -> str:
    join()
    limit_waits(2.0)
    if rank == 1:
        time.sleep(8)
        return ""
    try:
        synchronize()
    except RuntimeError as error:
        return str(error)
    return "no error"


def test_a_wait_is_limited() -> None:
    assert run_ranks(2, wait_in_vain)[0] == "rank 0 has waited 2 s for rank 1"


def leave(rank: int) -> bool:
    join()
    leave_at_exit()
    agreement._leave()
    return dist.is_initialized()


def test_a_process_leaves_its_group() -> None:
    assert run_ranks(2, leave) == [False, False]
