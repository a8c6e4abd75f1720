"""Which sample is trained on when: pure arithmetic on (seed, split, step), whatever the world.

Two orders (see docs): `full` is one keyed permutation of all samples an epoch; `windowed` cuts
each epoch's line of shards into lanes, and permutes samples in windows within a lane.
Permutations are sorted hash keys, never a library's random generator, whose stream
may change between versions. A change of any number here must raise ORDER_VERSION.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
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
    """A number in [0, n) decided by the key alone."""
    return _digest(key, 16) % n


def permutation(n: int, *key: int | str) -> Int64s:
    """A permutation of range(n), int64 (n,), decided by the key alone (splitmix64 keys, sorted)."""
    x = np.arange(1, n + 1, dtype=np.uint64)
    x *= np.uint64(0x9E3779B97F4A7C15)
    x += np.uint64(_digest(key, 8))
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    # the keys differ (splitmix64 is one to one), so any sort gives this order; this one is fastest
    return np.argsort(x).astype(np.int64, copy=False)


class FullOrder:
    """The order of a split held in memory: epoch after epoch, one permutation of all samples each.

    Global position p = step * batch + k is sample permutation(epoch = p // n)[p % n].
    """

    def __init__(self, samples: int, seed: int, split: str, batch: int) -> None:
        self._samples = samples
        self._batch = batch
        # a cache of its own: a small split's many epochs must not push out a large split's one
        self._permutation = functools.lru_cache(_CACHED_EPOCHS)(
            lambda epoch: permutation(samples, seed, split, "full", epoch)
        )

    def take(self, step: int, start: int, stop: int) -> Int64s:
        """Samples of positions [start, stop) of the global batch of `step`, int64."""
        n = self._samples
        position, end = step * self._batch + start, step * self._batch + stop
        parts = []
        while position < end:
            epoch, inside = divmod(position, n)
            count = min(end - position, n - inside)
            parts.append(self._permutation(epoch)[inside : inside + count])
            position += count
        return np.concatenate(parts) if parts else np.empty(0, np.int64)


class BalancedOrder:
    """The order of a labeled split held in memory in which classes take turns.

    Global position p = step * batch + k is in round p // C of the C classes that have samples; a
    keyed permutation of the round tells the class, and a class's own samples are taken in a keyed
    permutation for each of its own epochs.
    """

    def __init__(self, labels: Int64s, seed: int, split: str, batch: int) -> None:
        self._batch = batch
        self._members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
        self._round = functools.lru_cache(_CACHED_ROUNDS)(
            lambda number: permutation(len(self._members), seed, split, "balanced", number)
        )
        self._own = functools.lru_cache(_CACHED_EPOCHS * len(self._members))(
            lambda place, epoch: permutation(
                len(self._members[place]), seed, split, "balanced", place, epoch
            )
        )

    def take(self, step: int, start: int, stop: int) -> Int64s:
        """Samples of positions [start, stop) of the global batch of `step`, int64."""
        positions = step * self._batch + np.arange(start, stop)
        rounds, turns = np.divmod(positions, len(self._members))
        found = np.empty(stop - start, np.int64)
        if not len(found):
            return found
        first = int(rounds[0])
        table = np.stack([self._round(number) for number in range(first, int(rounds[-1]) + 1)])
        places = table[rounds - first, turns]
        for place in np.unique(places).tolist():
            members, mine = self._members[place], places == place
            epochs, inside = np.divmod(rounds[mine], len(members))
            own = {epoch: self._own(place, epoch) for epoch in set(epochs.tolist())}
            order = [own[epoch][at] for epoch, at in zip(epochs.tolist(), inside, strict=True)]
            found[mine] = members[order]
        return found


def lane_start(n: int, lanes: int, lane: int, epoch: int) -> int:
    """The lane's own position at which `epoch` begins.

    Samples of all epochs are dealt to the lanes in turn, as to card players, so this is
    ceil((epoch * n - lane) / lanes): lanes never drift apart by more than one sample.
    """
    each, extra = divmod(epoch * n, lanes)
    return each + (lane < extra)


def lane_length(n: int, lanes: int, lane: int, epoch: int) -> int:
    """Number of samples of `epoch` that the lane has."""
    return lane_start(n, lanes, lane, epoch + 1) - lane_start(n, lanes, lane, epoch)


def lane_cut(n: int, lanes: int, lane: int, epoch: int) -> int:
    """Where the lane begins on the line of `epoch`: the sum of the lengths of the lanes before."""

    def dealt_before(epochs: int) -> int:
        each, extra = divmod(epochs * n, lanes)
        return lane * each + min(lane, extra)

    return dealt_before(epoch + 1) - dealt_before(epoch)


class WindowedOrder:
    """The order of a split that is read in sequence by `lanes` readers.

    The line of an epoch is the shards in keyed order, rotated by a keyed number of samples. It is
    cut into lanes; each step takes the same number of samples from every lane; within a lane's
    part of an epoch, windows of at most `window` samples, as equal as can be, are permuted.
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
        """(epoch, window, index in that window) of a lane's own position, counted from step 0."""
        epoch = (position * self.lanes + lane) // self.samples
        inside = position - lane_start(self.samples, self.lanes, lane, epoch)
        length = lane_length(self.samples, self.lanes, lane, epoch)
        # windows begin at length * w // count; this is the last one that begins at `inside` or before
        window = ((inside + 1) * self._windows(length) - 1) // length
        return epoch, window, inside - length * window // self._windows(length)

    def window_line(self, lane: int, epoch: int, window: int) -> tuple[int, int]:
        """The interval [start, stop) of the epoch's line that a lane's window covers."""
        cut = lane_cut(self.samples, self.lanes, lane, epoch)
        length = lane_length(self.samples, self.lanes, lane, epoch)
        count = self._windows(length)
        return cut + length * window // count, cut + length * (window + 1) // count

    def window_permutation(self, lane: int, epoch: int, window: int) -> Int64s:
        """The order in which a window's samples are taken: int64, offsets into the window."""
        start, stop = self.window_line(lane, epoch, window)
        return permutation(stop - start, *self._key, "window", epoch, lane, window)

    def pieces(self, epoch: int, start: int, stop: int) -> list[Piece]:
        """Where samples [start, stop) of the epoch's line lie, in line order."""
        n = self.samples
        if stop <= start:
            return []
        shards, ends, offset = self._line(epoch)
        first = (start + offset) % n
        last = first + stop - start
        # an interval that runs over the line's end goes on at the head of the first shard
        spans = [(first, last)] if last <= n else [(first, n), (0, last - n)]
        found = []
        for begin, end in spans:
            place = int(np.searchsorted(ends, begin, side="right"))
            while begin < end:
                shard = int(shards[place])
                shard_begin = int(ends[place]) - int(self._shard_samples[shard])
                upto = min(end, int(ends[place]))
                if upto > begin:
                    found.append(Piece(shard, begin - shard_begin, upto - begin))
                begin, place = upto, place + 1
        return found

    def following(self, lane: int, position: int, samples: int) -> list[int]:
        """Shards of a lane's `samples` from its own position on, in this epoch and the next."""
        now = (position * self.lanes + lane) // self.samples
        first = position - lane_start(self.samples, self.lanes, lane, now)
        found = []
        for epoch in (now, now + 1):
            cut = lane_cut(self.samples, self.lanes, lane, epoch)
            last = min(first + samples, lane_length(self.samples, self.lanes, lane, epoch))
            found += [piece.shard for piece in self.pieces(epoch, cut + first, cut + last)]
            samples -= last - first
            first = 0
        return found

    def _windows(self, length: int) -> int:
        return -(-length // self.window)

    def _build_line(self, epoch: int) -> tuple[Int64s, Int64s, int]:
        """Shards in the epoch's order, where each ends, and the number of samples rotated by."""
        shards = permutation(len(self._shard_samples), *self._key, "shards", epoch)
        offset = keyed_integer(self.samples, *self._key, "offset", epoch)
        return shards, np.cumsum(self._shard_samples[shards]), offset
