"""Which sample is trained on when: pure arithmetic on (seed, split, step), for any world size.

Two orders (see docs/data.md): `full` is one keyed permutation of all samples an epoch; `windowed`
cuts each epoch's line of shards into lanes, and permutes samples in windows within a lane.
Permutations are sorted hash keys, never a library's random generator, whose stream may change
between versions. Any change of these numbers must raise ORDER_VERSION.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Int64s = NDArray[np.int64]

ORDER_VERSION = 2

_CACHED_EPOCHS = 4  # a batch or a set of lanes rarely straddles more than two
_CACHED_ROUNDS = 64


class Piece(NamedTuple):
    """`samples` consecutive samples of one shard, from its sample `first` on."""

    shard: int
    first: int
    samples: int


def _digest(key: tuple[int | str, ...], size: int) -> int:
    text = "|".join(str(part) for part in key)
    return int.from_bytes(blake2b(text.encode(), digest_size=size).digest(), "little")


def keyed_integer(n: int, *key: int | str) -> int:
    """Returns a number in [0, n) that depends on the key alone."""
    return _digest(key, 16) % n


def permutation(n: int, *key: int | str) -> Int64s:
    """Returns a permutation of range(n), int64 (n,), that depends on the key alone.

    It sorts splitmix64 hashes (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number
    generators").
    """
    x = np.arange(1, n + 1, dtype=np.uint64)
    x *= np.uint64(0x9E3779B97F4A7C15)
    x += np.uint64(_digest(key, 8))
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    # splitmix64 is one to one, so no two hashes are equal and any sort gives this order
    return np.argsort(x).astype(np.int64, copy=False)


class FullOrder:
    """The order of a split held in memory: epoch after epoch, one permutation of all samples each.

    Global position p = step * batch + k is sample permutation(epoch = p // n)[p % n].
    """

    def __init__(self, samples: int, seed: int, split: str, batch: int) -> None:
        self._samples = samples
        self._batch = batch
        self._key = seed, split, "full"
        self._thread = ThreadPoolExecutor(1, f"order of {split}")
        self._orders: dict[int, Future[Int64s]] = {}  # of an epoch and the one after it

    def take(self, step: int, start: int, stop: int) -> Int64s:
        """Returns the samples at positions [start, stop) of the global batch of `step`, int64."""
        n = self._samples
        position, end = step * self._batch + start, step * self._batch + stop
        parts = []
        while position < end:
            epoch, inside = divmod(position, n)
            count = min(end - position, n - inside)
            parts.append(self._permutation(epoch)[inside : inside + count])
            position += count
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def _permutation(self, epoch: int) -> Int64s:
        """The epoch's; that of the next epoch is made meanwhile, in a thread: it may take a second."""

        def order(number: int) -> Future[Int64s]:
            return self._thread.submit(permutation, self._samples, *self._key, number)

        wanted = epoch, epoch + 1
        self._orders = {n: self._orders.get(n) or order(n) for n in wanted}
        return self._orders[epoch].result()


class BalancedOrder:
    """The order of a labeled split held in memory in which classes take turns.

    Global position p = step * batch + k is in round p // C of the C classes that have samples; a
    keyed permutation of the round gives the class, and a class's samples are taken in a keyed
    permutation for each epoch of that class.
    """

    def __init__(self, labels: Int64s, seed: int, split: str, batch: int) -> None:
        self._batch = batch
        self._members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
        self._sizes = np.array([len(members) for members in self._members])
        self._starts = np.cumsum(self._sizes) - self._sizes
        # of each class, one after another: its samples in the order of one of its epochs
        self._table = np.concatenate(self._members)
        self._epochs = np.full(len(self._members), -1)
        self._key = seed, split, "balanced"
        self._round = functools.lru_cache(_CACHED_ROUNDS)(
            lambda number: permutation(len(self._members), *self._key, number)
        )

    def take(self, step: int, start: int, stop: int) -> Int64s:
        """Returns the samples at positions [start, stop) of the global batch of `step`, int64."""
        positions = step * self._batch + np.arange(start, stop)
        rounds, turns = np.divmod(positions, len(self._members))
        samples = np.empty(stop - start, np.int64)
        if not len(samples):
            return samples
        first = int(rounds[0])
        table = np.stack([self._round(number) for number in range(first, int(rounds[-1]) + 1)])
        classes = table[rounds - first, turns]
        epochs, inside = np.divmod(rounds, self._sizes[classes])
        left = np.arange(len(samples))
        while True:  # again where a class begins an epoch
            there = epochs[left] == self._epochs[classes[left]]
            now, left = left[there], left[~there]
            samples[now] = self._table[self._starts[classes[now]] + inside[now]]
            if not len(left):
                return samples
            numbers, places = np.unique(classes[left], return_index=True)
            for number, epoch in zip(numbers.tolist(), epochs[left[places]].tolist(), strict=True):
                self._load(number, epoch)

    def _load(self, number: int, epoch: int) -> None:
        """Fills a class's part of the table with the order of one of its epochs."""
        members, start = self._members[number], self._starts[number]
        order = permutation(len(members), *self._key, number, epoch)
        self._table[start : start + len(members)] = members[order]
        self._epochs[number] = epoch


def lane_start(n: int, lanes: int, lane: int, epoch: int) -> int:
    """Returns the position within the lane at which `epoch` begins.

    Samples of all epochs are dealt to the lanes round-robin, so this is
    ceil((epoch * n - lane) / lanes): lanes never drift apart by more than one sample.
    """
    each, extra = divmod(epoch * n, lanes)
    return each + (lane < extra)


def lane_length(n: int, lanes: int, lane: int, epoch: int) -> int:
    """Returns the number of samples of `epoch` that the lane has."""
    return lane_start(n, lanes, lane, epoch + 1) - lane_start(n, lanes, lane, epoch)


def lane_cut(n: int, lanes: int, lane: int, epoch: int) -> int:
    """Returns where the lane begins on the line of `epoch`: the total length of earlier lanes."""

    def dealt_before(epochs: int) -> int:
        each, extra = divmod(epochs * n, lanes)
        return lane * each + min(lane, extra)

    return dealt_before(epoch + 1) - dealt_before(epoch)


class WindowedOrder:
    """The order of a split that is read in sequence by `lanes` readers.

    The line of an epoch is the shards in keyed order, rotated by a keyed number of samples. It is
    cut into lanes; each step takes the same number of samples from every lane; within a lane's
    part of an epoch, windows of at most `window` samples and nearly equal size are permuted.
    """

    def __init__(
        self, shard_samples: Sequence[int], lanes: int, window: int, seed: int, split: str
    ) -> None:
        self._shard_samples = np.asarray(shard_samples, np.int64)
        self.samples = int(self._shard_samples.sum())
        self.lanes = lanes
        self.window = window
        self._key = (seed, split, "windowed")
        self._line = functools.lru_cache(_CACHED_EPOCHS)(self._build_line)

    def locate(self, lane: int, position: int) -> tuple[int, int, int]:
        """Returns (epoch, window, index in that window) of a lane's position since step 0."""
        epoch = (position * self.lanes + lane) // self.samples
        inside = position - lane_start(self.samples, self.lanes, lane, epoch)
        length = lane_length(self.samples, self.lanes, lane, epoch)
        # windows begin at length * w // count; the last one that begins at or before `inside`
        window = ((inside + 1) * self._windows(length) - 1) // length
        return epoch, window, inside - length * window // self._windows(length)

    def window_line(self, lane: int, epoch: int, window: int) -> tuple[int, int]:
        """Returns the interval [start, stop) of the epoch's line that a lane's window covers."""
        cut = lane_cut(self.samples, self.lanes, lane, epoch)
        length = lane_length(self.samples, self.lanes, lane, epoch)
        count = self._windows(length)
        return cut + length * window // count, cut + length * (window + 1) // count

    def window_permutation(self, lane: int, epoch: int, window: int) -> Int64s:
        """Returns the order in which a window's samples are taken: int64, offsets into it."""
        start, stop = self.window_line(lane, epoch, window)
        return permutation(stop - start, *self._key, "window", epoch, lane, window)

    def pieces(self, epoch: int, start: int, stop: int) -> list[Piece]:
        """Returns where samples [start, stop) of the epoch's line lie, in line order."""
        n = self.samples
        if stop <= start:
            return []
        shards, ends, offset = self._line(epoch)
        first = (start + offset) % n
        last = first + stop - start
        # an interval that passes the line's end continues at the head of the first shard
        spans = [(first, last)] if last <= n else [(first, n), (0, last - n)]
        pieces = []
        for begin, end in spans:
            place = int(np.searchsorted(ends, begin, side="right"))
            while begin < end:
                shard = int(shards[place])
                shard_begin = int(ends[place]) - int(self._shard_samples[shard])
                piece_end = min(end, int(ends[place]))
                if piece_end > begin:
                    pieces.append(Piece(shard, begin - shard_begin, piece_end - begin))
                begin, place = piece_end, place + 1
        return pieces

    def following(self, lane: int, position: int, samples: int) -> list[int]:
        """Returns the shards of a lane's next `samples` from `position`, in two epochs at most."""
        current = (position * self.lanes + lane) // self.samples
        first = position - lane_start(self.samples, self.lanes, lane, current)
        shards = []
        for epoch in (current, current + 1):
            cut = lane_cut(self.samples, self.lanes, lane, epoch)
            last = min(first + samples, lane_length(self.samples, self.lanes, lane, epoch))
            shards += [piece.shard for piece in self.pieces(epoch, cut + first, cut + last)]
            samples -= last - first
            first = 0
        return shards

    def _windows(self, length: int) -> int:
        return -(-length // self.window)

    def _build_line(self, epoch: int) -> tuple[Int64s, Int64s, int]:
        """Returns the shards in the epoch's order, where each ends, and the line's rotation."""
        shards = permutation(len(self._shard_samples), *self._key, "shards", epoch)
        offset = keyed_integer(self.samples, *self._key, "offset", epoch)
        return shards, np.cumsum(self._shard_samples[shards]), offset
