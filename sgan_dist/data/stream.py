"""Samples out of shards: a split held in memory, lanes read in sequence, one pass to evaluate.

A sample that was damaged when it was indexed is replaced by the next good one in the order, so that
what a step trains on stays a function of the step.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from sgan_dist.config import Config
from sgan_dist.data.index import DatasetIndex, SplitIndex
from sgan_dist.data.order import BalancedOrder, FullOrder, Int64s, Piece, WindowedOrder
from sgan_dist.data.reader import Buffer, Bytes, Cursor, Reader, Skip
from sgan_dist.data.remote.cache import Storage
from sgan_dist.data.remote.urls import is_remote
from sgan_dist.errors import UserError

VERIFIED_BYTES = 8 * 2**30  # local shards of a larger windowed split are not checked by sha256
PREFETCH_SHARDS = 4  # shards that are prefetched while one is read from front to back
CHUNK = 256  # samples that are read at a time where a split is read from front to back


class Samples(NamedTuple):
    """images: uint8 (n, H, W, C); labels: int64 (n,), None without; ids: int64 (n,).

    An id is a sample's number in its split, in the order of the index.
    """

    images: Bytes
    labels: Int64s | None
    ids: Int64s

    def rows(self, start: int, stop: int) -> Samples:
        """Returns views of these rows."""
        labels = None if self.labels is None else self.labels[start:stop]
        return Samples(self.images[start:stop], labels, self.ids[start:stop])


def open_storage(config: Config) -> Storage:
    """Where the config's dataset is read from; reads nothing yet."""
    return Storage(config.data.root, config.remote)


class FullStream:
    """A split of order `full`, decoded in memory; shards are checked against their sha256.

    With `batch.balanced`, labeled classes take turns, so that each batch is as balanced as its size
    allows.
    """

    def __init__(
        self,
        storage: Storage,
        index: DatasetIndex,
        split: str,
        config: Config,
        batch: int,
    ) -> None:
        reader = Reader(storage, index, split)
        n = reader.split.samples
        self._reader = reader
        self._images = np.empty((n, *index.image_hwc), np.uint8)
        labels = np.zeros(n, np.int64)
        good = np.zeros(n, bool)
        for samples in _in_sequence(reader, rank=0, world_size=1):
            self._images[samples.ids] = samples.images
            good[samples.ids] = True
            if samples.labels is not None:
                labels[samples.ids] = samples.labels
        if not good.any():
            raise UserError(f"all samples of the {split} split are damaged")
        self._ids = _next_true(good)
        self._labels = labels[self._ids]
        self._order: BalancedOrder | FullOrder = FullOrder(n, config.seed, split, batch)
        if config.batch.balanced and split == "labeled":
            self._order = BalancedOrder(self._labels, config.seed, split, batch)

    def take(self, step: int, start: int, stop: int) -> Samples:
        """Returns samples [start, stop) of the global batch of `step`."""
        places = self._order.take(step, start, stop)
        labels = self._labels[places] if self._reader.labeled else None
        ids = self._ids[places]
        return Samples(self._images[ids], labels, ids)

    @property
    def skips(self) -> list[Skip]:
        """The damaged records found so far."""
        return self._reader.skips


