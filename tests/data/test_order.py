"""The two orders: exact partitions, no drift, and the same for any number of readers."""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sgan_dist.data.order import (
    BalancedOrder,
    FullOrder,
    Int64s,
    WindowedOrder,
    keyed_integer,
    lane_cut,
    lane_length,
    lane_start,
    permutation,
)


def line_ids(
    order: WindowedOrder, shard_samples: Sequence[int], epoch: int, start: int, stop: int
) -> Int64s:
    """Ids of an interval of the epoch's line."""
    bases = np.cumsum([0, *shard_samples])
    pieces = order.pieces(epoch, start, stop)
    for piece in pieces:
        assert piece.first >= 0 and piece.samples > 0
        assert piece.first + piece.samples <= shard_samples[piece.shard]
    return np.concatenate(
        [np.arange(p.samples) + bases[p.shard] + p.first for p in pieces] or [np.empty(0, int)]
    )


def lane_ids(
    order: WindowedOrder, shard_samples: Sequence[int], lane: int, position: int, count: int
) -> list[int]:
    """What a lane takes at [position, position + count), one sample at a time."""
    taken: list[int] = []
    for at in range(position, position + count):
        epoch, window, inside = order.locate(lane, at)
        window_ids = line_ids(order, shard_samples, epoch, *order.window_line(lane, epoch, window))
        taken.append(int(window_ids[order.window_permutation(lane, epoch, window)[inside]]))
    return taken


def test_permutations_are_pinned() -> None:
    # if these numbers change, ORDER_VERSION must be raised
    assert permutation(10, 0, "unlabeled", "full", 3).tolist() == [8, 9, 0, 1, 4, 3, 6, 7, 5, 2]
    assert keyed_integer(10**9, 7, "x") == 694867230
    assert sorted(permutation(1000, 1)) == list(range(1000))
    assert permutation(0, 1).tolist() == []
    assert permutation(50, 1, "a").tolist() != permutation(50, 2, "a").tolist()


@pytest.mark.parametrize(("samples", "batch"), [(20, 64), (1, 5), (1000, 64), (64, 64), (7, 3)])
def test_full_order_is_exact_epochs_from_any_step(samples: int, batch: int) -> None:
    order = FullOrder(samples, 3, "labeled", batch)
    steps = 3 * samples // batch + 3
    line = np.concatenate([order.take(step, 0, batch) for step in range(steps)])
    for epoch in range(len(line) // samples):
        part = line[epoch * samples : (epoch + 1) * samples]
        assert sorted(part) == list(range(samples))
    fresh = FullOrder(samples, 3, "labeled", batch)
    for step in reversed(range(steps)):
        cut = batch // 3
        halves = [fresh.take(step, 0, cut), fresh.take(step, cut, batch)]
        assert (np.concatenate(halves) == line[step * batch : (step + 1) * batch]).all()


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 10**6), st.integers(1, 512), st.integers(0, 10**6), st.integers(0, 2**31))
def test_lanes_partition_every_epoch_and_never_drift(
    n: int, lanes: int, epoch: int, seed: int
) -> None:
    starts = [lane_start(n, lanes, lane, epoch) for lane in range(lanes)]
    assert max(starts) - min(starts) <= 1
    each, extra = divmod(n, lanes)
    # the same number in another closed form
    assert starts == [
        epoch * each + max(0, -((lane - epoch * extra) // lanes)) for lane in range(lanes)
    ]
    lengths = [lane_length(n, lanes, lane, epoch) for lane in range(lanes)]
    cuts = [lane_cut(n, lanes, lane, epoch) for lane in range(lanes + 1)]
    assert cuts[0] == 0 and cuts[-1] == n
    assert np.diff(cuts).tolist() == lengths
    order = WindowedOrder([n], lanes, 1 + seed % 1000, seed, "unlabeled")
    lane = seed % lanes
    if lengths[lane]:
        for position in (starts[lane], starts[lane] + lengths[lane] - 1):
            located_epoch, window, inside = order.locate(lane, position)
            assert located_epoch == epoch
            start, stop = order.window_line(lane, epoch, window)
            assert start - cuts[lane] + inside == position - starts[lane]
            assert inside < stop - start <= order.window


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=12),
    st.integers(1, 40),
    st.integers(1, 30),
    st.integers(0, 50),
    st.integers(0, 1000),
)
def test_every_epoch_takes_each_sample_once(
    shard_samples: list[int], lanes: int, window: int, epoch: int, seed: int
) -> None:
    order = WindowedOrder(shard_samples, lanes, window, seed, "unlabeled")
    n = sum(shard_samples)
    assert sorted(line_ids(order, shard_samples, epoch, 0, n)) == list(range(n))
    taken = []
    for lane in range(lanes):
        start = lane_start(n, lanes, lane, epoch)
        taken += lane_ids(order, shard_samples, lane, start, lane_length(n, lanes, lane, epoch))
    assert sorted(taken) == list(range(n))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 10**6), st.integers(1, 512), st.integers(1, 10**5), st.integers(0, 99))
