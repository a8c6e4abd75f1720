"""Records of WebDataset tars: consecutive files of one key, as the webdataset library groups them.

Read by a small parser of tar headers: `tarfile` takes some 15 times as long over small files, and
takes a damaged header in mid-file for the end of the archive.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Iterator, Mapping
from typing import BinaryIO, NamedTuple

from sgan_dist.data.images import SUFFIXES

BLOCK = 512  # bytes; headers are one, and files fill whole ones

# types of members, as bytes of their headers
_REGULAR = b"0\x007"
_DATALESS = b"123456"  # links, devices, directories: nothing follows, whatever the size says
_SPARSE = ord("S")
_EXTRA = b"LKxXg"  # GNU's long names; pax fields of the next member, or of all (g)
_PAX_NEEDED = re.compile(rb" (?:path|size|GNU\.sparse\.[^=]*)=")
_PAX_FIELD = re.compile(rb"([0-9]{1,9}) ([^=]+)=")
_ZEROS = bytes(BLOCK)
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd
_NO_SAMPLE = re.compile(r"__[^/]*__($|/)")
_KEY_AND_EXTENSION = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")


class Record(NamedTuple):
    """Consecutive files with the same key: what webdataset calls a sample.

    `files` maps extensions, in lower case, to contents. `offset` is the byte at which the first
    file's header starts (the extra headers of a long name included), `end` the byte after the last
    file, so that reading from either of them finds whole records.
    """

    key: str
    offset: int
    end: int
    files: dict[str, bytes]


def records(file: BinaryIO, offset: int = 0) -> Iterator[Record]:
    """The records of a plain tar from byte `offset` on, which must be where a record starts.

    As in webdataset, a key is a path up to the first dot of its last part; directories, links,
    `__name__` files at the top and files without an extension are passed over. One record at a
    time is held in memory.

    Raises:
        ValueError: the file is damaged, cut in the middle of a file, compressed or no tar, or a
            record has two files of the same extension; one short reason.
    """
    key: str | None = None
    files: dict[str, bytes] = {}
    start = end = offset
    for name, data, first, last in _members(file, offset):
        match = _KEY_AND_EXTENSION.match(name)
        if match is None or _NO_SAMPLE.match(name):
            continue
        prefix, extension = match[1], match[2].lower()
        if prefix != key:
            if key is not None:
                yield Record(key, start, end, files)
            key, files, start = prefix, {}, first
        if extension in files:
            raise ValueError(f"two files {extension} of record {prefix}")
        files[extension] = data
        end = last
    if key is not None:
        yield Record(key, start, end, files)


def samples(file: BinaryIO, offset: int = 0) -> Iterator[Record]:
    """Those of `records` that count as samples: they have an image.

    Others are passed over, such as img2dataset's of failed downloads, which have a json alone.
    """
    return (record for record in records(file, offset) if image_of(record.files) is not None)


def image_of(files: Mapping[str, bytes]) -> tuple[str, bytes] | None:
    """(extension, content) of a record's image: the first of SUFFIXES that it has, or None."""
    for suffix in SUFFIXES:
        if suffix in files:
            return suffix, files[suffix]
    return None


def label_of(files: Mapping[str, bytes], label: str) -> int:
    """A record's class number, 0 or more, from where the index says that it is.

    Args:
        files: the record's files.
        label: `cls`, a file of digits; or `json:KEY`, a whole number in the record's json, where a
            KEY with dots leads into nested objects.

    Raises:
        ValueError: there is none, for one short reason.
    """
    extension, _, path = label.partition(":")
    if extension not in files:
        raise ValueError(f"no {extension} file, which the label is read from")
    data = files[extension]
    if not path:
        text = data.strip()
        if not text.isdigit():
            raise ValueError(f"{extension} holds {_shown(text)}, not a class number")
        return int(text)
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        raise ValueError(f"{extension} is not valid JSON") from None
    for part in path.split("."):
        if not isinstance(value, dict) or part not in value:
            raise ValueError(f"{extension} has no key {path}")
        value = value[part]
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{extension} holds {_shown(value)} at {path}, not a class number")
    return value


def _shown(value: object) -> str:
    text = value.decode(errors="replace") if isinstance(value, bytes) else json.dumps(value)
    return repr(text if len(text) <= 30 else text[:30] + "...")


