"""Records of WebDataset tars: consecutive files of one key, as the webdataset library groups them.

Read by a small parser of tar headers: `tarfile` takes some 15 times as long for small files, and
treats a damaged header in the middle of a file as the end of the archive.
"""

from __future__ import annotations

import contextlib
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
_DATALESS = b"123456"  # links, devices, directories: no data follow, even if a size is stated
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
    file's headers start (those of a long name included), `end` the byte after the last file, so
    that reading from either of them yields whole records.
    """

    key: str
    offset: int
    end: int
    files: dict[str, bytes]


def records(file: BinaryIO, offset: int = 0) -> Iterator[Record]:
    """Yields the records of a plain tar from byte `offset` on, where a record must start.

    As in webdataset, a key is a path up to the first dot of its last part; directories, links,
    `__name__` files at the top and files without an extension are ignored. One record at a time is
    held in memory.

    Raises:
        ValueError: the tar is damaged, cut off inside a file, compressed or not a tar, or a record
            has two files with the same extension; one short reason.
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
    """Yields the records that are samples: those with an image.

    Others are ignored, such as img2dataset's records of failed downloads, which hold only a json.
    """
    return (record for record in records(file, offset) if image_of(record.files) is not None)


def image_of(files: Mapping[str, bytes]) -> tuple[str, bytes] | None:
    """Returns (extension, content) of a record's image, the first of SUFFIXES it has, or None."""
    for suffix in SUFFIXES:
        if suffix in files:
            return suffix, files[suffix]
    return None


def label_of(files: Mapping[str, bytes], label: str) -> int:
    """Returns a record's class number, 0 or more.

    Args:
        files: the record's files.
        label: the index's `label`: `cls`, a file of digits; or `json:KEY`, a whole number in the
            record's json, where dots in KEY lead into nested objects.

    Raises:
        ValueError: there is none; one short reason.
    """
    extension, _, path = label.partition(":")
    if extension not in files:
        raise ValueError(f"no {extension} file, where the label should be")
    data = files[extension]
    if not path:
        text = data.strip()
        if not text.isdigit():
            raise ValueError(f"{extension} holds {_quote(text)}, not a class number")
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
        raise ValueError(f"{extension} holds {_quote(value)} at {path}, not a class number")
    return value


def _quote(value: object) -> str:
    text = value.decode(errors="replace") if isinstance(value, bytes) else json.dumps(value)
    return repr(text if len(text) <= 30 else text[:30] + "...")


def _members(file: BinaryIO, position: int) -> Iterator[tuple[str, bytes, int, int]]:
    """Yields (name, content, start of its headers, end of its last block) of each regular file."""
    total = file.seek(0, os.SEEK_END)
    file.seek(position)
    block = file.read(BLOCK)
    if position == 0 and not block:
        raise ValueError("an empty file, not a tar")
    if position == 0 and block.startswith(_COMPRESSED):
        raise ValueError("compressed: unpack it, only plain tars can be read from any offset")
    start = position  # of the member's headers
    name: str | None = None  # from an extra header before the member's own, like `size`
    size: int | None = None
    # a block of zeros ends a tar; some programs write none
    while position < total and block != _ZEROS:
        own_size = _checked_size(block, position)
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
        rest = file.read(padding + BLOCK)  # and the next header, which saves a read
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


def _checked_size(block: bytes, position: int) -> int:
    """Returns the size in a header at byte `position`; ValueError if its checksum is wrong."""
    with contextlib.suppress(ValueError):
        valid = len(block) == BLOCK and _has_checksum(block)
        if valid and (size := _number(block[124:136])) >= 0:
            return size
    raise ValueError(
        f"damaged or cut off: no tar header at byte {position}" if position else "not a tar"
    )


def _has_checksum(block: bytes) -> bool:
    stated = _number(block[148:156])
    # adler32 has the sum of all bytes modulo 65521, 20 times faster than sum(). The checksum's own
    # bytes count as blanks; some programs sum signed bytes.
    excess = (zlib.adler32(block) & 0xFFFF) - 1 - sum(block[148:156]) + 8 * 32 - stated
    if excess % 65521 == 0:
        return True
    negative = sum(byte > 127 for byte in block[:148] + block[156:])
    return (excess - 256 * negative) % 65521 == 0


def _number(field: bytes) -> int:
    """Returns a header's number: octal digits, or big-endian after a byte 0x80 (0xff: negative).

    Raises ValueError if it is neither.
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
    """Returns the name and size that an extra header gives to the member after it."""
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
        raise ValueError("a pax header that gives all files one name or size cannot be read")
    if size is not None and not size.isdigit():
        raise ValueError("damaged tar: a pax header that cannot be read")
    name = None if path is None else path.decode("utf-8", "surrogateescape").rstrip("/")
    return name, None if size is None else int(size)
