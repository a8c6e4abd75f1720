"""Random numbers depend on the step and the global sample, never on the rank."""

from __future__ import annotations

import torch

from sgan_dist.parallel.random import BatchSlice, GlobalRandom

CPU = torch.device("cpu")


def draw(rank: int, world_size: int, step: int = 3, purpose: str = "test") -> list[torch.Tensor]:
    """Three calls over a batch of 12 and one of 24, part by part."""
    parts = {"a": BatchSlice.of(12, rank, world_size), "b": BatchSlice.of(24, rank, world_size)}
    source = GlobalRandom(5, purpose, step, parts, CPU)
    sizes = list(source.sizes.values())
    calls = [source.normal(7), source.uniform(2, 3), source.normal(7)]
    return [piece for call in calls for piece in call.split(sizes)]


def test_ranks_hold_slices_of_one_global_draw() -> None:
    alone = draw(0, 1)
    for world_size in (2, 3, 4):
        ranks = [draw(rank, world_size) for rank in range(world_size)]
        for number, whole in enumerate(alone):
            assert torch.equal(torch.cat([parts[number] for parts in ranks]), whole)


def test_every_call_part_step_and_purpose_draws_other_numbers() -> None:
    first = draw(0, 1)
    assert not torch.equal(first[0], first[4])  # two calls of the same shape
    assert not torch.equal(first[0], first[1][:12])  # two parts
    assert not torch.equal(first[0], draw(0, 1, step=4)[0])
    assert not torch.equal(first[0], draw(0, 1, purpose="other")[0])


def test_the_same_step_draws_the_same_again() -> None:
    assert all(torch.equal(a, b) for a, b in zip(draw(0, 1), draw(0, 1), strict=True))


def test_the_laws_are_right() -> None:
    source = GlobalRandom(0, "law", 0, {"all": BatchSlice.of(20_000, 0, 1)}, CPU)
    normal, uniform = source.normal(5), source.uniform(5)
    assert abs(normal.mean()) < 0.02 and abs(normal.std() - 1) < 0.02
    assert uniform.min() >= 0 and uniform.max() < 1 and abs(uniform.mean() - 0.5) < 0.01
