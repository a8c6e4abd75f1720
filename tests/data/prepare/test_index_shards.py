"""Indexing foreign tars: what the index holds, what is refused, and what is warned of."""

from __future__ import annotations

import hashlib
import re
import tarfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sgan_dist.cli import main
from sgan_dist.config import RemoteConfig
from sgan_dist.data import known_labels
from sgan_dist.data.index import SPLITS, load_index, sidecar_name
from sgan_dist.data.prepare.foreign import index_shards
from sgan_dist.data.records import list_records
from sgan_dist.errors import UserError
from tests.data.prepare.commands import file_sums
from tests.data.prepare.tars import arguments, classified, downloaded, image, request, write_tar
from tests.servers import BucketServer, gs_server, http_server, s3_server, status

pytestmark = pytest.mark.process


def test_the_index(tars: Path, tmp_path: Path) -> None:
    before = file_sums(tars)
    index = index_shards(**request(tars, tmp_path / "out"))
    assert load_index(tmp_path / "out") == index
    assert file_sums(tars) == before  # the tars are unchanged
    assert index.image_hwc == (8, 12, 3)
    assert (index.source, index.label, index.resize) == ("tars", "cls", "none")
    assert index.class_names == ("0", "1", "2")
    assert [index.split(name).samples for name in SPLITS] == [12, 26, 6, 9]
    assert [shard.samples for shard in index.unlabeled.shards] == [10, 8, 8]
    assert index.unlabeled.label_histogram == ()
    assert index.labeled.label_histogram == (4, 4, 4)
    assert index.test.label_histogram == (3, 3, 3)
    for name in SPLITS:
        split = index.split(name)
        assert (split.layout, split.block, split.order) == ("per-sample", 1, "full")
        for shard in split.shards:
            assert shard.name.startswith("../tars/")  # both folders can be moved
            path = tmp_path / "out" / shard.name
            assert shard.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
            assert shard.bytes == path.stat().st_size
    assert [Path(shard.name).name for shard in index.unlabeled.shards] == [
        f"web-{number:03d}.tar" for number in range(3)
    ]


