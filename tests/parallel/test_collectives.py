"""Sums, first rows and broadcasts over real ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from sgan_dist.parallel.collectives import broadcast, differing_replica, first_rows
from sgan_dist.parallel.random import digest, share
from tests.ranks import run_ranks


def rows_and_weights(rank: int, world_size: int) -> tuple[Any, ...]:
    if world_size > 1:
        dist.init_process_group("gloo")
    rows = share(10, rank, world_size)
    batch = torch.arange(40, dtype=torch.uint8).view(10, 2, 2)
    firsts = [first_rows(batch[rows.start : rows.stop], rows, n).numpy() for n in (1, 4, 7, 10)]
    weights = [torch.tensor([1.0, 2.0]), torch.tensor(3)]
    if rank:
        weights[0][1] = 2.0 + 2**-22  # the next float, as another kernel may round
    broadcast(weights)
    return (firsts, *(weight.tolist() for weight in weights))


@pytest.mark.process
@pytest.mark.parametrize("world_size", [1, 3, 4])
def test_first_rows_and_broadcast(world_size: int) -> None:
    expected = torch.arange(40, dtype=torch.uint8).view(10, 2, 2).numpy()
    for firsts, first_weight, second_weight in run_ranks(world_size, rows_and_weights, world_size):
        assert [first.tolist() for first in firsts] == [
            expected[:n].tolist() for n in (1, 4, 7, 10)
        ]
        assert (first_weight, second_weight) == ([1.0, 2.0], 3)


SAME = {
    "empty": torch.empty(0, 3),
    "flag": torch.tensor([True, False, True]),
    "half": torch.arange(7, dtype=torch.bfloat16),
    "scalar": torch.tensor(5),
    "strided": torch.arange(12.0).view(3, 4).t(),
    "nan": torch.tensor([float("nan"), 0.0, 1.0]),
}
CHANGES = {
    "one ulp": ("strided", lambda t: t.view(torch.int32)[1, 2].add_(1)),
    "swapped": ("half", lambda t: t.copy_(t.flip(0))),
    "sign of zero": ("nan", lambda t: t[1:2].neg_()),
    "payload of NaN": ("nan", lambda t: t.view(torch.int32)[0].add_(1)),
    "one flag": ("flag", lambda t: t[2].fill_(False)),
    "a count": ("scalar", lambda t: t.add_(1)),
}


def differing(rank: int) -> list[str | None]:
    dist.init_process_group("gloo")
    names = [differing_replica(SAME)]
    for name, change in CHANGES.values():
        tensors = {key: value.clone() for key, value in SAME.items()}
        if rank == 1:
            change(tensors[name])
        names.append(differing_replica(tensors))
    return names


@pytest.mark.process
def test_replicas_that_differ_in_one_bit_are_named() -> None:
    expected = [None, *(name for name, _ in CHANGES.values())]
    assert run_ranks(3, differing) == [expected] * 3


def test_a_digest_is_of_the_bytes_in_their_order() -> None:
    value = torch.arange(12.0).view(3, 4)
    assert digest(value) == digest(value.t().contiguous().t()) != digest(value.t())
    assert digest(torch.zeros(3)) != digest(torch.zeros(4))