def window_samples(split: SplitIndex, lane_window_mib: float) -> int:
    """Returns the samples in a lane's window of at most `lane_window_mib` encoded MiB."""
    mean = -(-sum(shard.bytes for shard in split.shards) // split.samples)
    return max(1, int(lane_window_mib * 2**20) // mean)


class WindowedStream:
    """Some lanes of a split of order `windowed`, each with its window and shard.

    The windows of all lanes lie in one buffer, so that a step in which no lane changes its window is
    a single gather. Consecutive steps continue reading; any other step reads its windows again.
    """

    def __init__(
        self,
        storage: Storage,
        index: DatasetIndex,
        split: str,
        config: Config,
        batch: int,
        own_lanes: range,
    ) -> None:
        reader, lanes = Reader(storage, index, split), config.stream.lanes
        window = window_samples(reader.split, config.stream.lane_window_mib)
        shards = reader.split.shards
        order = WindowedOrder(
            [shard.samples for shard in shards], lanes, window, config.seed, split
        )
        self._reader, self._order = reader, order
        self._each = batch // lanes
        self._lanes = own_lanes
        self._cursors = [Cursor(reader) for _ in self._lanes]
        self._longest = min(window, -(-order.samples // lanes))
        # while a window is used, the shards of this many samples after it are prefetched
        self._prefetch_samples = max(self._longest, order.samples // len(shards))
        self._remote = is_remote(storage.root) or any(is_remote(shard.name) for shard in shards)
        # remote shards are verified as they arrive
        self._verified = not self._remote and sum(s.bytes for s in shards) <= VERIFIED_BYTES
        self._buffer = reader.buffer(self._longest * len(self._lanes))
        # of each lane: its window's rows of the buffer in the order in which they are taken, and
        # the positions within the lane at which the window begins and ends
        self._rows = np.empty((len(self._lanes), self._longest), np.int64)
        self._begins = np.zeros(len(self._lanes), np.int64)
        self._ends = np.zeros(len(self._lanes), np.int64)

    def take(self, step: int) -> Samples:
        """Returns these lanes' part of the global batch of `step`, lane after lane."""
        each, lanes = self._each, len(self._lanes)
        n, labeled = each * lanes, self._reader.labeled
        out = Samples(
            np.empty((n, *self._reader.image_hwc), np.uint8),
            np.empty(n, np.int64) if labeled else None,
            np.empty(n, np.int64),
        )
        first = step * each
        if lanes and self._begins.max() <= first and first + each <= self._ends.min():
            places = (first - self._begins)[:, None] + np.arange(each)
            self._gather(np.arange(lanes)[:, None], places, out)
            return out
        missing = (self._begins > first) | (first >= self._ends)
        for lane in np.flatnonzero(missing).tolist():  # so that downloads overlap with reading
            self._prefetch(lane, first, self._longest)
        for lane in range(lanes):
            position, end = first, first + each
            while position < end:
                if not self._begins[lane] <= position < self._ends[lane]:
                    self._fill(lane, position)
                stop = min(end, int(self._ends[lane]))
                places = np.arange(position, stop) - self._begins[lane]
                start = lane * each - first
                self._gather(lane, places, out.rows(start + position, start + stop))
                position = stop
        return out

    @property
    def skips(self) -> list[Skip]:
        """The damaged records found so far."""
        return self._reader.skips

    def _gather(self, lanes: Int64s | int, places: Int64s, out: Samples) -> None:
        """Fills `out` with the samples at these places in the windows of these lanes."""
        reader, buffer = self._reader, self._buffer
        rows = self._rows[lanes, places].ravel()
        if isinstance(buffer.images, list):
            for i, row in enumerate(rows.tolist()):
                pixels = reader.decode(buffer.images[row], int(buffer.ids[row]))
                if pixels is None:
                    rows[i], pixels = self._next_good(row, buffer.images)
                out.images[i] = pixels
        else:
            # mode: with the default, numpy writes to a copy of `out` first
            np.take(buffer.images, rows, axis=0, out=out.images, mode="clip")
        if out.labels is not None:
            np.take(buffer.labels, rows, out=out.labels, mode="clip")
        np.take(buffer.ids, rows, out=out.ids, mode="clip")

    def _next_good(self, row: int, images: list[bytes]) -> tuple[int, Bytes]:
        """Returns the first row after a damaged one, in its window's order, that can be decoded."""
        lane = row // self._longest
        window = self._rows[lane, : self._ends[lane] - self._begins[lane]]
        place = int(np.flatnonzero(window == row)[0])
        for other in np.roll(window, -place)[1:].tolist():
            pixels = self._reader.decode(images[other], int(self._buffer.ids[other]))
            if pixels is not None:
                return other, pixels
        raise self._all_damaged()

    def _all_damaged(self) -> UserError:
        return UserError(
            f"all samples of a window of the {self._reader.name} split are damaged, the last in"
            f" shard {self.skips[-1].shard}: {self.skips[-1].why}; repair the data, or leave that"
            " shard out of the index"
        )

    def _fill(self, lane: int, position: int) -> None:
        """Reads the window that holds a position within the lane."""
        order, number = self._order, self._lanes[lane]
        epoch, window, inside = order.locate(number, position)
        start, stop = order.window_line(number, epoch, window)
        self._begins[lane] = self._ends[lane] = 0  # no window, should reading fail
        row = first = lane * self._longest
        damaged: list[int] = []
        for piece in order.pieces(epoch, start, stop):
            if self._verified:
                self._reader.verify(piece.shard)
            damaged += self._cursors[lane].read(piece, self._buffer, row)
            row += piece.samples
        rows = first + order.window_permutation(number, epoch, window)
        if damaged:
            good = ~np.isin(rows, damaged)
            if not good.any():
                raise self._all_damaged()
            rows = rows[_next_true(good)]
        self._rows[lane, : len(rows)] = rows
        self._begins[lane] = position - inside
        self._ends[lane] = position - inside + len(rows)
        self._prefetch(lane, int(self._ends[lane]), self._prefetch_samples)

    def _prefetch(self, lane: int, position: int, samples: int) -> None:
        """Starts to download the remote shards of a lane's next samples from `position`."""
        if self._remote:
            shards = self._order.following(self._lanes[lane], position, samples)
            self._reader.storage.prefetch(self._reader.split.shards[shard] for shard in shards)


def read_split(
    storage: Storage,
    index: DatasetIndex,
    split: str,
    rank: int,
    world_size: int,
    block: int = 256,
) -> Iterator[Samples]:
    """Yields one pass over a split: shard i goes to rank i % world_size, in batches of `block`.

    So each shard is read by one rank, and ranks may get different numbers of batches, or none. The last
    batch may be smaller. Damaged samples are left out.
    """
    held: Samples | None = None
    for samples in _in_sequence(Reader(storage, index, split), rank, world_size):
        held = samples if held is None else _join([held, samples])
        count = len(held.ids)
        for start in range(0, count - block + 1, block):
            yield held.rows(start, start + block)
        held = held.rows(count // block * block, count)
    if held is not None and len(held.ids):
        yield held


def _in_sequence(reader: Reader, rank: int, world_size: int) -> Iterator[Samples]:
    """Yields this rank's shards from front to back, verified, without damaged samples."""
    storage, shards = reader.storage, reader.split.shards
    cursor = Cursor(reader)
    own = range(rank, len(shards), world_size)
    for place, number in enumerate(own):
        shard = shards[number]
        storage.prefetch(shards[n] for n in own[place + 1 : place + 1 + PREFETCH_SHARDS])
        reader.verify(number)
        for first in range(0, shard.samples, CHUNK):
            piece = Piece(number, first, min(CHUNK, shard.samples - first))
            buffer = reader.buffer(piece.samples)
            damaged = cursor.read(piece, buffer)
            yield _decoded(reader, buffer, np.setdiff1d(np.arange(piece.samples), damaged))
    cursor.close()


def _decoded(reader: Reader, buffer: Buffer, rows: Int64s) -> Samples:
    """Returns these rows of a buffer, without those that cannot be decoded."""
    if isinstance(buffer.images, list):
        encoded = [(buffer.images[row], int(buffer.ids[row])) for row in rows.tolist()]
        decoded = [reader.decode(image, id) for image, id in encoded]
        rows = rows[np.array([pixels is not None for pixels in decoded], bool)]
        good = [pixels for pixels in decoded if pixels is not None]
        images = np.array(good, np.uint8).reshape(-1, *reader.image_hwc)
    else:
        images = buffer.images[rows]
    return Samples(images, buffer.labels[rows] if reader.labeled else None, buffer.ids[rows])


def _next_true(good: np.ndarray[tuple[int], np.dtype[np.bool]]) -> Int64s:
    """Returns for each place the first one from it on, around the end, at which `good` is true."""
    places = np.flatnonzero(good)
    return places[np.searchsorted(places, np.arange(len(good))) % len(places)]


def _join(parts: list[Samples]) -> Samples:
    images, labels, ids = zip(*parts, strict=True)
    joined = None if labels[0] is None else np.concatenate(labels)
    return Samples(np.concatenate(images), joined, np.concatenate(ids))
