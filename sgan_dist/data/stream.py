"""Samples out of shards: a split held in memory, lanes read in sequence, and one pass to evaluate.

Images are uint8 (n, H, W, C), labels int64 (n,) or None, ids int64 (n,): a sample's number in
its split, in the order of the index. Anything that can't be read is a UserError that names shard
and record.
"""

from __future__ import annotations

import functools
import hashlib
import io
import itertools
import os
import struct
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from webdataset.tariterators import group_by_keys, tar_file_iterator

from sgan_dist.data.index import DatasetIndex, Shard, SplitIndex, prepare_again
from sgan_dist.data.order import FullOrder, Int64s, WindowedOrder
from sgan_dist.errors import UserError

Bytes = NDArray[np.uint8]
Samples = tuple[Bytes, Int64s | None, Int64s]


@dataclass(frozen=True)
class _Chunk:
    """Consecutive samples: a decoded array (packed), or the bytes of PNG files (per-sample)."""

    images: Bytes | list[bytes]
    labels: Int64s | None

    def part(self, start: int, stop: int | None = None, step: int = 1) -> _Chunk:
        labels = None if self.labels is None else self.labels[start:stop:step]
        return _Chunk(self.images[start:stop:step], labels)


class FullStream:
    """A split of order `full`, decoded in memory; contents are checked against their sha256."""

    def __init__(
        self,
        root: str | os.PathLike[str],
        index: DatasetIndex,
        split: str,
        seed: int,
        batch: int,
    ) -> None:
        reader = _Reader(root, index, split)
        samples = reader.split.samples
        self._order = FullOrder(samples, seed, split, batch)
        self._images = np.empty((samples, *index.image_shape), np.uint8)
        self._labels = np.empty(samples, np.int64) if reader.labeled else None
        at = 0
        for number, shard in enumerate(reader.split.shards):
            for chunk in reader.read(number, 0, shard.samples):
                end = at + len(chunk.images)
                reader.decode(chunk.images, at, self._images[at:end])
                if self._labels is not None and chunk.labels is not None:
                    self._labels[at:end] = chunk.labels
                at = end
            reader.check_hash(shard)

    def take(self, step: int, start: int, stop: int) -> Samples:
        """Samples [start, stop) of the global batch of `step`."""
        ids = self._order.take(step, start, stop)
        return self._images[ids], None if self._labels is None else self._labels[ids], ids


