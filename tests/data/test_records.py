"""Records of tars: the same as webdataset's, from any offset, and damage that is never missed."""

from __future__ import annotations

import bz2
import gzip
import io
import itertools
import json
import lzma
import struct
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from webdataset.tariterators import group_by_keys, tar_file_iterator
from webdataset.writer import TarWriter

from sgan_dist.data.records import Record, image_of, label_of, records, samples
from tests.data.datasets import tar_bytes

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


Records = list[tuple[str, dict[str, bytes]]]  # key and files of each


def by_webdataset(data: bytes) -> Records:
    """The records of a tar as the webdataset library reads them."""
    files = ({**item, "__url__": ""} for item in tar_file_iterator(io.BytesIO(data)))
    return [
        (item.pop("__key__"), item)
        for item in group_by_keys(files)
        if item.pop("__url__") is not None
    ]


def by_us(data: bytes) -> Records:
    return [(record.key, record.files) for record in records(io.BytesIO(data))]


def records_or_refusal(read: Callable[[bytes], Records], data: bytes) -> Records | str:
    try:
        return read(data)
    except ValueError:
        return "refused"


def one_header(
    name: bytes,
    size: int,
    kind: bytes = b"0",
    prefix: bytes = b"",
    size_field: bytes | None = None,
) -> bytes:
    """A header block with its checksum."""
    field = size_field or b"%011o\0" % size
    block = bytearray(name.ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + field)
    block += b"00000000000\0" + b" " * 8 + kind
    block = block.ljust(257, b"\0") + b"ustar\00000"
    block = block.ljust(345, b"\0") + prefix
    block = block.ljust(512, b"\0")
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


ODD: list[tuple[str, bytes | None]] = [
    ("000.jpg", b"1"),
    ("000.cls", b"2"),
    ("000.JSON", b"upper case"),
    ("a/b.c/001.seg.png", b"dots in a folder and two in the name"),
    ("a/b.c/001.cls", b""),
    ("folder", None),
    ("a.folder/", None),
    ("a/b.c/001.txt", b"after a directory, the same record"),
    ("README", b"no extension"),
    ("a/README", b"no extension in a folder"),
    ("__meta__", b"ignored"),
    ("__info__.json", b"not ignored: it has a dot"),
    ("__meta__/x.png", b"in a folder of that name"),
    ("__x.png", b"read"),
    ("._000.jpg", b"macOS at the top"),
    ("a/._000.jpg", b"macOS in a folder"),
    ("a/.hidden", b""),
    (".hidden.jpg", b""),
    ("a/", None),
    ("ends.", b"an empty extension"),
    ("träger/größe.png", b"unicode"),
    ("日本語.PNG", b"unicode, upper case"),
    ("x" * 90 + ".png", b"long"),
    ("d" * 60 + "/" + "x" * 60 + ".png", b"longer than 100"),
    ("d" * 60 + "/" + "x" * 60 + ".cls", b"its label"),
    ("d" * 200 + "/" + "é" * 90 + ".png", b"longer than 255"),
    ("new\nline.png", b"x"),
    ("two  spaces.png", b"y" * 511),
    ("two  spaces.cls", b"y" * 512),
    ("two  spaces.txt", b"y" * 513),
    ("000.jpg", b"the first key again, later"),
]


@pytest.mark.parametrize("form", FORMATS)
def test_odd_names_give_the_records_that_webdataset_finds(form: str) -> None:
    files = [(name, content) for name, content in ODD if form != "ustar" or len(name) < 200]
    data = tar_bytes(files, FORMATS[form])
    expected = by_webdataset(data)
    assert len(expected) > 12
    assert by_us(data) == expected


def test_webdatasets_own_tars() -> None:
    options: dict[str, Any]
    for options in ({}, {"mtime": 0}):  # by default it writes the time in pax headers
        buffer = io.BytesIO()
        with TarWriter(buffer, encoder=False, **options) as writer:
            for number in range(20):
                writer.write({"__key__": f"x/{number:04d}", "png": b"p" * number * 40, "cls": b"1"})
        data = buffer.getvalue()
        assert by_us(data) == by_webdataset(data)
        assert len(by_us(data)) == 20