def test_large_epochs_are_partitions(n: int, lanes: int, window: int, seed: int) -> None:
    shard_samples = np.diff(np.unique(np.linspace(0, n, min(n, 50) + 1).astype(int))).tolist()
    order = WindowedOrder(shard_samples, lanes, window, seed, "unlabeled")
    seen = np.zeros(n, int)
    for lane in range(lanes):
        start = lane_cut(n, lanes, lane, seed)
        stop = lane_cut(n, lanes, lane + 1, seed)
        seen[line_ids(order, shard_samples, seed, start, stop)] += 1
    assert (seen == 1).all()


def test_epochs_and_seeds_differ() -> None:
    def first(seed: int, epoch: int) -> list[int]:
        return line_ids(WindowedOrder([30] * 9, 3, 5, seed, "a"), [30] * 9, epoch, 0, 270).tolist()

    lines = [first(0, 0), first(0, 1), first(1, 0)]
    assert len({tuple(line) for line in lines}) == 3


def test_a_billion_samples_take_little_memory() -> None:
    shards, per_shard, lanes = 10**5, 10**4, 512
    tracemalloc.start()
    order = WindowedOrder([per_shard] * shards, lanes, 2000, 0, "unlabeled")
    for step in (0, 1, 10**6, 10**9):
        for lane in range(0, lanes, 64):
            epoch, window, inside = order.locate(lane, step * 8)
            start, stop = order.window_line(lane, epoch, window)
            assert sum(p.samples for p in order.pieces(epoch, start, stop)) == stop - start
            assert 0 <= order.window_permutation(lane, epoch, window)[inside] < stop - start
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert order.samples == 10**9
    assert peak < 32 * 2**20


@pytest.mark.parametrize("sizes", [[10] * 10, [1, 2, 3], [7], [100, 1, 5, 9]])
def test_balanced_order(sizes: list[int]) -> None:
    labels = np.repeat(np.arange(len(sizes)) * 3, sizes)  # not every class has samples
    labels = labels[permutation(len(labels), "mix")]
    order = BalancedOrder(labels, 3, "labeled", batch=16)
    taken = np.concatenate([order.take(step, 0, 16) for step in range(60)])
    # classes take turns: every round of as many samples as there are classes has one of each
    rounds = labels[taken][: len(taken) // len(sizes) * len(sizes)].reshape(-1, len(sizes))
    assert (np.sort(rounds, axis=1) == np.unique(labels)).all()
    assert len(sizes) == 1 or len({tuple(row) for row in rounds.tolist()}) > 1
    # within a class, each of its samples once in each epoch of that class
    for label in np.unique(labels):
        drawn, members = taken[labels[taken] == label], np.flatnonzero(labels == label)
        for start in range(0, len(drawn) - len(members) + 1, len(members)):
            assert sorted(drawn[start : start + len(members)]) == members.tolist()
    # a function of the step and the place in the batch alone
    parts = [
        BalancedOrder(labels, 3, "labeled", 16).take(31, *cut) for cut in ((0, 5), (5, 5), (5, 16))
    ]
    assert (np.concatenate(parts) == taken[31 * 16 : 32 * 16]).all()
    other = BalancedOrder(labels, 4, "labeled", 16)
    assert (
        len(labels) < 9
        or (np.concatenate([other.take(s, 0, 16) for s in range(9)]) != taken[:144]).any()
    )


def test_following_shards() -> None:
    order = WindowedOrder([30, 20, 50, 10], lanes=3, window=7, seed=0, split="unlabeled")
    for lane in range(3):
        for position in range(0, 80, 9):
            expected = []
            for at in range(position, position + 20):
                epoch, window, inside = order.locate(lane, at)
                start, _ = order.window_line(lane, epoch, window)
                expected += [
                    p.shard for p in order.pieces(epoch, start + inside, start + inside + 1)
                ]
            assert set(order.following(lane, position, 20)) == set(expected)
