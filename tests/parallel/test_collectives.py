"""Sums, first rows and broadcasts over real ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from sgan_dist.parallel.collectives import broadcast, first_rows
from sgan_dist.parallel.random import share
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
