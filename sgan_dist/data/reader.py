"""Consecutive samples of a split's shards, read into arrays.

Packed images are read straight into their array, per-sample ones as they are encoded. Data that
cannot be read was either changed since it was indexed, which is a UserError that names the shard, or
was damaged already when it was indexed, and is skipped, counted and named.
"""

from __future__ import annotations

import contextlib
import io
import math
import tarfile
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sgan_dist.data.images import decode
from sgan_dist.data.index import DatasetIndex, Shard, prepare_again, sidecar_name
from sgan_dist.data.order import Int64s, Piece
from sgan_dist.data.records import SUFFIXES_1, UNLABELED, label_of, list_records, plain_label
from sgan_dist.data.remote.cache import Storage
from sgan_dist.data.remote.urls import redact_url
from sgan_dist.errors import UserError

PLACES_KEPT = 256  # shards whose records' places are remembered

Bytes = NDArray[np.uint8]
# where a packed record's images and labels begin in the tar, or why they cannot be read; or the sidecar
# of a per-sample shard
Places = list[tuple[int, int] | str] | Int64s


class Skip(NamedTuple):
    """A record that was already damaged when its shard was indexed: `samples` of it are left out."""

    shard: str
    record: int
    samples: int
    why: str


@dataclass(frozen=True)
class Buffer:
    """Rows that `Cursor.read` fills.

    images: uint8 (n, H, W, C) in the packed layout, else n encoded images; labels: int64 (n,), left
    alone in the unlabeled split; ids: int64 (n,), a sample's number in its split.
    """

    images: Bytes | list[bytes]
    labels: Int64s
    ids: Int64s