def test_each_sidecar_leads_to_each_image(tars: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    index = index_shards(**request(tars, out))
    sidecars = {path for path in out.rglob("*") if path.is_file()}
    sidecars -= {out / "index.json", out / known_labels.NAME}
    for name in SPLITS:
        for number, shard in enumerate(index.split(name).shards):
            path = out / sidecar_name(name, number)
            sidecars.remove(path)
            assert shard.sidecar_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
            assert shard.sidecar_bytes == path.stat().st_size
            samples = np.load(path)
            assert samples.dtype == np.int64 and samples.shape == (shard.samples, 3)
            with open(out / shard.name, "rb") as file:
                images = [r.files["jpg"] for r in list_records(file).records if "jpg" in r.files]
                assert [tuple(row) for row in samples[:, :2]] == images
            labeled = name != "unlabeled"
            assert (samples[:, 2] >= 0).all() if labeled else (samples[:, 2] == -1).all()
    assert not sidecars and sorted(path.name for path in out.iterdir()) == [
        "index.json",
        *sorted(SPLITS),
    ]


def test_labels_from_json_and_names_from_a_file(tars: Path, tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("cat\ndog\nhorse\ncow\n")
    everything = [str(tars / "web-*.tar")]
    options = {"label": "json:meta.class", "labeled": everything, "test": everything}
    index = index_shards(
        **request(tars, tmp_path / "out", **options, class_names=names, validation=everything)
    )
    assert index.label == "json:meta.class"
    assert index.class_names == ("cat", "dog", "horse", "cow")
    # 0, 3, 6, 9 of shard 0; 12, 15, 18 of shard 1; 21 failed, 24 and 27 of shard 2
    assert index.labeled.label_histogram[0] == 9
    assert sum(index.labeled.label_histogram) == 26 and index.labeled.label_histogram[3] == 0
    assert load_index(tmp_path / "out") == index


def test_image_sizes(tars: Path, tmp_path: Path) -> None:
    write_tar(
        tars / "val.tar", [*classified(200, 6), ("x.jpg", image(1, size=(9, 9))), ("x.cls", b"0")]
    )
    with pytest.raises(
        UserError, match=r"8 x 12 .*record .*9 x 9 .*val\.tar, record x.*--image_size"
    ):
        index_shards(**request(tars, tmp_path / "out"))
    index = index_shards(**request(tars, tmp_path / "out", image_size=(16, 16)))
    assert (index.image_hwc, index.resize) == ((16, 16, 3), "shorter")
    index = index_shards(**request(tars, tmp_path / "gray", image_size=(16, 16), gray=True))
    assert (index.image_hwc, index.resize) == ((16, 16, 1), "shorter")
    write_tar(tars / "val.tar", [("x.jpg", image(1, mode="L")), ("x.cls", b"0")])
    with pytest.raises(UserError, match=r"\(color\).*\(gray\)"):
        index_shards(**request(tars, tmp_path / "mixed"))


def test_the_fingerprint_depends_on_contents(tars: Path, tmp_path: Path) -> None:
    index = index_shards(**request(tars, tmp_path / "out"))
    again = index_shards(**request(tars, tmp_path / "again", jobs=2))
    assert again == index
    tars.rename(tmp_path / "moved")
    moved = index_shards(**request(tmp_path / "moved", tmp_path / "third"))
    assert moved.fingerprint == index.fingerprint
    other = index_shards(**request(tmp_path / "moved", tmp_path / "fourth", order="windowed"))
    assert other.unlabeled.order == "windowed" and other.labeled.order == "full"
    assert other.fingerprint != index.fingerprint


# Remote shards


def test_over_http(tars: Path, tmp_path: Path) -> None:
    with http_server(tars) as server:
        server.faults["/web-001.tar"] = [status(500)]
        index = index_shards(**request(server.url, tmp_path / "out", jobs=2))
        assert server.requests["/web-001.tar"] == 2
        names = [shard.name for shard in index.unlabeled.shards]
        assert names == [f"{server.url}/web-{number:03d}.tar" for number in range(3)]
        assert load_index(tmp_path / "out") == index
    local = index_shards(**request(tars, tmp_path / "local"))
    assert index.fingerprint == local.fingerprint
    assert sorted(file_sums(tmp_path / "out")) == sorted(file_sums(tmp_path / "local"))


@pytest.mark.parametrize("server, scheme", [(s3_server, "s3"), (gs_server, "gs")], ids=["s3", "gs"])
def test_patterns_in_object_stores(
    server: Callable[[str], AbstractContextManager[BucketServer]],
    scheme: str,
    tars: Path,
    tmp_path: Path,
) -> None:
    with server("bucket") as store:
        store.upload(tars, "bucket")
        root = f"{scheme}://bucket"
        wildcard = request(root, tmp_path / "out", unlabeled=[f"{root}/web-*.tar"])
        index = index_shards(**wildcard)
        names = [shard.name for shard in index.unlabeled.shards]
        assert names == [f"{root}/web-{number:03d}.tar" for number in range(3)]
        with pytest.raises(UserError, match="matches"):
            index_shards(**wildcard | {"unlabeled": [f"{root}/nothing-*.tar"]})
    local = index_shards(**request(tars, tmp_path / "local"))
    assert index.fingerprint == local.fingerprint


def test_through_a_pipe(tars: Path, tmp_path: Path) -> None:
    index = index_shards(**request(f"pipe:cat {tars}", tmp_path / "out"))
    assert index.labeled.shards[0].name == f"pipe:cat {tars}/train-0.tar"
    local = index_shards(**request(tars, tmp_path / "local"))
    assert index.fingerprint == local.fingerprint


def test_a_failed_download_names_the_shard(tars: Path, tmp_path: Path) -> None:
    with http_server(tars) as server:
        server.faults["/train-1.tar"] = status(503)
        remote = RemoteConfig(tries=2, read_timeout=5.0)
        with pytest.raises(UserError, match=r"train-1\.tar.*503"):
            index_shards(**request(server.url, tmp_path / "out", remote=remote))
        assert server.requests["/train-1.tar"] == 2


# Refused


@pytest.mark.parametrize(
    "content, message", [(b"\xff", "not UTF-8 text"), (b"far", "'far', which is none of the 3")]
)
@pytest.mark.parametrize("split", ["validation", "test"])
def test_wrong_labels_are_named(
    content: bytes, message: str, split: str, tars: Path, tmp_path: Path
) -> None:
    name = {"validation": "val", "test": "test"}[split]
    write_tar(
        tars / f"{name}.tar", [*classified(0, 3), ("bad.jpg", image(5)), ("bad.cls", content)]
    )
    with pytest.raises(UserError, match=rf"shard .*{name}\.tar, record bad.*{message}"):
        index_shards(**request(tars, tmp_path / "out"))


def test_labels_beyond_the_classes_are_named(tars: Path, tmp_path: Path) -> None:
    write_tar(tars / "test.tar", [*classified(0, 6), ("far.jpg", image(5)), ("far.cls", b"3")])
    with pytest.raises(UserError, match=r"test\.tar, record far has the label '3'.* 3 classes"):
        index_shards(**request(tars, tmp_path / "out"))
    names = tmp_path / "names"
    names.write_text("a\nb\nc\n")
    with pytest.raises(UserError, match=r"test\.tar, record far has the label '3'.* 3 classes"):
        index_shards(**request(tars, tmp_path / "out", class_names=names))
    names.write_text("a\nb\nc\nd")
    index = index_shards(**request(tars, tmp_path / "out", class_names=names))
    assert index.test.label_histogram == (2, 2, 2, 1)


def test_numbers_with_gaps_and_names_become_classes(
    tars: Path, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    for number, name in ((0, "7"), (1, "10")):
        files = [(f"{number}.jpg", image(number)), (f"{number}.cls", name.encode())]
        write_tar(tars / f"train-{number}.tar", files)
    for name in ("val", "test"):
        write_tar(tars / f"{name}.tar", [("0.jpg", image(9)), ("0.cls", b" 10\n")])
    index = index_shards(**request(tars, tmp_path / "out"))
    assert index.class_names == ("7", "10") and index.test.label_histogram == (0, 1)
    assert "2 classes: 0 = 7, 1 = 10" in log.text
    names = tmp_path / "names"
    names.write_text("10\n7\nnone")
    write_tar(tars / "train-0.tar", [("0.jpg", image(1)), ("0.cls", b"none")])
    index = index_shards(**request(tars, tmp_path / "named", class_names=names))
    assert index.labeled.label_histogram == (1, 0, 1)


def test_wrong_options(tars: Path, tmp_path: Path) -> None:
    names = tmp_path / "names"
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"gray": True}, "--image_size"),
        ({"label": "json"}, "json:KEY"),
        ({"label": "json:"}, "json:KEY"),
        ({"order": "random"}, "random"),
        ({"jobs": 0}, "jobs is 0"),
        ({"class_names": names}, "cannot read class names"),
    ]
    for options, message in wrong:
        with pytest.raises(UserError, match=message):
            index_shards(**request(tars, tmp_path / "out", **options))
    for text in ("", "a\n\nb", "a\nb\na"):
        names.write_text(text)
        with pytest.raises(UserError, match="none empty and none twice"):
            index_shards(**request(tars, tmp_path / "out", class_names=names))
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written(tars: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot use .*file.*Not a directory"):
        index_shards(**request(tars, tmp_path / "file" / "out"))


def test_the_same_request_and_other_ones(
    tars: Path, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    wildcard = request(tars, out, unlabeled=[str(tars / "web-*.tar")])
    index = index_shards(**wildcard)
    before = file_sums(out)
    assert index_shards(**wildcard | {"jobs": 2}) == index
    assert "nothing to do" in log.text
    for options in (
        {"image_size": (8, 8)},
        {"order": "windowed"},
        {"test": wildcard["validation"]},
    ):
        with pytest.raises(UserError, match="holds another dataset"):
            index_shards(**wildcard | options)
    write_tar(tars / "web-003.tar", downloaded(500, 2))
    with pytest.raises(UserError, match="match other shards now"):
        index_shards(**wildcard)
    assert file_sums(out) == before
    other = tmp_path / "full"
    write_tar(other / "labeled" / "0.tar", classified(0, 3))
    with pytest.raises(UserError, match="holds no dataset"):
        index_shards(**wildcard | {"out": other})
    assert sorted(file_sums(other)) == ["labeled/0.tar"]


# Warnings


def test_damaged_images_are_counted_named_and_left_out(
    tars: Path, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    cut = image(5)[:-100]  # its header is whole
    broken = [("bad.jpg", cut), ("bad.cls", b"1"), ("worse.jpg", b""), ("worse.cls", b"0")]
    write_tar(tars / "train-0.tar", [*broken, *classified(100, 6)])
    index = index_shards(**request(tars, tmp_path / "out"))
    assert index.labeled.samples == 12 and index.labeled.label_histogram == (4, 4, 4)
    warning = r"2 images cannot be decoded and are left out.*train-0\.tar, record bad \("
    assert re.search(warning, log.text)
    assert "4 records have no image" in log.text
    lines = [
        line.split("\t") for line in (tmp_path / "out" / "skipped.tsv").read_text().splitlines()
    ]
    assert [(Path(name).name, key) for name, key, _ in lines] == [
        ("train-0.tar", "bad"),
        ("train-0.tar", "worse"),
    ]
    write_tar(tars / "val.tar", broken)
    with pytest.raises(UserError, match="no image of the validation shards"):
        index_shards(**request(tars, tmp_path / "other"))


def test_shards_without_an_end(tars: Path, tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    """A tar cut off between two records looks like one whose program writes no end."""
    shard = tars / "web-001.tar"
    with tarfile.open(shard) as opened:
        end = next(info.offset for info in opened if info.name.endswith("14.jpg"))
    shard.write_bytes(shard.read_bytes()[:end])
    index = index_shards(**request(tars, tmp_path / "out"))
    assert [part.samples for part in index.unlabeled.shards] == [10, 3, 8]
    assert re.search(r"1 shards lack the zeros.*web-001\.tar", log.text)


def test_classes_without_labels_and_shared_shards(
    tars: Path, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    names = tmp_path / "names"
    names.write_text("a\nb\nc\nd\ne")
    same = [str(tars / "train-0.tar")]
    index_shards(**request(tars, tmp_path / "out", class_names=names, test=same))
    assert "2 classes without a labeled sample: d, e" in log.text
    assert "training also uses 1 test shard" in log.text and "validation shard" not in log.text
    assert {record.levelname for record in log.records} == {"WARNING"}


# The command line


def test_the_command_line(tars: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = arguments(tars, tmp_path / "out")
    assert main([*line, "--image_size", "16", "--gray", "--order", "windowed"]) == 0
    output = capsys.readouterr().out
    assert "unlabeled: 26 samples in 3 shard(s), windowed" in output
    index = load_index(tmp_path / "out")
    assert index.fingerprint[:12] in output and index.image_hwc == (16, 16, 1)
    assert main(line) == 2
    assert "holds another dataset" in capsys.readouterr().err


@pytest.mark.parametrize(
    "option", ["tries=0", "read_timeout=0.0", "read_timeout=inf", "read_timeout=nan"]
)
def test_wrong_options_of_remote_files(
    tars: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    assert main([*arguments(tars, tmp_path / "out"), f"--{option}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and f"remote.{option.partition('=')[0]}" in line
    assert not (tmp_path / "out").exists()
