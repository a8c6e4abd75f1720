"""Records of WebDataset tars: files of one key, and where each lies in the tar.

Tars are parsed when they are indexed, by `tarfile`; training reads images by their place. The key rule
is that of the webdataset library: a key is a path up to the first dot of its last part.
"""

from __future__ import annotations

import json
import math
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from sgan_dist.data.images import SUFFIXES

BLOCK = tarfile.BLOCKSIZE
UNLABELED = -1  # in place of a class number
SUFFIXES_1 = ("png", "jpg", "jpeg", "webp")  # the images of indexes of decode version 1, best first

_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd
_NO_SAMPLE = re.compile(r"__[^/]*__($|/)")
_KEY_AND_EXTENSION = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")


class Place(NamedTuple):
    """Where a file's content lies in its tar, in bytes."""

    offset: int
    size: int


class Record(NamedTuple):
    """The files of one key, by extension, in lower case: what webdataset calls a sample."""

    key: str
    files: dict[str, Place]


@dataclass
class Listing:
    """What a tar holds: records, in the order of their first files, and what is passed over.

    `ignored` counts files that are no part of a record, by reason; `examples` has the first of each.
    """

    records: list[Record] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def ignore(self, reason: str, name: str) -> None:
        self.ignored[reason] += 1
        self.examples.setdefault(reason, name)


def list_records(file: BinaryIO) -> Listing:
    """Reads the headers of a plain tar.

    Files of a record need not be adjacent. After a tar's end another may follow, as `cat` joins them,
    with the same keys for other records. A hard link is the file that it links to. What macOS adds to
    tars (`._NAME`) is passed over, and so are symbolic links.

    Raises:
        ValueError: the tar is damaged, cut off inside a file, compressed or not a tar, or a record has
            two files with the same extension; one short reason.
    """
    listing = Listing()
    records: dict[str, Record] = {}
    tar, latest = -1, None
    for number, name, place in _members(file, listing):
        if number != tar:
            tar, records = number, {}
        match = _KEY_AND_EXTENSION.match(name)
        if match is None or _NO_SAMPLE.match(name):
            continue
        key, extension = match[1], match[2].lower()
        record = records.get(key)
        if record is not None and extension in record.files:
            if record is latest:
                raise ValueError(f"two files {extension} of record {key}")
            record = None  # as in webdataset, another record of the same key
        if record is None:
            record = records[key] = Record(key, {})
            listing.records.append(record)
        record.files[extension] = place
        latest = record
    return listing


def image_of(
    files: Mapping[str, object], image: str | None = None, suffixes: Sequence[str] = SUFFIXES
) -> str | None:
    """Returns the extension of a record's image, None if it has none.

    Args:
        files: the record's files.
        image: the extension that images have; None takes the one that is of an image format.
        suffixes: the extensions of image formats.

    Raises:
        ValueError: the record has two images and `image` is not given.
    """
    if image is not None:
        return image if image in files else None
    images = [suffix for suffix in suffixes if suffix in files]
    if len(images) > 1:
        raise ValueError(
            f"it holds two images, {images[0]} and {images[1]}: choose one with --image {images[0]}"
        )
    return images[0] if images else None


def label_of(key: str, files: Mapping[str, Place], label: str, file: BinaryIO) -> Any:
    """Returns a record's label as it is written, None if there is none.

    Args:
        key: of the record.
        files: the record's files.
        label: where labels are: an extension, such as `cls`; `json:KEY`, in the record's json, where
            dots in KEY may lead into nested objects; `folder`, the folder that the record lies in.
        file: the tar.

    Raises:
        ValueError: it cannot be read; one short reason.
    """
    if label == "folder":
        return os.path.basename(os.path.dirname(key)) or None  # noqa: PTH119, PTH120 - no path here
    extension, _, path = label.partition(":")
    if extension not in files:
        return None
    file.seek(files[extension].offset)
    data = file.read(files[extension].size)
    if not path:
        try:
            return data.decode().strip()
        except UnicodeDecodeError:
            raise ValueError(f"{extension} is not UTF-8 text") from None
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        raise ValueError(f"{extension} is not valid JSON") from None
    if isinstance(value, dict) and path in value:
        return value[path]
    for part in path.split("."):
        if not isinstance(value, dict):
            return None
        value = value.get(part)
    return value