class Reader:
    """What is known of a split's shards. Its errors are UserErrors that name the shard."""

    def __init__(self, storage: Storage, index: DatasetIndex, split: str) -> None:
        self.name, self.split = split, index.split(split)
        self.storage = storage
        self.image_hwc = index.image_hwc
        self.labeled = split != "unlabeled"
        self.packed = self.split.layout == "packed"
        self.label = index.label
        self._resize, self._decode_version = index.resize, index.decode_version
        self._classes = len(index.class_names)
        self._skips: dict[tuple[int, int], Skip] = {}
        # a sample's id is its shard's first id plus its place in the shard
        self.first_ids = np.cumsum([0, *(shard.samples for shard in self.split.shards)])
        # shared by all cursors: lanes that follow one another read the same shards
        self._places: dict[int, Places] = {}

    @property
    def skips(self) -> list[Skip]:
        """The damaged records found so far, each once."""
        return list(self._skips.values())

    def buffer(self, rows: int) -> Buffer:
        """Returns an empty buffer of `rows` rows."""
        images: Bytes | list[bytes] = [b""] * rows
        if self.packed:
            images = np.empty((rows, *self.image_hwc), np.uint8)
        return Buffer(images, np.zeros(rows, np.int64), np.empty(rows, np.int64))

    def decode(self, image: bytes, id: int) -> Bytes | None:
        """Returns the pixels of an encoded image; None if it is damaged, which is a skip."""
        try:
            return decode(image, self.image_hwc, self._resize, self._decode_version)
        except ValueError as error:
            self.skip(id, error)
            return None

    def check_label(self, label: int) -> int:
        """Returns the label; raises ValueError unless it is of one of the classes."""
        if not 0 <= label < self._classes:
            raise ValueError(f"label {label} is not one of {self._classes} classes")
        return label

    def skip(self, id: int, error: Exception) -> None:
        """Notes that the record of sample `id` is damaged; UserError if its shard has changed."""
        number = int(np.searchsorted(self.first_ids, id, side="right")) - 1
        self.verify(number)
        shard, block = self.split.shards[number], self.split.block
        record = (id - int(self.first_ids[number])) // block
        count = min(block, shard.samples - record * block)
        self._skips.setdefault((number, record), Skip(shard.name, record, count, _reason(error)))

    def verify(self, number: int) -> None:
        """Raises UserError unless a shard's bytes are those that were indexed."""
        shard = self.split.shards[number]
        if not self.storage.unchanged(shard):
            raise UserError(
                f"cannot read shard {shard.name} as it was indexed, because its sha256 differs: copy"
                f" it again, or {prepare_again(self.storage.root)}"
            )

    def unreadable(self, number: int, error: Exception) -> UserError:
        """Returns the error for a shard that is not a tar of what the index says."""
        self.verify(number)
        return UserError(
            f"cannot read shard {self.split.shards[number].name}: {_reason(error)}; it is as it was"
            f" indexed, so the index is wrong: {prepare_again(self.storage.root)}"
        )

    def places(self, number: int, file: BinaryIO) -> Places:
        """Returns where the images of a shard are, from the open file or from a sidecar.

        Raises ValueError unless there are as many records as the index says.
        """
        if number in self._places:
            return self._places[number]
        shard = self.split.shards[number]
        count = -(-shard.samples // self.split.block)
        places: Places
        if self.packed:
            places = self._array_places(file, shard.samples)
        elif shard.sidecar_sha256:
            places = self._sidecar(number, shard)
        else:
            places = self._samples(file)
        if len(places) != count:
            raise ValueError(f"it has {len(places)} records, its index says {count}")
        if len(self._places) >= PLACES_KEPT:
            self._places.pop(next(iter(self._places)))  # the oldest
        self._places[number] = places
        return places

    def _sidecar(self, number: int, shard: Shard) -> Int64s:
        name = sidecar_name(self.name, number)
        sidecar = Shard(name, shard.samples, shard.sidecar_bytes, shard.sidecar_sha256)
        if not self.storage.unchanged(sidecar):
            raise UserError(
                f"{name} of the dataset at {redact_url(self.storage.root)} has changed since it was"
                f" written: copy it again, or {prepare_again(self.storage.root)}"
            )
        with self.storage.open(sidecar) as file:
            samples: Int64s = np.lib.format.read_array(file)
        return samples

    def _samples(self, file: BinaryIO) -> Int64s:
        """Returns what a sidecar would hold of a tar of 0.1.0, by that version's rules."""
        rows = []
        for key, files in list_records(file).records:
            image = next((suffix for suffix in SUFFIXES_1 if suffix in files), None)
            if image is None:
                continue
            label = None
            if self.labeled:
                with contextlib.suppress(ValueError):  # it is damaged, like one that is absent
                    label = plain_label(label_of(key, files, self.label, file))
            known = label is not None and label.isdecimal()
            rows.append((*files[image], int(label or 0) if known else UNLABELED))
        return np.array(rows, np.int64).reshape(-1, 3)

    def _array_places(self, file: BinaryIO, total: int) -> list[tuple[int, int] | str]:
        records: dict[str, dict[str, tuple[int, int]]] = {}
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                records.setdefault(key, {})[extension] = member.offset_data, member.size
        places: list[tuple[int, int] | str] = []
        for number, members in enumerate(records.values()):
            n = min(self.split.block, total - number * self.split.block)
            try:
                images = _array_start(file, members, "images.npy", (n, *self.image_hwc), "u1")
                labels = 0
                if self.labeled:
                    labels = _array_start(file, members, "labels.npy", (n,), "<i8")
                places.append((images, labels))
            except ValueError as error:
                places.append(str(error))
        return places


class Cursor:
    """A position in a split's shards: the shard that was read last stays open."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._shard = -1
        self._file: io.BufferedReader | None = None
        self._places: Places = []

    def read(self, piece: Piece, buffer: Buffer, row: int = 0) -> list[int]:
        """Reads a piece into the buffer's rows from `row` on; returns the rows that are damaged."""
        try:
            file = self._open(piece.shard)
            places = np.arange(piece.first, piece.first + piece.samples)
            buffer.ids[row : row + piece.samples] = self._reader.first_ids[piece.shard] + places
            if isinstance(buffer.images, list):
                return self._read_encoded(file, piece, buffer.images, buffer, row)
            return self._read_packed(file, piece, buffer.images, buffer, row)
        except (tarfile.TarError, ValueError, EOFError, OSError) as error:
            self.close()
            raise self._reader.unreadable(piece.shard, error) from None

    def close(self) -> None:
        """Closes the shard that is open."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self, shard: int) -> io.BufferedReader:
        if self._file is None or self._shard != shard:
            self.close()
            file = self._reader.storage.open(self._reader.split.shards[shard])
            self._places = self._reader.places(shard, file)
            self._file, self._shard = file, shard
        return self._file

    def _read_encoded(
        self, file: BinaryIO, piece: Piece, images: list[bytes], buffer: Buffer, row: int
    ) -> list[int]:
        reader, damaged = self._reader, list[int]()
        assert isinstance(self._places, np.ndarray)
        samples = self._places[piece.first : piece.first + piece.samples].tolist()
        for offset, size, label in samples:
            file.seek(offset)
            images[row] = file.read(size)
            if len(images[row]) != size:
                raise EOFError("the file ends within an image")
            if reader.labeled:
                try:
                    buffer.labels[row] = reader.check_label(label)
                except ValueError as error:
                    reader.skip(int(buffer.ids[row]), error)
                    damaged.append(row)
            row += 1
        return damaged

    def _read_packed(
        self, file: io.BufferedReader, piece: Piece, images: Bytes, buffer: Buffer, row: int
    ) -> list[int]:
        reader, damaged = self._reader, list[int]()
        block, first, end = reader.split.block, piece.first, row + piece.samples
        while row < end:
            record, inside = divmod(first, block)
            rows = slice(row, row + min(block - inside, end - row))
            place = self._places[record]
            try:
                if isinstance(place, str):
                    raise ValueError(place)
                images_start, labels_start = place
                _read_into(images[rows], file, images_start + inside * images[0].nbytes)
                if reader.labeled:
                    labels = buffer.labels[rows]
                    _read_into(labels, file, labels_start + inside * labels.itemsize)
                    reader.check_label(labels.min())
                    reader.check_label(labels.max())
            except ValueError as error:
                reader.skip(int(buffer.ids[row]), error)
                damaged += range(rows.start, rows.stop)
            first += rows.stop - row
            row = rows.stop
        return damaged


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


def _array_start(
    file: BinaryIO,
    members: dict[str, tuple[int, int]],
    name: str,
    shape: tuple[int, ...],
    dtype: str,
) -> int:
    """Returns where in the tar the data of the .npy file `name` begin.

    `members`: first byte and size of the record's files, by extension. Raises ValueError unless the
    file holds an array of this shape and type, and no more.
    """
    if name not in members:
        raise ValueError(f"it has no {name}")
    start, size = members[name]
    file.seek(start)
    if file.read(8) != b"\x93NUMPY\x01\x00":
        raise ValueError("not a .npy file of version 1.0")
    actual_shape, fortran_order, actual_dtype = np.lib.format.read_array_header_1_0(file)
    if (actual_shape, fortran_order, actual_dtype) != (shape, False, np.dtype(dtype)):
        raise ValueError(
            f"array of shape {actual_shape} and type {actual_dtype}, expected {shape} {dtype}"
        )
    data = file.tell()
    if start + size - data != math.prod(shape) * actual_dtype.itemsize:
        raise ValueError(f"array of {start + size - data} bytes, too few or too many for {shape}")
    return data


def _read_into(out: NDArray[Any], file: io.BufferedReader, start: int) -> None:
    """Fills `out` with the file's bytes from `start` on."""
    file.seek(start)
    if file.readinto(out.view(np.uint8).reshape(-1).data) != out.nbytes:
        raise EOFError("the file ends within a record")
