"""Consecutive samples of a split's shards, into arrays that the caller holds.

Packed images are read straight into the caller's array, by their place in the tar; of a per-sample
shard come the encoded images. What can't be read is either damage since the index was made, which
is a UserError with the shard's name, or was indexed that way, and is skipped, counted and named.
"""

from __future__ import annotations

import functools
import io
import itertools
import math
import os
import struct
import tarfile
import threading
from collections import OrderedDict, deque
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sgan_dist.data.images import decode
from sgan_dist.data.index import DatasetIndex, prepare_again
from sgan_dist.data.order import Int64s
from sgan_dist.data.records import checked_size, image_of, label_of, records, samples
from sgan_dist.data.remote import is_remote, join
from sgan_dist.data.storage import Storage
from sgan_dist.errors import UserError

CHECKED_BYTES = 8 * 2**30
PLACES_KEPT = 256  # shards
NPY_HEADER = 256  # bytes; numpy's own take 128 for an array of few dimensions

Bytes = NDArray[np.uint8]
Images = Bytes | list[bytes]  # decoded (packed), or encoded (per-sample)


class Skip(NamedTuple):
    """A record that was damaged already when its shard was indexed: `samples` of it are left out."""

    shard: str
    record: int
    samples: int
    why: str


class _Places(NamedTuple):
    """Where each record of a shard begins and the last one ends; and the arrays of packed ones.

    Of a record that was read before: the bytes at which its first image and its first label lie.
    """

    offsets: Int64s
    arrays: dict[int, tuple[int, int]]