def test_links_and_devices_are_ignored() -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as out:
        kinds = (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, b"Z")
        for number, kind in enumerate(kinds):
            info = tarfile.TarInfo(f"{number}.png")
            info.type, info.linkname = kind, "other.png"
            if kind == b"Z":  # an unknown kind has contents
                info.size = 700
                out.addfile(info, io.BytesIO(b"z" * 700))
            else:
                out.addfile(info)
            info = tarfile.TarInfo(f"{number}.txt")
            info.size = 3
            out.addfile(info, io.BytesIO(b"abc"))
    data = buffer.getvalue()
    assert by_us(data) == by_webdataset(data)
    assert [list(files) for _, files in by_us(data)] == [["txt"]] * 5


names = st.lists(
    st.text(st.sampled_from("ab._/JäÖ"), min_size=1, max_size=12)
    | st.builds("{}/{}.png".format, st.text("dä.", max_size=130), st.text("kö", max_size=130)),
    max_size=8,
)


@settings(deadline=None, max_examples=300)
@given(
    names=names,
    sizes=st.lists(st.sampled_from([0, 1, 511, 512, 513, 3000]), min_size=8, max_size=8),
    form=st.sampled_from(sorted(FORMATS)),
    mtime=st.sampled_from([0, 1.5]),
    end=st.booleans(),
)
def test_any_tar_gives_the_records_that_webdataset_finds(
    names: list[str], sizes: list[int], form: str, mtime: float, end: bool
) -> None:
    files = [
        (name, bytes([65 + at]) * size)
        for at, (name, size) in enumerate(zip(names, sizes, strict=False))
    ]
    try:
        data = tar_bytes(files, FORMATS[form], mtime=mtime)
    except ValueError:  # a name that the format cannot hold
        return
    if not end:
        data = data.rstrip(b"\0")
        data += bytes(-len(data) % 512)
    if data:
        assert records_or_refusal(by_us, data) == records_or_refusal(by_webdataset, data)


def test_two_files_of_a_record_with_one_extension_are_refused() -> None:
    for files in (["0.png", "0.png"], ["0.png", "0.PNG"], ["0.png", "0.cls", "0.png"]):
        data = tar_bytes([(name, b"x") for name in files])
        assert records_or_refusal(by_webdataset, data) == "refused"
        with pytest.raises(ValueError, match="two files png of record 0"):
            by_us(data)


@pytest.mark.parametrize("form", FORMATS)
def test_reading_starts_at_any_records_offset(form: str) -> None:
    files = [(name, content) for name, content in ODD if form != "ustar" or len(name) < 200]
    data = tar_bytes(files, FORMATS[form], mtime=1.5)
    every = list(records(io.BytesIO(data)))
    file = io.BytesIO(data)
    for number, record in enumerate(every):
        assert isinstance(record, Record)
        assert list(records(file, record.offset)) == every[number:]
        assert list(records(file, record.end)) == every[number + 1 :]
        # a record's bytes include all of its headers
        assert by_us(data[record.offset : record.end]) == [(record.key, record.files)]
    assert all(a.end <= b.offset for a, b in itertools.pairwise(every))
    assert list(records(file, len(data))) == []


def test_samples_are_the_records_with_an_image() -> None:
    files = [("0.jpg", b""), ("0.json", b""), ("1.json", b""), ("2.png", b""), ("3.webp", b"")]
    files += [("4.jpeg", b""), ("5.seg.png", b""), ("6.gif", b""), ("7.JPG", b"")]
    data = tar_bytes(files)
    assert [record.key for record in samples(io.BytesIO(data))] == ["0", "2", "3", "4", "7"]
    second = list(samples(io.BytesIO(data)))[1]
    assert next(samples(io.BytesIO(data), second.offset)) == second