def _members(file: BinaryIO, position: int) -> Iterator[tuple[str, bytes, int, int]]:
    """(name, content, start of its headers, end of its last block) of a tar's regular files."""
    total = file.seek(0, os.SEEK_END)
    file.seek(position)
    block = file.read(BLOCK)
    if position == 0 and not block:
        raise ValueError("an empty file, not a tar")
    if position == 0 and block.startswith(_COMPRESSED):
        raise ValueError("compressed: unpack it, only plain tars can be read from the middle")
    start = position  # of the member's headers
    name: str | None = None  # from an extra header before the member's own, as the size below
    size: int | None = None
    # a block of zeros ends a tar; some programs write none
    while position < total and block != _ZEROS:
        own_size = checked_size(block, position)
        kind = block[156]
        if kind == _SPARSE:
            raise ValueError("a sparse file: write the tar without --sparse")
        extra = kind in _EXTRA
        length = own_size if extra or size is None else size
        if kind in _DATALESS or (kind == 0 and block[:100].rstrip(b"\0").endswith(b"/")):
            length = 0
        padding = -length % BLOCK
        position += BLOCK
        if position + length + padding > total:
            raise ValueError(f"cut off: the file ends inside the {length} bytes at {position}")
        regular = kind in _REGULAR
        if extra or regular:
            data = file.read(length)
        else:
            file.seek(position + length)
        rest = file.read(padding + BLOCK)  # the next header with it, which saves a read
        position += length + padding
        if extra:
            pax_name, pax_size = _extra(kind, data)
            # of several extra headers the first counts, as in tarfile
            name = pax_name if name is None else name
            size = pax_size if size is None else size
        else:
            if regular:
                yield name if name is not None else _name(block), data, start, position
            start, name, size = position, None, None
        block = rest[padding:]
    if start != position:
        raise ValueError("cut off: a header without its file at the end")


def checked_size(block: bytes, position: int) -> int:
    """The size that a header, read at byte `position`, states; ValueError for a wrong checksum."""
    try:
        if len(block) == BLOCK:
            stated = _number(block[148:156])
            # the sum of all bytes, modulo 65521, 20 times faster than by sum(); in it the
            # checksum's own bytes count as blanks, and some programs take bytes as signed
            total = (zlib.adler32(block) & 0xFFFF) - 1 - sum(block[148:156]) + 8 * 32
            if (stated - total) % 65521 == 0 or (stated - total + 256 * _upper(block)) % 65521 == 0:
                size = _number(block[124:136])
                if size >= 0:
                    return size
    except ValueError:
        pass
    if position == 0:
        raise ValueError("not a tar")
    raise ValueError(f"damaged or cut off: no tar header at byte {position}")


def _upper(block: bytes) -> int:
    """How many bytes, the checksum's own left out, are negative when taken as signed."""
    return sum(byte > 127 for byte in block[:148] + block[156:])


def _number(field: bytes) -> int:
    """A number of a header: octal digits, or big-endian behind a byte of 0x80 (or 0xff: negative).

    ValueError where it is neither.
    """
    if field[0] in (0x80, 0xFF):
        negative = int(field[0] == 0xFF) << 8 * (len(field) - 1)
        return int.from_bytes(field[1:], "big") - negative
    return int(field.partition(b"\0")[0].strip() or b"0", base=8)


def _name(block: bytes) -> str:
    name, prefix = _text(block[:100]), _text(block[345:500])
    return f"{prefix}/{name}" if prefix else name


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _extra(kind: int, data: bytes) -> tuple[str | None, int | None]:
    """The name and size that an extra header gives to the member after it."""
    if kind == ord("L"):
        return _text(data), None
    if kind == ord("K") or not _PAX_NEEDED.search(data):
        return None, None
    fields: dict[bytes, bytes] = {}
    at = 0
    while at < len(data):
        match = _PAX_FIELD.match(data, at)
        end = at + int(match[1]) if match else 0
        if match is None or end <= match.end() or data[end - 1 : end] != b"\n":
            raise ValueError("damaged tar: a pax header that cannot be read")
        fields[match[2]] = data[match.end() : end - 1]
        at = end
    if any(field.startswith(b"GNU.sparse.") for field in fields):
        raise ValueError("a sparse file: write the tar without --sparse")
    path, size = fields.get(b"path"), fields.get(b"size")
    if kind == ord("g") and (path is not None or size is not None):
        raise ValueError("a pax header that names all files alike cannot be read")
    if size is not None and not size.isdigit():
        raise ValueError("damaged tar: a pax header that cannot be read")
    name = None if path is None else path.decode("utf-8", "surrogateescape").rstrip("/")
    return name, None if size is None else int(size)