class Reader:
    """A split's shards. `skips` are the damaged records met so far, each once."""

    def __init__(self, storage: Storage, index: DatasetIndex, split: str) -> None:
        self.split = index.split(split)
        self.shape = index.image_shape
        self.labeled = split != "unlabeled"
        self.packed = self.split.layout == "packed"
        self.storage = storage
        self.skips: dict[tuple[int, int], Skip] = {}
        self.name = split
        self.label = index.label
        self._checked: set[int] = set()
        self._large = sum(shard.bytes for shard in self.split.shards) > CHECKED_BYTES
        self._unchecked: deque[int] = deque()
        self._checking = False
        self._lock = threading.Lock()
        self._changed: UserError | None = None
        # lanes that follow one another through a shard share what is known of it
        self._places: OrderedDict[int, _Places] = OrderedDict()
        self._resize = index.resize
        self._classes = len(index.class_names)
        # ids: a sample's number in the split is its shard's first id and its place in the shard
        self._bases = np.cumsum([0, *(shard.samples for shard in self.split.shards)])

    def buffer(self, rows: int) -> Images:
        """Room for `rows` images as `Cursor.read` fills it."""
        return np.empty((rows, *self.shape), np.uint8) if self.packed else [b""] * rows

    def ids(self, shard: int, first: int, count: int) -> Int64s:
        """The ids of samples [first, first + count) of a shard."""
        start = int(self._bases[shard]) + first
        return np.arange(start, start + count)

    def decode(self, image: bytes) -> Bytes:
        """The pixels of a per-sample image; ValueError where it is damaged."""
        return decode(image, self.shape, self._resize)

    def checked(self, label: int) -> int:
        """The label; ValueError unless it is of one of the classes."""
        if not 0 <= label < self._classes:
            raise ValueError(f"label {label} is not one of {self._classes} classes")
        return label

    def skip(self, id: int, error: Exception) -> None:
        """Notes that the record of sample `id` is damaged.

        Raises UserError where the shard's bytes are not those that were indexed.
        """
        number = int(np.searchsorted(self._bases, id, side="right")) - 1
        block, place = self.split.block, id - int(self._bases[number])
        record = place // block
        shard = self.split.shards[number]
        count = min(block, shard.samples - record * block)
        if not self.storage.unchanged(shard):
            raise UserError(
                f"cannot read shard {shard.name}, record {record}: {_reason(error)}; its bytes no "
                f"longer match the index (sha256): copy it again, or {prepare_again(self._root)}"
            )
        self.skips.setdefault((number, record), Skip(shard.name, record, count, _reason(error)))

    def places(self, number: int, file: BinaryIO) -> _Places:
        """Where the records of a shard are.

        Without a sidecar the open `file` is read for it. Raises ValueError where that is another
        number of records than the index says.
        """
        if number not in self._places:
            shard = self.split.shards[number]
            count = -(-shard.samples // self.split.block)
            offsets = self.storage.offsets(self.name, number, count, shard)
            if offsets is None:
                each = records if self.packed else samples
                found = [(record.offset, record.end) for record in each(file)]
                if len(found) != count:
                    raise ValueError(f"it has {len(found)} records, its index says {count}")
                offsets = np.array([offset for offset, _ in found] + [found[-1][1]])
            while len(self._places) >= PLACES_KEPT:
                self._places.popitem(last=False)
            self._places[number] = _Places(offsets, {})
        return self._places[number]

    def check_hash(self, number: int) -> None:
        """Raises UserError unless a shard's bytes are those that were indexed."""
        shard = self.split.shards[number]
        if not self.storage.unchanged(shard):
            raise UserError(
                f"shard {shard.name} is not the file that was indexed (its sha256 differs): copy "
                f"it again, or {prepare_again(self._root)}"
            )

    def check_later(self, number: int) -> None:
        """Has a local shard's bytes checked in the background, once; see `raise_changed`.

        Remote ones are checked as they arrive; a split of more than CHECKED_BYTES is not read twice.
        """
        if self._large or number in self._checked:
            return
        self._checked.add(number)
        if is_remote(join(self._root, self.split.shards[number].name)):
            return
        with self._lock:
            self._unchecked.append(number)
            if not self._checking:
                self._checking = True
                threading.Thread(target=self._check, daemon=True).start()

    def raise_changed(self) -> None:
        """Raises UserError where a check in the background found a shard that was changed."""
        if self._changed is not None:
            raise self._changed

    def _check(self) -> None:
        while True:
            with self._lock:
                if not self._unchecked:
                    self._checking = False
                    return
                number = self._unchecked.popleft()
            try:
                self.check_hash(number)
            except UserError as error:
                self._changed = error

    @property
    def _root(self) -> str:
        return self.storage.root

    def unreadable(self, number: int, error: Exception) -> UserError:
        """What to say of a shard that can't be read as a tar of what the index tells."""
        shard = self.split.shards[number]
        again = prepare_again(self._root)
        verdict = (
            f"it is as it was indexed, so its sidecar of offsets may be wrong (delete that), or the "
            f"index is ({again})"
            if self.storage.unchanged(shard)
            else f"its bytes no longer match the index (sha256): copy it again, or {again}"
        )
        return UserError(f"cannot read shard {shard.name}: {_reason(error)}; {verdict}")


class Cursor:
    """A place in a split's shards: the shard that was read last stays open."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._shard = -1
        self._file: BinaryIO = io.BytesIO()
        self._places = _Places(np.empty(0, np.int64), {})

    def read(
        self, shard: int, first: int, count: int, images: Images, labels: Int64s, at: int
    ) -> list[int]:
        """Reads samples [first, first + count) of a shard into rows [at, at + count).

        Labels are left alone in a split without. Returns the rows whose samples are damaged.
        """
        reader = self._reader
        try:
            self._open(shard)
            if isinstance(images, list):
                return self._read_samples(shard, first, count, images, labels, at)
            return self._read_blocks(shard, first, count, images, labels, at)
        except (tarfile.TarError, ValueError, EOFError, OSError) as error:
            self._shard = -1
            raise reader.unreadable(shard, error) from None

    def close(self) -> None:
        """Lets go of the open shard."""
        self._file.close()
        self._shard = -1

    def _open(self, shard: int) -> None:
        if self._shard == shard:
            return
        self.close()
        self._file = self._reader.storage.open(self._reader.split.shards[shard])
        self._places = self._reader.places(shard, self._file)
        self._shard = shard

    def _read_samples(
        self, shard: int, first: int, count: int, images: list[bytes], labels: Int64s, at: int
    ) -> list[int]:
        reader, found = self._reader, 0
        damaged: list[int] = []
        for record in itertools.islice(
            samples(self._file, int(self._places.offsets[first])), count
        ):
            row = at + found
            image = image_of(record.files)
            assert image is not None  # else it would not be a sample
            images[row] = image[1]
            if reader.labeled:
                try:
                    labels[row] = reader.checked(label_of(record.files, reader.label))
                except ValueError as error:
                    reader.skip(int(reader.ids(shard, first + found, 1)[0]), error)
                    damaged.append(row)
            found += 1
        if found < count:
            raise ValueError(f"it ends after {first + found} samples, its index says more")
        return damaged

    def _read_blocks(
        self, shard: int, first: int, count: int, images: Bytes, labels: Int64s, at: int
    ) -> list[int]:
        reader = self._reader
        damaged: list[int] = []
        block, total = reader.split.block, reader.split.shards[shard].samples
        descriptor, end = self._file.fileno(), at + count
        while at < end:
            record, inside = divmod(first, block)
            rows = slice(at, at + min(block - inside, end - at))
            try:
                if record not in self._places.arrays:
                    self._find_arrays(record, min(block, total - record * block))
                first_image, first_label = self._places.arrays[record]
                _read_into(images[rows], descriptor, first_image + inside * images[0].nbytes)
                if reader.labeled:
                    _read_into(labels[rows], descriptor, first_label + inside * labels.itemsize)
                    reader.checked(labels[rows].min())
                    reader.checked(labels[rows].max())
            except ValueError as error:
                reader.skip(int(reader.ids(shard, first, 1)[0]), error)
                damaged += range(rows.start, rows.stop)
            first += rows.stop - at
            at = rows.stop
        return damaged

    def _find_arrays(self, record: int, count: int) -> None:
        """Notes where a packed record's arrays lie; ValueError unless they are of `count` samples."""
        reader, descriptor = self._reader, self._file.fileno()
        members = _members(descriptor, *self._places.offsets[record : record + 2].tolist())
        shape = (count, *reader.shape)
        images = _array_in(descriptor, members, "images.npy", shape, "u1")
        labels = (
            _array_in(descriptor, members, "labels.npy", (count,), "i8") if reader.labeled else 0
        )
        self._places.arrays[record] = images, labels


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


def _members(descriptor: int, start: int, end: int) -> dict[str, tuple[int, int]]:
    """Where the files of a packed record lie: by extension, first byte and size."""
    found = {}
    while start < end:
        header = os.pread(descriptor, tarfile.BLOCKSIZE, start)
        try:
            size = checked_size(header, start)
        except ValueError as error:  # not a damaged record, but a tar that is another
            raise tarfile.HeaderError(str(error)) from None
        name = header[:100].rstrip(b"\0").decode("utf-8", "replace")
        found[name.partition(".")[2]] = start + tarfile.BLOCKSIZE, size
        start += tarfile.BLOCKSIZE * (1 + -(-size // tarfile.BLOCKSIZE))
    return found


def _array_in(
    descriptor: int,
    members: dict[str, tuple[int, int]],
    name: str,
    shape: tuple[int, ...],
    dtype: str,
) -> int:
    """Where in the file the data of the .npy file `name` begin.

    Raises ValueError unless it holds an array of this shape and type, and no more.
    """
    if name not in members:
        raise ValueError(f"it has no {name}")
    place, size = members[name]
    head = os.pread(descriptor, min(size, NPY_HEADER), place)
    # magic and version, length of the rest of the header (two bytes in version 1.0), the rest
    length = 10 + struct.unpack_from("<H", head, 8)[0] if head[:8] == b"\x93NUMPY\x01\0" else 0
    if not 10 <= length <= len(head):
        raise ValueError("not a .npy file of version 1.0")
    found = _npy_header(head[:length])
    wanted = (shape, False, np.dtype(dtype).newbyteorder("<"))
    if found != wanted:
        raise ValueError(f"array of shape {found[0]} and type {found[2]}, expected {shape} {dtype}")
    if size - length != math.prod(shape) * wanted[2].itemsize:
        raise ValueError(f"array of {size - length} bytes, too few or too many for {shape}")
    return place + length


def _read_into(out: NDArray[Any], descriptor: int, place: int) -> None:
    """Fills `out` with the file's bytes from `place` on."""
    view = out.view(np.uint8).reshape(-1)
    done = 0
    while done < len(view):
        read = os.preadv(descriptor, [view[done:].data], place + done)
        if read == 0:
            raise EOFError("the file ends within a record")
        done += read


@functools.lru_cache(256)
def _npy_header(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """(shape, Fortran order, dtype); the same few headers come again and again."""
    return np.lib.format.read_array_header_1_0(io.BytesIO(header[8:]))