def test_image_of_takes_the_first_suffix_that_is_present() -> None:
    assert image_of({"cls": b"1", "jpg": b"a", "png": b"b"}) == ("png", b"b")
    assert image_of({"webp": b"a"}) == ("webp", b"a")
    assert image_of({"seg.png": b"a", "PNG": b"a"}) is None


@pytest.mark.parametrize("form", FORMATS)
def test_a_tar_that_ends_inside_a_file_is_refused(form: str) -> None:
    long = "d" * 70 + "/" + "x" * 60
    files = [("0.png", b"a" * 700), ("0.cls", b"1"), (long + ".png", b"b" * 512), ("2.png", b"")]
    data = tar_bytes(files, FORMATS[form], mtime=1.5).rstrip(b"\0")
    data += bytes(-len(data) % 512)
    whole = by_us(data)
    ends = set()
    with tarfile.open(fileobj=io.BytesIO(data)) as opened:
        for info in opened:
            ends.add(info.offset_data + -(-info.size // 512) * 512)
    for length in range(1, len(data)):
        if length in ends:  # a tar without the zeros at its end, which some programs omit
            names = [name for _, record in by_us(data[:length]) for name in record]
            assert len(names) < sum(len(record) for _, record in whole)
        else:
            with pytest.raises(ValueError):
                by_us(data[:length])


def test_a_damaged_header_is_not_taken_for_the_end() -> None:
    data = tar_bytes([(f"{number}.png", b"x") for number in range(5)], tarfile.USTAR_FORMAT)
    damaged = bytearray(data)
    damaged[2 * 1024] ^= 1
    with tarfile.open(fileobj=io.BytesIO(damaged)) as opened:
        assert len(opened.getnames()) == 2  # tarfile does so
    with pytest.raises(ValueError, match="byte 2048"):
        by_us(bytes(damaged))


@pytest.mark.parametrize(
    "pack", [gzip.compress, bz2.compress, lzma.compress], ids=lambda f: f.__module__
)
def test_compressed_tars_are_refused(pack: Callable[[bytes], bytes]) -> None:
    with pytest.raises(ValueError, match="compressed: unpack"):
        by_us(pack(tar_bytes([("0.png", b"x")])))


@pytest.mark.parametrize(
    "data", [b"x", b"x" * 512, b"PK\x03\x04" * 300, b"\0" * 511 + b"x"], ids=len
)
def test_what_is_no_tar_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"not a tar|cut off"):
        by_us(data)


def test_an_empty_file_is_refused_and_an_empty_tar_is_not() -> None:
    with pytest.raises(ValueError, match="empty"):
        by_us(b"")
    assert by_us(tar_bytes([])) == []


def test_after_the_end_nothing_is_read() -> None:
    data = tar_bytes([("0.png", b"x")], tarfile.USTAR_FORMAT)
    assert by_us(data + b"garbage") == [("0", {"png": b"x"})]


def test_names_split_over_prefix_and_name() -> None:
    data = one_header(b"y.png", 3, prefix=b"some/folder") + b"abc".ljust(512, b"\0")
    assert by_us(data) == by_webdataset(data) == [("some/folder/y", {"png": b"abc"})]


def test_sizes_that_are_binary_or_blank() -> None:
    binary = b"\x80" + (700).to_bytes(11, "big")
    data = one_header(b"a.png", 0, size_field=binary) + b"a" * 1024
    data += one_header(b"b.png", 0, size_field=b"       1234\0") + b"b" * 1024
    data += one_header(b"c.png", 0, size_field=b"\0" * 12)
    assert by_us(data) == by_webdataset(data)
    assert [len(files["png"]) for _, files in by_us(data)] == [700, 0o1234, 0]


@pytest.mark.parametrize(
    "field",
    [b"\xff" * 12, b"\x80" + b"\xff" * 11, b"zzzzzzzzzzz\0", b"77777777777\0"],
    ids=["negative", "huge", "letters", "8 GiB"],
)
def test_impossible_sizes_are_refused(field: bytes) -> None:
    for kind in (b"0", b"5", b"x", b"L", b"Z"):
        data = one_header(b"a.png", 0, kind, size_field=field) + b"a" * 1024
        if kind == b"5" and field in (b"77777777777\0", b"\x80" + b"\xff" * 11):
            continue  # a directory has no contents, even if its header states a size
        with pytest.raises(ValueError):
            by_us(data)


def test_directories_of_the_first_tars() -> None:
    """They have the type of a file and a name that ends in a slash; no contents follow."""
    data = one_header(b"a.png/", 600, b"\0") + one_header(b"b.png", 3, b"\0") + b"b".ljust(512)
    assert by_us(data) == by_webdataset(data) == [("b", {"png": b"b  "})]


def test_checksums_over_signed_bytes_are_accepted() -> None:
    block = bytearray(one_header("ü.png".encode(), 0))
    signed = sum(byte - 256 * (byte > 127) for byte in block[:148] + b" " * 8 + block[156:])
    block[148:156] = b"%06o\0 " % signed
    assert by_us(bytes(block)) == by_webdataset(bytes(block)) == [("ü", {"png": b""})]


def pax(fields: list[tuple[bytes, bytes]]) -> bytes:
    """The content of a pax header with these fields."""
    body = b""
    for key, value in fields:
        length = len(key) + len(value) + 3
        while len(str(length)) + len(key) + len(value) + 3 != length:
            length = len(str(length)) + len(key) + len(value) + 3
        body += b"%d %s=%s\n" % (length, key, value)
    return body


def with_pax(body: bytes, kind: bytes = b"x") -> bytes:
    """A tar of one file behind a pax header."""
    data = one_header(b"PaxHeader", len(body), kind) + body + bytes(-len(body) % 512)
    return data + one_header(b"a.png", 4) + b"data".ljust(512, b"\0")


def test_pax_names_sizes_and_what_looks_like_them() -> None:
    body = pax([(b"comment", b"a path=b.jpg size=9\n12 path=c.gif"), (b"path", "ö.webp".encode())])
    assert by_us(with_pax(body)) == by_webdataset(with_pax(body)) == [("ö", {"webp": b"data"})]
    body = pax([(b"comment", b" path=x"), (b"size", b"2"), (b"linkpath", b"z.cls")])
    assert by_us(with_pax(body)) == by_webdataset(with_pax(body)) == [("a", {"png": b"da"})]
    body = pax([(b"path", b"x.png")])
    extra = one_header(b"././@LongLink", 6, b"L") + b"l.webp".ljust(512, b"\0")
    for data in (extra + with_pax(body), with_pax(body)[:1024] + extra + with_pax(body)[1024:]):
        assert by_us(data) == by_webdataset(data)
    assert by_us(with_pax(pax([(b"comment", b"of git")]), b"g")) == [("a", {"png": b"data"})]


@pytest.mark.parametrize(
    "body",
    [
        b"99 path=x\n",
        b" path=x\n",
        b"0 path=x\n",
        b"3 path=x\n",
        b"9 path=xyz\n",
        pax([(b"size", b"x")]),
        pax([(b"size", b"-4")]),
        pax([(b"size", b"9" * 30)]),
        pax([(b"GNU.sparse.major", b"1")]),
    ],
    ids=range(9),
)
def test_pax_headers_that_cannot_be_read_are_refused(body: bytes) -> None:
    with pytest.raises(ValueError, match=r"pax header|sparse|cut off"):
        by_us(with_pax(body))


def test_what_is_not_supported_is_refused() -> None:
    with pytest.raises(ValueError, match="pax header"):
        by_us(with_pax(pax([(b"path", b"x.png")]), b"g"))
    with pytest.raises(ValueError, match="sparse"):
        by_us(one_header(b"a.png", 0, b"S"))
    with pytest.raises(ValueError, match="without its file"):
        by_us(one_header(b"././@LongLink", 5, b"L") + b"x.png".ljust(512, b"\0"))


@settings(deadline=None, max_examples=500)
@given(
    form=st.sampled_from(sorted(FORMATS)),
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), max_size=4),
    keep=st.none() | st.floats(0, 1),
)
def test_damage_gives_records_or_a_value_error(
    form: str, flips: list[tuple[float, int]], keep: float | None
) -> None:
    long = "d" * 70 + "/" + "x" * 60 + ".png"
    files = [("0.png", b"a" * 700), ("0.cls", b"1"), (long, b"b"), ("2.png", b"")]
    data = bytearray(tar_bytes(files, FORMATS[form], mtime=1.5))
    for place, change in flips:
        data[int(place * len(data))] ^= change
    if keep is not None:
        del data[int(keep * len(data)) :]
    try:
        for record in records(io.BytesIO(data)):
            assert record.files
    except ValueError as error:
        assert str(error)


