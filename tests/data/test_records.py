"""Records of tars: the same as webdataset's, from any offset, and damage that is never missed."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from webdataset.tariterators import group_by_keys, tar_file_iterator
from webdataset.writer import TarWriter

from sgan_dist.data.images import SUFFIXES
from sgan_dist.data.records import Place, image_of, label_of, list_records, plain_label
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
    listing = list_records(io.BytesIO(data))
    return [
        (
            key,
            {name: data[place.offset : place.offset + place.size] for name, place in files.items()},
        )
        for key, files in listing.records
    ]


def adjacent(found: Records) -> Records:
    """Webdataset's records without the files of macOS, those of one key joined where they can be."""
    records: Records = []
    for key, every in found:
        of_macos = "_" if key[-1:] in ("", "/") else "no extension"
        files = {name: data for name, data in every.items() if not name.startswith(of_macos)}
        if not files:
            continue
        last = next((r for r in reversed(records) if r[0] == key), None)
        if last is not None and not last[1].keys() & files.keys():
            last[1].update(files)
        else:
            records.append((key, files))
    return records


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
    expected = adjacent(by_webdataset(data))
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


def link(kind: bytes, name: str, target: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def test_devices_are_ignored_and_symbolic_links_counted() -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as out:
        for number, kind in enumerate((tarfile.SYMTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE)):
            out.addfile(link(kind, f"{number}.png", "other.png"))
            info = tarfile.TarInfo(f"{number}.txt")
            info.size = 3
            out.addfile(info, io.BytesIO(b"abc"))
    data = buffer.getvalue()
    assert by_us(data) == by_webdataset(data)
    assert [list(files) for _, files in by_us(data)] == [["txt"]] * 3
    listing = list_records(io.BytesIO(data))
    assert listing.ignored.total() == 1 and list(listing.examples.values()) == ["0.png"]


def test_hard_links_are_the_files_they_link_to(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as out:
        info = tarfile.TarInfo("a/0.png")
        info.size = 3
        out.addfile(info, io.BytesIO(b"abc"))
        out.addfile(link(tarfile.LNKTYPE, "a/1.png", "a/0.png"))
    assert by_us(buffer.getvalue()) == [("a/0", {"png": b"abc"}), ("a/1", {"png": b"abc"})]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as out:
        out.addfile(link(tarfile.LNKTYPE, "1.png", "0.png"))
    with pytest.raises(ValueError, match=r"1.png is a hard link to 0.png.*--hard-dereference"):
        by_us(buffer.getvalue())


def test_files_of_macos_are_passed_over() -> None:
    files = [("._0.png", b"m"), ("d/._0.png", b"m"), ("d/0.png", b"p"), ("d/.DS_Store", b"m")]
    data = tar_bytes([*files, ("d/._0.cls", b"m"), ("d/0.cls", b"1")])
    assert by_us(data) == [("d/0", {"png": b"p", "cls": b"1"})]
    assert list_records(io.BytesIO(data)).ignored == {"files that macOS adds": 4}


def test_files_of_a_record_need_not_be_adjacent() -> None:
    names = [f"{n}.png" for n in range(3)] + [f"{n}.cls" for n in range(3)]
    data = tar_bytes([(name, name.encode()) for name in names])
    assert by_us(data) == [(f"{n}", {"png": b"%d.png" % n, "cls": b"%d.cls" % n}) for n in range(3)]


def test_tars_that_are_joined_are_all_read() -> None:
    """Their records may have the same keys."""
    first, second = (tar_bytes([(f"{n}.png", text) for n in range(3)]) for text in (b"a", b"b"))
    third = tar_bytes([("0.cls", b"1")])
    expected = [(f"{n}", {"png": text}) for text in (b"a", b"b") for n in range(3)]
    for data in (first + second, first + bytes(512 * 50) + second, first.rstrip(b"\0")):
        padded = data + bytes(-len(data) % 512)
        assert (
            by_us(padded) == expected[: 3 if data is not first + second and b"b" not in data else 6]
        )
    assert by_us(first + third)[3:] == [("0", {"cls": b"1"})]


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
        expected = records_or_refusal(by_webdataset, data)
        if isinstance(expected, list):
            assert by_us(data) == adjacent(expected)
        elif not any("._" in name for name in names):
            assert records_or_refusal(by_us, data) == "refused"


def test_two_files_of_a_record_with_one_extension_are_refused() -> None:
    for files in (["0.png", "0.png"], ["0.png", "0.PNG"], ["0.png", "0.cls", "0.png"]):
        data = tar_bytes([(name, b"x") for name in files])
        assert records_or_refusal(by_webdataset, data) == "refused"
        with pytest.raises(ValueError, match="two files png of record 0"):
            by_us(data)


def test_the_image_of_a_record() -> None:
    assert image_of({"cls": 0, "jpg": 0}) == "jpg"
    assert image_of({"seg.png": 0, "json": 0}) is None
    assert [image_of({suffix: 0}) for suffix in SUFFIXES] == list(SUFFIXES)
    with pytest.raises(ValueError, match="two images, png and jpg: choose one with --image png"):
        image_of({"jpg": 0, "png": 0})
    assert image_of({"jpg": 0, "png": 0}, "jpg") == "jpg"
    assert image_of({"input.png": 0}, "input.png") == "input.png"
    assert image_of({"jpg": 0}, "png") is None


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
    with pytest.raises(ValueError, match="no tar header at byte 2048"):
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


@pytest.mark.parametrize("junk", [b"garbage", b"garbage" * 300])
def test_what_follows_the_end_and_is_no_tar_is_counted(junk: bytes) -> None:
    data = tar_bytes([("0.png", b"x")], tarfile.USTAR_FORMAT) + junk
    assert by_us(data) == [("0", {"png": b"x"})]
    assert list_records(io.BytesIO(data)).ignored.total() == 1


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


def test_sparse_files_are_refused() -> None:
    with pytest.raises(ValueError, match="sparse"):
        by_us(one_header(b"a.png", 0, b"S"))


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
        for record in list_records(io.BytesIO(data)).records:
            assert record.files
    except ValueError as error:
        assert str(error)


def test_any_headers_with_right_checksums_give_records_or_a_value_error() -> None:
    for kind in range(256):
        for size in (0, 5, 512, 600):
            data = one_header(b"a.png", size, bytes([kind])) + b"12 path=x.y\n".ljust(1024, b"\0")
            records_or_refusal(by_us, data + one_header(b"b.png", 0))


def label(content: bytes, place: str, key: str = "0") -> Any:
    extension = place.partition(":")[0]
    files = {} if place == "folder" else {extension: Place(2, len(content))}
    return label_of(key, files, place, io.BytesIO(b"xx" + content + b"yy"))


def test_labels_of_files_and_folders() -> None:
    assert label(b"7", "cls") == "7"
    assert label(b" cat\n", "output.txt") == "cat"
    assert label(b"", "folder", "train/cat/0001") == "cat"
    assert label(b"", "folder", "0001") is None
    assert label_of("0", {}, "cls", io.BytesIO()) is None
    with pytest.raises(ValueError, match="not UTF-8"):
        label(b"\xff", "cls")


def test_labels_of_json_files() -> None:
    content = json.dumps({"label": 3, "a": {"b": {"c": 0}}, "a.b": "flat", "none": None}).encode()
    assert label(content, "json:label") == 3
    assert label(content, "json:a.b.c") == 0
    assert label(content, "json:a.b") == "flat"
    for key in ("absent", "a.x", "label.x", "a.b.c.d", "none"):
        assert label(content, f"json:{key}") is None
    for data in (b"", b"{", b"\xff", b"[" * 100_000, b'{"label": 1' + b"0" * 5000 + b"}"):
        with pytest.raises(ValueError, match="not valid JSON"):
            label(data, "json:label")


def test_labels_as_text() -> None:
    values = [4, 4.0, "4", " 4 ", [4], ["4"]]
    assert [plain_label(value) for value in values] == ["4"] * len(values)
    assert [plain_label(value) for value in (None, "", " ", float("nan"))] == [None] * 4
    assert plain_label(0.5) == "0.5" and plain_label("a cat") == "a cat"
    for odd in (True, {"a": 1}, [1, 2], []):
        with pytest.raises(ValueError, match="is no label"):
            plain_label(odd)
