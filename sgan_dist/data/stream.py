"""Samples out of shards: a split held in memory, lanes read in sequence, and one pass to evaluate.

Images are uint8 (n, H, W, C), labels int64 (n,) or None, ids int64 (n,): a sample's number in
its split, in the order of the index. A sample that was damaged when it was indexed is replaced by
the next good one in the order, so that what a step trains on stays a function of the step.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from sgan_dist.config import DataConfig
from sgan_dist.data.index import DatasetIndex, SplitIndex
from sgan_dist.data.order import BalancedOrder, FullOrder, Int64s, WindowedOrder
from sgan_dist.data.reader import Bytes, Cursor, Images, Reader, Skip
from sgan_dist.data.remote import Transport, is_remote
from sgan_dist.data.storage import CacheOptions, Storage
from sgan_dist.errors import UserError

Samples = tuple[Bytes, Int64s | None, Int64s]

AHEAD = 4  # shards that are brought while one is read from front to back
CHUNK = 256  # samples that are read at a time where they are not kept


def open_storage(config: DataConfig) -> Storage:
    """Where the config's dataset is read from; reads nothing yet."""
    return Storage(config.root, transport(config), CacheOptions(config.cache, config.cache_gib))


def transport(config: DataConfig) -> Transport:
    """How patient the config is with remote files."""
    return Transport(config.tries, config.timeout)


class FullStream:
    """A split of order `full`, decoded in memory; shards are checked against their sha256.

    With `balanced`, classes take turns, so that each batch holds as many of each as it can.
    """

    def __init__(
        self,
        storage: Storage,
        index: DatasetIndex,
        split: str,
        seed: int,
        batch: int,
        balanced: bool = False,
    ) -> None:
        reader = Reader(storage, index, split)
        n = reader.split.samples
        self._reader = reader
        self._images = np.empty((n, *index.image_shape), np.uint8)
        self._labels = np.zeros(n, np.int64)
        self._ids = np.arange(n)
        damaged: list[int] = []
        cursor = Cursor(reader)
        for number, shard in enumerate(reader.split.shards):
            storage.ahead(reader.split.shards[number + 1 : number + 1 + AHEAD])
            reader.check_hash(number)
            for first in range(0, shard.samples, CHUNK):
                ids = reader.ids(number, first, min(CHUNK, shard.samples - first))
                rows = slice(int(ids[0]), int(ids[-1]) + 1)
                encoded = self._images[rows] if reader.packed else reader.buffer(len(ids))
                bad = cursor.read(number, first, len(ids), encoded, self._labels[rows], 0)
                damaged += [rows.start + row for row in bad]
                if isinstance(encoded, list):
                    bad = _decode(reader, encoded, ids, self._images[rows])
                    damaged += [rows.start + row for row in bad]
        cursor.close()
        self._replace(sorted(set(damaged)))
        self._order = (
            BalancedOrder(self._labels, seed, split, batch)
            if balanced
            else FullOrder(n, seed, split, batch)
        )

    def take(self, step: int, start: int, stop: int) -> Samples:
        """Samples [start, stop) of the global batch of `step`."""
        rows = self._order.take(step, start, stop)
        labels = self._labels[rows] if self._reader.labeled else None
        return self._images[rows], labels, self._ids[rows]

    @property
    def skips(self) -> list[Skip]:
        """The damaged records met so far."""
        return list(self._reader.skips.values())

    def _replace(self, damaged: list[int]) -> None:
        """Puts the next good sample in the place of each damaged one."""
        good = np.setdiff1d(self._ids, damaged)
        if len(good) == 0:
            raise UserError(f"all samples of the {self._reader.name} split are damaged")
        for row in damaged:
            other = good[np.searchsorted(good, row) % len(good)]
            self._images[row], self._labels[row] = self._images[other], self._labels[other]
            self._ids[row] = other