def test_any_headers_with_right_checksums_give_records_or_a_value_error() -> None:
    for kind in range(256):
        for size in (0, 5, 512, 600):
            data = one_header(b"a.png", size, bytes([kind])) + b"12 path=x.y\n".ljust(1024, b"\0")
            records_or_refusal(by_us, data + one_header(b"b.png", 0))


def test_memory_does_not_grow_with_the_number_of_records(tmp_path: Path) -> None:
    path = tmp_path / "many.tar"

    def peak(count: int) -> int:
        with open(path, "wb") as out, TarWriter(out, encoder=False) as writer:
            for number in range(count):
                writer.write({"__key__": f"{number:06d}", "png": b"p" * 300, "cls": b"1"})
        with open(path, "rb") as file:
            tracemalloc.start()
            try:
                assert sum(1 for _ in records(file)) == count
                return tracemalloc.get_traced_memory()[1]
            finally:
                tracemalloc.stop()

    peak(10)
    assert peak(2000) < peak(100) + 10_000


def test_labels_of_cls_files() -> None:
    assert label_of({"cls": b"7"}, "cls") == 7
    assert label_of({"cls": b" 12\n"}, "cls") == 12
    for text in (b"", b"cat", b"-1", b"1.0", b"1 2", "٣".encode(), b"\xff", b"9" * 5000):
        with pytest.raises(ValueError):
            label_of({"cls": text}, "cls")
    with pytest.raises(ValueError, match="no cls file"):
        label_of({"png": b""}, "cls")


