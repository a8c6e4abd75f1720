"""Random numbers depend on the step and the global sample, never on the rank, and follow their laws."""

from __future__ import annotations

import pytest
import torch

from sgan_dist.parallel.random import (
    CALL,
    GAMMA,
    MULTIPLIER_1,
    MULTIPLIER_2,
    PART_BITS,
    GlobalRandom,
    _hashed,
    normal_quantiles,
    share,
)

CPU = torch.device("cpu")


def draw(rank: int, world_size: int, step: int = 3, purpose: str = "test") -> list[torch.Tensor]:
    """Three calls over a batch of 12 and one of 25, part by part."""
    parts = {"a": share(12, rank, world_size), "b": share(25, rank, world_size)}
    source = GlobalRandom(5, purpose, step, parts, CPU)
    sizes = list(source.sizes.values())
    calls = [source.normal(7), source.uniform(2, 3), source.normal(7)]
    return [piece for call in calls for piece in call.split(sizes)]


def test_ranks_hold_slices_of_one_global_draw() -> None:
    alone = draw(0, 1)
    for world_size in (2, 3, 4, 5, 40):
        ranks = [draw(rank, world_size) for rank in range(world_size)]
        for number, whole in enumerate(alone):
            assert torch.equal(torch.cat([parts[number] for parts in ranks]), whole)


def test_every_call_part_step_seed_and_purpose_draws_other_numbers() -> None:
    first = draw(0, 1)
    assert not torch.equal(first[0], first[4])  # two calls of the same shape
    assert not torch.equal(first[0], first[1][:12])  # two parts
    assert not torch.equal(first[0], draw(0, 1, step=4)[0])
    assert not torch.equal(first[0], draw(0, 1, purpose="other")[0])
    other_seed = GlobalRandom(6, "test", 3, {"a": range(12)}, CPU).normal(7)
    assert not torch.equal(first[0], other_seed)


def test_the_same_step_draws_the_same_again() -> None:
    assert all(torch.equal(a, b) for a, b in zip(draw(0, 1), draw(0, 1), strict=True))


def mixed(x: int) -> int:
    """splitmix64's finalizer in Python's integers."""
    x = ((x ^ x >> 30) * MULTIPLIER_1) % 2**64
    x = ((x ^ x >> 27) * MULTIPLIER_2) % 2**64
    return x ^ x >> 31


@pytest.mark.process
@pytest.mark.slow
def test_compiled_code_draws_the_same_bits() -> None:
    def draw(source: GlobalRandom) -> tuple[torch.Tensor, ...]:
        return source.normal(3, 50), source.uniform(5), source.normal(784)

    def source() -> GlobalRandom:
        return GlobalRandom(3, "compiled", 9, {"a": range(40, 72), "b": range(64)}, CPU)

    compiled = torch.compile(draw, fullgraph=True)(source())
    assert all(torch.equal(a, b) for a, b in zip(compiled, draw(source()), strict=True))


@pytest.mark.parametrize("row", [0, 1, 1000, 2**33])
def test_the_numbers_are_splitmix64_of_their_place(row: int) -> None:
    parts = {"other": range(1), "rows": range(row, row + 1)}
    source = GlobalRandom(7, "law", 11, parts, CPU)
    uniform, normal = source.uniform(5)[1].tolist(), source.normal(2, 3)[1].flatten()

    def word(call: int, words: int, number: int) -> int:
        place = ((1 << PART_BITS) + row) * words + number
        return mixed((_hashed("7/law/11") + call * CALL + place * GAMMA) % 2**64)

    halves = [word(0, 3, n // 2) >> 32 * (n % 2) & 0xFFFFFFFF for n in range(5)]
    assert uniform == [(half >> 8) / 2**24 for half in halves]
    quarters = [word(1, 2, n // 4) >> 16 * (n % 4) & 0xFFFF for n in range(6)]
    table = normal_quantiles()
    places = [
        (quarter + 2**15) % 2**16 for quarter in quarters
    ]  # as a signed number, from -2^15 on
    assert torch.equal(normal, table[torch.tensor(places)])


def test_the_moments_are_right() -> None:
    source = GlobalRandom(0, "law", 0, {"all": range(50_000)}, CPU)
    normal, uniform = source.normal(20).double(), source.uniform(20).double()
    # a million of each: four standard errors
    assert abs(normal.mean()) < 4e-3 and abs(normal.square().mean() - 1) < 4 * 2**0.5 * 1e-3
    assert abs(normal.pow(3).mean()) < 4 * 15**0.5 * 1e-3
    assert abs(normal.pow(4).mean() - 3) < 4 * 96**0.5 * 1e-3
    assert uniform.min() >= 0 and uniform.max() < 1
    assert abs(uniform.mean() - 1 / 2) < 4 * 12**-0.5 * 1e-3
    assert abs(uniform.square().mean() - 1 / 3) < 4 * (4 / 45) ** 0.5 * 1e-3
    counts = torch.histc(uniform, 256, 0, 1)
    chi_square = ((counts - 1e6 / 256) ** 2 / (1e6 / 256)).sum()
    assert 255 - 4 * 510**0.5 < chi_square < 255 + 4 * 510**0.5


def test_nothing_is_correlated() -> None:
    """Over samples, elements, calls and steps: 4 standard errors, and one in 16,000 beyond."""
    n, m = 512, 256
    draws = []
    for step in range(3):
        source = GlobalRandom(1, "test", step, {"a": range(n), "b": range(n)}, CPU)
        for _ in range(3):
            draws += list(source.normal(m).split(n))
    rows = torch.cat(draws).double()  # 18 blocks of 512 samples

    def largest(correlations: torch.Tensor, count: int) -> float:
        """The largest off the diagonal, in standard errors."""
        return float((correlations - torch.diag(correlations.diag())).abs().max()) * count**0.5

    first = rows[: 4 * n]
    samples = first @ first.T / m
    elements = rows.T @ rows / len(rows)
    blocks = torch.stack(draws).double().flatten(1)
    assert largest(samples, m) < 6.5  # of 2 million pairs; chance gives 5.2
    assert largest(elements, len(rows)) < 5.5  # of 33 thousand
    assert largest(blocks @ blocks.T / (n * m), n * m) < 4.5  # of 153
    # neighbors, which share words of the hash
    for shift in (1, 2, 3, 4, 8):
        product = (rows[:, shift:] * rows[:, :-shift]).mean() * rows[:, shift:].numel() ** 0.5
        assert abs(product) < 4.5


def test_shares_are_contiguous_and_differ_by_one_at_most() -> None:
    for total in (0, 1, 4, 32, 100):
        for world_size in (1, 3, 7, 8, 64):
            shares = [share(total, rank, world_size) for rank in range(world_size)]
            assert [row for rows in shares for row in rows] == list(range(total))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1