def window_samples(split: SplitIndex, lanes: int, window_mib: float) -> int:
    """Samples in a window: all windows of all lanes hold at most `window_mib` encoded MiB."""
    mean = -(-sum(shard.bytes for shard in split.shards) // split.samples)
    return max(1, int(window_mib * 2**20) // lanes // mean)


class WindowedStream:
    """Lanes [first_lane, stop_lane) of a split of order `windowed`, each with an open shard.

    The next step goes on reading; any other step opens the shards anew at the right record.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        index: DatasetIndex,
        split: str,
        seed: int,
        batch: int,
        lanes: int,
        window_mib: float,
        first_lane: int,
        stop_lane: int,
    ) -> None:
        shards = index.split(split).shards
        window = window_samples(index.split(split), lanes, window_mib)
        order = WindowedOrder([shard.samples for shard in shards], lanes, window, seed, split)
        self._shape = index.image_shape
        self._per_lane = batch // lanes
        self._lanes = [
            _Lane(order, lane, _Reader(root, index, split)) for lane in range(first_lane, stop_lane)
        ]

    def take(self, step: int) -> Samples:
        """These lanes' part of the global batch of `step`, lane after lane."""
        each = self._per_lane
        total = each * len(self._lanes)
        images = np.empty((total, *self._shape), np.uint8)
        labels = np.empty(total, np.int64)
        ids = np.empty(total, np.int64)
        for number, lane in enumerate(self._lanes):
            part = slice(number * each, (number + 1) * each)
            lane.take(step * each, images[part], labels[part], ids[part])
        labeled = bool(self._lanes) and self._lanes[0].labeled
        return images, labels if labeled else None, ids


def read_split(
    root: str | os.PathLike[str],
    index: DatasetIndex,
    split: str,
    rank: int,
    world_size: int,
    block: int = 256,
) -> Iterator[Samples]:
    """One pass over a split: sample i goes to rank i % world_size, in batches of `block`.

    The last batch may be smaller, and ranks may get a different number of batches.
    """
    reader = _Reader(root, index, split)
    held: list[Samples] = []
    count = base = 0
    for number, shard in enumerate(reader.split.shards):
        for chunk in reader.read(number, 0, shard.samples):
            first = (rank - base) % world_size
            ids = np.arange(base + first, base + len(chunk.images), world_size, dtype=np.int64)
            base += len(chunk.images)
            own = chunk.part(first, step=world_size)
            images = np.empty((len(ids), *index.image_shape), np.uint8)
            reader.decode(own.images, ids, images)
            held.append((images, own.labels, ids))
            count += len(ids)
            if count >= block:
                joined = _join(held)
                whole = count // block * block
                for at in range(0, whole, block):
                    yield _part(joined, at, at + block)
                held, count = [_part(joined, whole, count)], count - whole
    if count:
        yield _join(held)


def _join(held: list[Samples]) -> Samples:
    images, labels, ids = zip(*held, strict=True)
    joined = None if labels[0] is None else np.concatenate(labels)
    return np.concatenate(images), joined, np.concatenate(ids)


def _part(samples: Samples, start: int, stop: int) -> Samples:
    images, labels, ids = samples
    return images[start:stop], None if labels is None else labels[start:stop], ids[start:stop]


class _Lane:
    """One lane: the window it is in, and the reader that fills the next one."""

    def __init__(self, order: WindowedOrder, lane: int, reader: _Reader) -> None:
        self._order = order
        self._lane = lane
        self._reader = reader
        self._held: tuple[int, int] | None = None  # epoch and window
        self._images: Bytes | list[bytes] = []
        longest = min(order.window, -(-order.samples // order.lanes))
        # buffers are used again for every window: packed images are held decoded, PNGs as bytes
        self._buffer = (
            np.empty((longest, *reader.shape), np.uint8)
            if reader.split.layout == "packed"
            else None
        )
        self._labels = np.empty(longest, np.int64)
        self._ids = np.empty(longest, np.int64)
        self._shuffled = np.empty(0, np.int64)

    @property
    def labeled(self) -> bool:
        return self._reader.labeled

    def take(self, position: int, images: Bytes, labels: Int64s, ids: Int64s) -> None:
        """Fill the arrays with the lane's samples from its own `position` on."""
        at = 0
        while at < len(ids):
            epoch, window, inside = self._order.locate(self._lane, position + at)
            if self._held != (epoch, window):
                self._fill(epoch, window)
            rows = self._shuffled[inside : inside + len(ids) - at]
            end = at + len(rows)
            ids[at:end] = self._ids[rows]
            labels[at:end] = self._labels[rows]
            if self._buffer is not None:
                # mode: without it numpy goes through a copy of the output
                np.take(self._buffer, rows, axis=0, out=images[at:end], mode="clip")
            else:
                chosen = [self._images[row] for row in rows.tolist()]
                self._reader.decode(chosen, ids[at:end], images[at:end])
            at = end

    def _fill(self, epoch: int, window: int) -> None:
        self._held = None  # should reading fail, this window is not there
        encoded: list[bytes] = []
        self._images = encoded
        at = 0
        for piece in self._order.pieces(epoch, *self._order.window_line(self._lane, epoch, window)):
            first = self._reader.base(piece.shard) + piece.first
            self._ids[at : at + piece.samples] = np.arange(first, first + piece.samples)
            for chunk in self._reader.read(*piece):
                end = at + len(chunk.images)
                if self._buffer is not None:
                    self._buffer[at:end] = chunk.images
                else:
                    encoded.extend(chunk.images)
                if chunk.labels is not None:
                    self._labels[at:end] = chunk.labels
                at = end
        self._shuffled = self._order.window_permutation(self._lane, epoch, window)
        self._held = epoch, window


class _Reader:
    """Consecutive samples of a split's shards; goes on in the open shard wherever it can."""

    def __init__(self, root: str | os.PathLike[str], index: DatasetIndex, split: str) -> None:
        self.split = index.split(split)
        self.shape = index.image_shape
        self.labeled = split != "unlabeled"
        self._classes = len(index.class_names)
        self._root = Path(root)
        self._bases = np.cumsum([0, *(shard.samples for shard in self.split.shards)])
        self._next: tuple[int, int] | None = None  # shard and sample that come next
        self._chunks: Iterator[_Chunk] = iter(())
        self._rest: _Chunk | None = None

    def base(self, shard: int) -> int:
        """The id of a shard's first sample."""
        return int(self._bases[shard])

    def read(self, shard: int, first: int, count: int) -> Iterator[_Chunk]:
        """Samples [first, first + count) of a shard, in chunks."""
        if self._next != (shard, first):
            record, skip = divmod(first, self.split.block)
            self._chunks = self._shard_chunks(shard, record)
            self._rest = next(self._chunks).part(skip)
        self._next = None  # should reading fail, begin anew
        left = count
        while left:
            chunk = self._rest if self._rest is not None else next(self._chunks)
            held = len(chunk.images)
            self._rest = chunk.part(left) if held > left else None
            yield chunk.part(0, left) if held > left else chunk
            left -= min(held, left)
        if first + count == self.split.shards[shard].samples:
            next(self._chunks, None)  # let the shard's end be checked and the file be closed
        else:
            self._next = shard, first + count

    def _shard_chunks(self, number: int, first_record: int) -> Iterator[_Chunk]:
        """The chunks of a shard's records from one on; raises UserError where they differ."""
        shard, block = self.split.shards[number], self.split.block
        records = -(-shard.samples // block)
        record = first_record
        try:
            with open(self._root / shard.name, "rb") as file:
                skip = first_record
                if first_record:
                    offset = _record_offset(self._root / shard.name, first_record, records)
                    if offset is not None:
                        file.seek(offset)
                        skip = 0
                files = ({**item, "__url__": shard.name} for item in tar_file_iterator(file))
                for content in itertools.islice(group_by_keys(files), skip, None):
                    if record >= records:
                        raise ValueError(f"the index says there are {records} records only")
                    expected = min(block, shard.samples - record * block)
                    yield self._chunk(content, expected)
                    record += 1
            if record < records:
                raise ValueError(f"the shard ends, its index says it has {records} records")
        except (tarfile.TarError, OSError, ValueError, KeyError, EOFError) as error:
            raise self._unreadable(shard, record, error) from None

    def _chunk(self, content: dict[str, Any], expected: int) -> _Chunk:
        labels = None
        if self.split.layout == "packed":
            images = _array(_field(content, "images.npy"), (expected, *self.shape), "u1")
            if self.labeled:
                labels = _array(_field(content, "labels.npy"), (expected,), "i8")
        else:
            images = [_field(content, "png")]
            if self.labeled:
                labels = np.array([int(_field(content, "cls"))], np.int64)
        if labels is not None and (labels.min() < 0 or labels.max() >= self._classes):
            raise ValueError(f"labels go from {labels.min()} to {labels.max()}")
        return _Chunk(images, labels)

    def decode(self, images: Bytes | list[bytes], ids: Int64s | int, out: Bytes) -> None:
        """Decode into `out`; `ids`, the samples' numbers or the first one, name a broken one."""
        if isinstance(images, np.ndarray):
            out[:] = images
            return
        for place, encoded in enumerate(images):
            try:
                out[place] = _png(encoded, self.shape)
            except (OSError, SyntaxError, ValueError, zlib.error, struct.error) as error:
                sample = ids + place if isinstance(ids, int) else int(ids[place])
                number = int(np.searchsorted(self._bases, sample, side="right")) - 1
                record = sample - self.base(number)
                raise self._unreadable(self.split.shards[number], record, error) from None

    def check_hash(self, shard: Shard) -> None:
        """Raise UserError unless the shard's bytes are those that were prepared."""
        if not self._unchanged(shard):
            raise UserError(
                f"shard {shard.name} of the dataset at {self._root} is not the file that was "
                f"prepared (its sha256 differs): copy it again, or {prepare_again(self._root)}"
            )

    def _unchanged(self, shard: Shard) -> bool:
        with open(self._root / shard.name, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == shard.sha256

    def _unreadable(self, shard: Shard, record: int, error: Exception) -> UserError:
        again = prepare_again(self._root)
        try:
            verdict = (
                "it is as it was prepared, so its offsets sidecar may be wrong (delete that), or "
                f"the index is ({again})"
                if self._unchanged(shard)
                else f"it was damaged since (its sha256 differs): copy it again, or {again}"
            )
        except OSError:
            verdict = f"check the disk, or {again}"
        why = str(error.args[0] if error.args else error).split(" @ ")[0] or type(error).__name__
        if isinstance(error, OSError) and error.strerror:
            why = error.strerror
        return UserError(
            f"cannot read shard {shard.name}, record {record}, of the dataset at {self._root}: "
            f"{why}; {verdict}"
        )


def _record_offset(shard: Path, record: int, records: int) -> int | None:
    """Where a record begins in its tar, in bytes, or None without a sidecar."""
    sidecar = Path(f"{shard}.offsets.npy")
    try:
        offsets = np.load(sidecar, allow_pickle=False)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"cannot read {sidecar}: {error}; delete it, it is not needed") from None
    if offsets.shape != (records + 1,) or offsets.dtype != np.int64:
        raise UserError(f"{sidecar} is not of its shard: delete it, it is not needed")
    return int(offsets[record])


def _field(content: dict[str, Any], name: str) -> bytes:
    if name not in content:
        raise ValueError(f"record {content['__key__']} has no {name}")
    data: bytes = content[name]
    return data


def _array(data: bytes, shape: tuple[int, ...], dtype: str) -> Any:
    """The array of a .npy file, without a copy; it must be of this shape and dtype."""
    # magic and version, length of the rest of the header (two bytes in version 1.0), the rest
    length = 10 + struct.unpack_from("<H", data, 8)[0] if data[:8] == b"\x93NUMPY\x01\0" else 0
    if not 10 <= length <= len(data):
        raise ValueError("not a .npy file of version 1.0")
    found = _npy_header(data[:length])
    wanted = (shape, False, np.dtype(dtype).newbyteorder("<"))
    if found != wanted:
        raise ValueError(f"array of shape {found[0]} and type {found[2]}, expected {shape} {dtype}")
    if len(data) - length != wanted[2].itemsize * int(np.prod(shape)):
        raise ValueError(f"array of {len(data) - length} bytes, too few or too many for {shape}")
    return np.frombuffer(data, dtype, offset=length).reshape(shape)


@functools.lru_cache(256)
def _npy_header(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """(shape, Fortran order, dtype); the same few headers come again and again."""
    return np.lib.format.read_array_header_1_0(io.BytesIO(header[8:]))


def _png(encoded: bytes, shape: tuple[int, int, int]) -> Bytes:
    with Image.open(io.BytesIO(encoded)) as image:
        pixels = np.asarray(image)
    pixels = pixels[..., np.newaxis] if pixels.ndim == 2 else pixels
    if pixels.shape != shape or pixels.dtype != np.uint8:
        raise ValueError(f"image of shape {pixels.shape} and type {pixels.dtype}, expected {shape}")
    return pixels