def test_labels_of_json_files() -> None:
    content = {"label": 3, "a": {"b": {"c": 0}}, "text": "3", "yes": True, "half": 0.5, "less": -1}
    files = {"json": json.dumps(content).encode()}
    assert label_of(files, "json:label") == 3
    assert label_of(files, "json:a.b.c") == 0
    for key in ("text", "yes", "half", "less", "a"):
        with pytest.raises(ValueError, match="not a class number"):
            label_of(files, f"json:{key}")
    for key in ("absent", "a.x", "label.x", "a.b.c.d"):
        with pytest.raises(ValueError, match="no key"):
            label_of(files, f"json:{key}")
    for data in (b"", b"{", b"\xff", b"[" * 100_000, b'{"label": 1' + b"0" * 5000 + b"}"):
        with pytest.raises(ValueError, match="not valid JSON"):
            label_of({"json": data}, "json:label")
    with pytest.raises(ValueError, match="no json file"):
        label_of({"cls": b"1"}, "json:label")


def test_large_contents_come_whole() -> None:
    body = struct.pack(">I", 7) * 250_000
    data = tar_bytes([("0.images.npy", body), ("0.labels.npy", b"x" * 2048)])
    ((key, files),) = by_us(data)
    assert key == "0" and files["images.npy"] == body and len(files["labels.npy"]) == 2048