def window_samples(split: SplitIndex, lanes: int, window_mib: float) -> int:
    """Samples in a window: all windows of all lanes hold at most `window_mib` encoded MiB."""
    mean = -(-sum(shard.bytes for shard in split.shards) // split.samples)
    return max(1, int(window_mib * 2**20) // lanes // mean)


class WindowedStream:
    """Lanes [first_lane, stop_lane) of a split of order `windowed`, each with its window and shard.

    Rows of all windows lie in one buffer, so that a step in which no lane changes its window is one
    gather. The next step goes on reading; any other step reads its windows anew.
    """

    def __init__(
        self,
        storage: Storage,
        index: DatasetIndex,
        split: str,
        seed: int,
        batch: int,
        lanes: int,
        window_mib: float,
        first_lane: int,
        stop_lane: int,
    ) -> None:
        reader = Reader(storage, index, split)
        window = window_samples(reader.split, lanes, window_mib)
        shards = reader.split.shards
        order = WindowedOrder([shard.samples for shard in shards], lanes, window, seed, split)
        self._reader, self._order = reader, order
        self._each = batch // lanes
        self._lanes = range(first_lane, stop_lane)
        self._cursors = [Cursor(reader) for _ in self._lanes]
        # shards of this many samples further on are brought while a window is used
        self._longest = min(window, -(-order.samples // lanes))
        self._ahead = max(self._longest, order.samples // len(shards))
        self._remote = is_remote(storage.root) or any(is_remote(shard.name) for shard in shards)
        rows = self._longest * len(self._lanes)
        self._images = reader.buffer(rows)
        self._labels = np.zeros(rows, np.int64)
        self._ids = np.empty(rows, np.int64)
        # of each lane: the rows of its window in the order they are taken, and the lane's own
        # positions at which the window begins and ends
        self._rows = np.empty((len(self._lanes), self._longest), np.int64)
        self._begins = np.zeros(len(self._lanes), np.int64)
        self._ends = np.zeros(len(self._lanes), np.int64)

    def take(self, step: int) -> Samples:
        """These lanes' part of the global batch of `step`, lane after lane."""
        each, lanes = self._each, len(self._lanes)
        images = np.empty((each * lanes, *self._reader.shape), np.uint8)
        labels = np.empty(each * lanes, np.int64)
        ids = np.empty(each * lanes, np.int64)
        position = step * each
        if lanes and self._begins.max() <= position and position + each <= self._ends.min():
            places = (position - self._begins)[:, None] + np.arange(each)
            self._gather(np.arange(lanes)[:, None], places, images, labels, ids)
        else:
            missing = (self._begins > position) | (position >= self._ends)
            for lane in np.flatnonzero(missing).tolist():  # while one is read, the next are brought
                self._bring(lane, position, self._longest)
            for lane in range(lanes):
                at = lane * each
                while at < (lane + 1) * each:
                    here = position + at - lane * each
                    if not self._begins[lane] <= here < self._ends[lane]:
                        self._fill(lane, here)
                    count = min((lane + 1) * each - at, int(self._ends[lane]) - here)
                    places = here - self._begins[lane] + np.arange(count)
                    part = slice(at, at + count)
                    self._gather(lane, places, images[part], labels[part], ids[part])
                    at += count
        return images, labels if self._reader.labeled else None, ids

    @property
    def skips(self) -> list[Skip]:
        """The damaged records met so far."""
        return list(self._reader.skips.values())

    def _gather(
        self, lanes: Int64s | int, places: Int64s, images: Bytes, labels: Int64s, ids: Int64s
    ) -> None:
        """Fills the arrays with the samples at these places in the windows of these lanes."""
        rows = self._rows[lanes, places].ravel()
        if isinstance(self._images, list):
            for at, row in enumerate(rows.tolist()):
                try:
                    images[at] = self._reader.decode(self._images[row])
                except ValueError as error:
                    self._reader.skip(int(self._ids[row]), error)
                    rows[at], images[at] = self._next_good(row)
        else:
            # mode: without it numpy goes through a copy of the output
            np.take(self._images, rows, axis=0, out=images, mode="clip")
        if self._reader.labeled:
            np.take(self._labels, rows, out=labels, mode="clip")
        np.take(self._ids, rows, out=ids, mode="clip")

    def _next_good(self, row: int) -> tuple[int, Bytes]:
        """The first row after a damaged one, in the order of its window, that can be decoded."""
        assert isinstance(self._images, list)
        lane = row // self._longest
        window = self._rows[lane, : self._ends[lane] - self._begins[lane]]
        place = int(np.flatnonzero(window == row)[0])
        for other in np.roll(window, -place)[1:].tolist():
            try:
                return other, self._reader.decode(self._images[other])
            except ValueError as error:
                self._reader.skip(int(self._ids[other]), error)
        raise self._all_damaged()

    def _all_damaged(self) -> UserError:
        return UserError(
            f"all samples of a window of the {self._reader.name} split are damaged, the last in "
            f"shard {self.skips[-1].shard}: {self.skips[-1].why}; mend the data, or leave that "
            "shard out of the index"
        )

    def _fill(self, lane: int, position: int) -> None:
        """Reads the window that holds the lane's own `position`."""
        order, number = self._order, self._lanes[lane]
        epoch, window, inside = order.locate(number, position)
        start, stop = order.window_line(number, epoch, window)
        self._reader.raise_changed()
        self._begins[lane] = self._ends[lane] = 0  # should reading fail, this window is not there
        at = first = lane * self._longest
        damaged: list[int] = []
        for piece in order.pieces(epoch, start, stop):
            self._ids[at : at + piece.samples] = self._reader.ids(*piece)
            self._reader.check_later(piece.shard)
            damaged += self._cursors[lane].read(*piece, self._images, self._labels, at)
            at += piece.samples
        rows = first + order.window_permutation(number, epoch, window)
        if damaged:
            rows = self._without(rows, damaged)
        self._rows[lane, : len(rows)] = rows
        self._begins[lane] = position - inside
        self._ends[lane] = position - inside + len(rows)
        self._bring(lane, int(self._ends[lane]), self._ahead)

    def _bring(self, lane: int, position: int, samples: int) -> None:
        """Begins to bring the remote shards of a lane's samples from its own `position` on."""
        if self._remote:
            shards = self._order.following(self._lanes[lane], position, samples)
            self._reader.storage.ahead(self._reader.split.shards[shard] for shard in shards)

    def _without(self, rows: Int64s, damaged: list[int]) -> Int64s:
        """The rows with the next good one in the place of each damaged one."""
        good = np.flatnonzero(~np.isin(rows, damaged))
        if len(good) == 0:
            raise self._all_damaged()
        return rows[good[np.searchsorted(good, np.arange(len(rows))) % len(good)]]


def read_split(
    storage: Storage,
    index: DatasetIndex,
    split: str,
    rank: int,
    world_size: int,
    block: int = 256,
) -> Iterator[Samples]:
    """One pass over a split: sample i goes to rank i % world_size, in batches of `block`.

    The last batch may be smaller, and ranks may get a different number of batches. Damaged samples
    are left out.
    """
    reader = Reader(storage, index, split)
    cursor = Cursor(reader)
    held: list[Samples] = []
    count = 0
    for number, shard in enumerate(reader.split.shards):
        storage.ahead(reader.split.shards[number + 1 : number + 1 + AHEAD])
        reader.check_hash(number)
        for first in range(0, shard.samples, CHUNK):
            ids = reader.ids(number, first, min(CHUNK, shard.samples - first))
            encoded = reader.buffer(len(ids))
            labels = np.zeros(len(ids), np.int64)
            damaged = cursor.read(number, first, len(ids), encoded, labels, 0)
            own = np.setdiff1d(np.flatnonzero(ids % world_size == rank), damaged)
            held.append(_decoded(reader, encoded, labels, ids, own))
            count += len(held[-1][2])
            if count >= block:
                joined = _join(held)
                whole = count // block * block
                for at in range(0, whole, block):
                    yield _part(joined, at, at + block)
                held, count = [_part(joined, whole, count)], count - whole
    cursor.close()
    if count:
        yield _join(held)


def _decoded(reader: Reader, encoded: Images, labels: Int64s, ids: Int64s, rows: Int64s) -> Samples:
    """These rows of what was read, without those that can't be decoded."""
    if isinstance(encoded, list):
        images = np.empty((len(rows), *reader.shape), np.uint8)
        damaged = _decode(reader, [encoded[row] for row in rows], ids[rows], images)
        good = np.setdiff1d(np.arange(len(rows)), damaged)
        images, rows = images[good], rows[good]
    else:
        images = encoded[rows]
    return images, labels[rows] if reader.labeled else None, ids[rows]


def _decode(reader: Reader, encoded: list[bytes], ids: Int64s, out: Bytes) -> list[int]:
    """Decodes images into `out`; returns the rows of those that are damaged."""
    damaged = []
    for row, image in enumerate(encoded):
        try:
            out[row] = reader.decode(image)
        except ValueError as error:
            reader.skip(int(ids[row]), error)
            damaged.append(row)
    return damaged


def _join(held: list[Samples]) -> Samples:
    images, labels, ids = zip(*held, strict=True)
    joined = None if labels[0] is None else np.concatenate(labels)
    return np.concatenate(images), joined, np.concatenate(ids)


def _part(samples: Samples, start: int, stop: int) -> Samples:
    images, labels, ids = samples
    return images[start:stop], None if labels is None else labels[start:stop], ids[start:stop]