def plain_label(value: object) -> str | None:
    """Returns a label as text; None for None, NaN and an empty text, which are no label.

    4.0 is 4, and a label alone in a list is that label. Raises ValueError for what is no label.
    """
    if isinstance(value, (list, tuple, np.ndarray)) and len(value) == 1:
        value = value[0]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, (str, int, float)) or isinstance(value, bool):
        raise ValueError(f"{str(value)[:30]!r} is no label: give a class number or name")
    text = str(value).strip()
    return text or None


def _members(file: BinaryIO, listing: Listing) -> Iterator[tuple[int, str, Place]]:
    """Yields (number of the tar in the file, name, place) of each regular file and hard link."""
    total = file.seek(0, os.SEEK_END)
    file.seek(0)
    if not (start := file.read(BLOCK)):
        raise ValueError("an empty file, not a tar")
    if start.startswith(_COMPRESSED):
        raise ValueError("compressed: unpack it, only plain tars can be read from any offset")
    position, number, ended = 0, 0, False
    while position < total:
        begin = position
        places: dict[str, Place] = {}
        file.seek(begin)
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    tar.members = []  # type: ignore[attr-defined]  # else it keeps them all
                    place = _place(member, places, listing, total)
                    if place is not None:
                        places[member.name] = place
                        yield number, member.name, place
                position = tar.offset
        except (tarfile.TarError, OverflowError, IndexError, EOFError) as error:
            start_of = "" if places or begin else "not a tar: "
            raise ValueError(f"{start_of}damaged or cut off: {error}") from None
        after = _after_zeros(file, position, total)
        if position == begin and after == begin:
            if not ended:
                raise ValueError(f"damaged or cut off: no tar header at byte {position}")
            listing.ignore("parts behind the end of a tar", f"byte {position}")
            return
        if after == position < total:
            raise ValueError(f"damaged or cut off: no tar header at byte {position}")
        ended = after > position
        position, number = after, number + 1


def _place(
    member: tarfile.TarInfo, places: Mapping[str, Place], listing: Listing, total: int
) -> Place | None:
    """Returns where a member's content lies, None if it is passed over."""
    last = member.name.rpartition("/")[2]
    if member.size < 0:
        raise ValueError(f"damaged: the size {member.size} of {member.name}")
    if member.issparse():
        raise ValueError("a sparse file: write the tar without --sparse")
    if last.startswith("._") or last == ".DS_Store":
        listing.ignore("files that macOS adds", member.name)
        return None
    if member.islnk():
        target = places.get(member.linkname)
        if target is None:
            raise ValueError(
                f"{member.name} is a hard link to {member.linkname}, which is not before it in the"
                " tar: write the tar with --hard-dereference"
            )
        return target
    if member.issym():
        listing.ignore("symbolic links (tar --dereference stores the files)", member.name)
        return None
    if not member.isreg():
        return None
    end = member.offset_data + member.size
    if end + -member.size % BLOCK > total:
        raise ValueError(
            f"cut off: the file ends inside the {member.size} bytes at {member.offset_data}"
        )
    return Place(member.offset_data, member.size)


def _after_zeros(file: BinaryIO, position: int, total: int) -> int:
    """Returns the first block from `position` on that is not all zeros, or the end."""
    file.seek(position)
    while position < total:
        data = file.read(2048 * BLOCK)
        if data.count(0) == len(data):
            position += len(data)
            continue
        first = len(data) - len(data.lstrip(b"\0"))
        return position + first // BLOCK * BLOCK
    return total
