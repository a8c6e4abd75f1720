"""Preparing: the splits, the bytes, what is refused, and kills at any moment."""

from __future__ import annotations

import resource
import signal
import subprocess
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from filelock import FileLock
from numpy.typing import NDArray

from sgan_dist.cli import main
from sgan_dist.config import RemoteConfig
from sgan_dist.data.index import SPLITS, DatasetIndex, load_index
from sgan_dist.data.prepare.shards import prepare
from sgan_dist.data.prepare.sources import load_source
from sgan_dist.data.prepare.sources.source import Part
from sgan_dist.data.prepare.splits import Labels
from sgan_dist.data.remote.cache import Storage
from sgan_dist.data.stream import read_split
from sgan_dist.errors import UserError
from tests.data.prepare.commands import ENVIRONMENT, SGAN_DIST, file_sums
from tests.data.prepare.idx import REAL, idx_bytes, needs_real, write_idx

Images = NDArray[np.uint8]
Numbers = NDArray[np.int64] | None


def read(root: Path, index: DatasetIndex, split: str) -> tuple[Images, Numbers]:
    storage = Storage(str(root), RemoteConfig())
    parts = list(read_split(storage, index, split, 0, 1))
    images = np.concatenate([images for images, _, _ in parts])
    labels = [labels for _, labels, _ in parts if labels is not None]
    return images, np.concatenate(labels) if labels else None


def array_of(part: Part | None) -> Images:
    assert part is not None
    return part.array


def rows(images: Images | None) -> set[bytes]:
    assert images is not None
    return {image.tobytes() for image in images}


@pytest.mark.parametrize("layout", ["packed", "per-sample"])
def test_digits(tmp_path: Path, layout: str) -> None:
    index = prepare("digits", tmp_path / "out", layout=layout, progress=False)
    assert load_index(tmp_path / "out") == index
    source = load_source("digits")
    sets: dict[str, set[bytes]] = {}
    for split in SPLITS:
        images, labels = read(tmp_path / "out", index, split)
        assert len(images) == index.split(split).samples
        sets[split] = rows(images)
        if labels is not None:
            assert np.bincount(labels).tolist() == [len(images) // 10] * 10
            by_bytes = dict(
                zip((i.tobytes() for i in source.train.array), source.train.labels, strict=True)
            )
            assert [by_bytes[image.tobytes()] for image in images] == labels.tolist()
            # the order within a split is independent of the classes
            assert (np.diff(labels) == 0).mean() < 0.3
    assert sets["labeled"] <= sets["unlabeled"]
    assert not sets["unlabeled"] & (sets["validation"] | sets["test"])
    assert not sets["validation"] & sets["test"]


@pytest.mark.parametrize("compress", [True, False])
def test_idx(tmp_path: Path, compress: bool) -> None:
    folder = write_idx(tmp_path / "tiny", compress=compress)
    index = prepare(
        f"idx:{folder}", tmp_path / "out", Labels(5), samples_per_shard=300, progress=False
    )
    assert index.source == "idx:tiny"
    assert [index.split(s).samples for s in SPLITS] == [20, 550, 50, 60]
    assert [shard.samples for shard in index.unlabeled.shards] == [300, 250]
    source = load_source(f"idx:{folder}")
    assert rows(read(tmp_path / "out", index, "test")[0]) == rows(array_of(source.test))
    everything = [read(tmp_path / "out", index, s)[0] for s in ("unlabeled", "validation")]
    assert rows(np.concatenate(everything)) == rows(source.train.array)


@needs_real
@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_real_idx(tmp_path: Path, name: str) -> None:
    spec = f"idx:{REAL / name}"
    index = prepare(spec, tmp_path / "out", progress=False)
    assert [index.split(s).samples for s in SPLITS] == [100, 55000, 5000, 10000]
    assert index.labeled.label_histogram == (10,) * 10
    histogram = np.bincount(load_source(spec).train.labels)
    assert abs(np.array(index.validation.label_histogram) - histogram / 12).max() < 1


@pytest.mark.parametrize("layout", ["packed", "per-sample"])
def test_same_request_same_bytes(tmp_path: Path, layout: str) -> None:
    folder = write_idx(tmp_path / "tiny")
    first, second = tmp_path / "first", tmp_path / "second"
    for out in (first, second):
        prepare(f"idx:{folder}", out, Labels(5), layout=layout, progress=False)
    assert file_sums(first) == file_sums(second)
    time_before = (first / "index.json").stat().st_mtime_ns
    prepare(f"idx:{folder}", first, Labels(5), layout=layout, progress=False)
    assert (first / "index.json").stat().st_mtime_ns == time_before


def test_another_label_seed_changes_the_labeled_split_only(tmp_path: Path) -> None:
    folder = write_idx(tmp_path / "tiny")
    for seed in (0, 1):
        prepare(f"idx:{folder}", tmp_path / str(seed), Labels(5, seed=seed), progress=False)
    zero, one = file_sums(tmp_path / "0"), file_sums(tmp_path / "1")
    changed = {name for name in zero if zero[name] != one[name]}
    assert changed == {"labeled/000000.tar", "index.json"}
    prepare(f"idx:{folder}", tmp_path / "more", Labels(10), progress=False)
    fewer, more = (
        rows(read(tmp_path / name, load_index(tmp_path / name), "labeled")[0])
        for name in ("0", "more")
    )
    assert fewer < more


@pytest.mark.parametrize("layout", ["packed", "per-sample"])
def test_unlabeled_shards_hold_no_labels_and_webdataset_reads_all(
    tmp_path: Path, layout: str
) -> None:
    folder = write_idx(tmp_path / "tiny")
    out = tmp_path / "out"
    index = prepare(
        f"idx:{folder}", out, Labels(5), layout=layout, samples_per_shard=300, progress=False
    )
    fields = {"images.npy", "labels.npy"} if layout == "packed" else {"png", "cls"}
    for split in SPLITS:
        shards = [str(out / shard.name) for shard in index.split(split).shards]
        for shard in shards:
            names = {m.name.split(".", 1)[1] for m in tarfile.open(shard)}
            assert names == (fields if split != "unlabeled" else fields & {"images.npy", "png"})
        images, labels = read(out, index, split)
        records = list(webdataset.WebDataset(shards, shardshuffle=False).decode("l8"))
        assert len({record["__key__"] for record in records}) == len(records)
        if layout == "packed":
            assert (np.concatenate([s["images.npy"] for s in records]) == images).all()
            if labels is not None:
                assert (
                    np.concatenate([s["labels.npy"] for s in records]).tolist() == labels.tolist()
                )
        else:
            assert (np.stack([s["png"] for s in records])[..., None] == images).all()
            if labels is not None:
                assert [s["cls"] for s in records] == labels.tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": Labels(0)}, "at least 1"),
        ({"labels": Labels(200)}, "class 0 .* fewer than 200 labels per class"),
        ({"validation": 600}, "validation is 600: choose from 1 to 599"),
        ({"validation": 0}, "validation is 0: choose from 1 to 599"),
        ({"validation": -1}, "validation is -1"),
        ({"layout": "zip"}, "unknown layout 'zip'"),
        ({"order": "random"}, "unknown order 'random'"),
        ({"samples_per_shard": 0}, "samples per shard is 0"),
    ],
)
def test_refused_requests(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    folder = write_idx(tmp_path / "tiny")
    with pytest.raises(UserError, match=message):
        prepare(f"idx:{folder}", tmp_path / "out", progress=False, **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny"]


def test_refused_folders(tmp_path: Path) -> None:
    folder = write_idx(tmp_path / "tiny")
    out = tmp_path / "out"
    prepare(f"idx:{folder}", out, Labels(5), progress=False)
    with pytest.raises(UserError, match=r"5 labels per class.*6 labels per class"):
        prepare(f"idx:{folder}", out, Labels(6), progress=False)
    with pytest.raises(UserError, match="holds no dataset"):
        prepare(f"idx:{folder}", folder, Labels(5), progress=False)
    with pytest.raises(UserError, match=r"cannot use .*\.gz: Not a directory"):
        prepare(f"idx:{folder}", folder / "t10k-labels-idx1-ubyte.gz", Labels(5), progress=False)
    with pytest.raises(UserError, match=r"cannot use .*below: Not a directory"):
        prepare(f"idx:{folder}", out / "index.json" / "below", Labels(5), progress=False)
    (tmp_path / "empty").mkdir()
    prepare(f"idx:{folder}", tmp_path / "empty", Labels(5), progress=False)
    load_index(tmp_path / "empty")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "train-images-idx3-ubyte",
            lambda d: d[:-1],
            "says 600x8x8 = 38400 bytes, but holds 38399",
        ),
        ("train-images-idx3-ubyte", lambda d: d + b"x", "holds 38401"),
        ("t10k-labels-idx1-ubyte", lambda d: b"\0\0\x08\x05" + d[4:], "not an IDX file"),
        ("t10k-labels-idx1-ubyte", lambda d: b"", "not an IDX file"),
        (
            "train-labels-idx1-ubyte",
            lambda d: idx_bytes(np.zeros(599, np.uint8)),
            "600 train images",
        ),
        (
            "t10k-labels-idx1-ubyte",
            lambda d: d[:-1] + b"\x09",
            "the label '9', which is none of the 4 classes",
        ),
        ("train-images-idx3-ubyte", None, "has no train-images"),
    ],
)
def test_damaged_idx_files(
    tmp_path: Path, name: str, change: Callable[[bytes], bytes] | None, message: str
) -> None:
    folder = write_idx(tmp_path / "tiny", compress=False)
    path = folder / name
    data = path.read_bytes()
    path.unlink()
    if change is not None:
        path.write_bytes(change(data))
    with pytest.raises(UserError, match=message):
        load_source(f"idx:{folder}")


def test_damaged_gzip(tmp_path: Path) -> None:
    folder = write_idx(tmp_path / "tiny")
    path = folder / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"cannot read .*train-images.*remove it"):
        load_source(f"idx:{folder}")


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_idx(tmp_path / "tiny")
    line = [
        "prepare",
        "--source",
        f"idx:{folder}",
        "--out",
        str(tmp_path / "out"),
        "--labels_per_class",
        "5",
    ]
    assert main([*line, "--order", "windowed", "--validation=40"]) == 0
    assert "560 samples in 1 shard(s), windowed" in capsys.readouterr().out
    index = load_index(tmp_path / "out")
    assert index.unlabeled.order == "windowed" and index.labeled.order == "full"
    assert main([*line, "--order", "windowed", "--validation=40"]) == 0
    assert "already holds this dataset" in capsys.readouterr().err
    assert main(line) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert main([*line, "--validation=0"]) == 2
    assert "choose from 1 to 599" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["prepare", "--help"])
    assert "digits, mnist, fashion-mnist, or KIND:PLACE" in " ".join(
        capsys.readouterr().out.split()
    )


@pytest.mark.process
@pytest.mark.timeout(120)
def test_a_killed_run_leaves_nothing_that_looks_complete(tmp_path: Path) -> None:
    out = tmp_path / "out"
    # a shard per sample: thousands of files, so that there is time to kill it
    process = subprocess.Popen(
        [*SGAN_DIST, "prepare", "--source=digits", f"--out={out}", "--samples_per_shard=1"],
        env=ENVIRONMENT,
    )
    partial = tmp_path / ".out.partial"
    while not (partial / "unlabeled" / "000005.tar").exists():
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert partial.exists() and not out.exists()
    with pytest.raises(UserError, match="no dataset"):
        load_index(out)
    with pytest.raises(UserError, match="no dataset"):
        load_index(partial)
    prepare("digits", out, progress=False)
    load_index(out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.process
@pytest.mark.timeout(60)
def test_an_interrupted_run_keeps_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen(
        [*SGAN_DIST, "prepare", "--source=digits", f"--out={out}", "--samples_per_shard=1"],
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        text=True,
        # a shell's background job ignores Ctrl-C, and so would its children
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not (tmp_path / ".out.partial" / "unlabeled" / "000005.tar").exists():
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130
    assert (
        errors.splitlines()[-1]
        == "interrupted; the same command continues, and no partial dataset was left"
    )
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


@pytest.mark.process
@pytest.mark.timeout(60)
def test_no_room_left(tmp_path: Path) -> None:
    done = subprocess.run(
        [*SGAN_DIST, "prepare", "--source=digits", f"--out={tmp_path / 'out'}"],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)),
    )
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: no room left") and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_live_run_is_not_disturbed(tmp_path: Path) -> None:
    folder = write_idx(tmp_path / "tiny")
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    (partial / "unfinished").touch()
    with (
        FileLock(tmp_path / ".out.lock"),
        pytest.raises(UserError, match="another run is preparing"),
    ):
        prepare(f"idx:{folder}", tmp_path / "out", Labels(5), progress=False)
    assert (partial / "unfinished").exists()
    prepare(f"idx:{folder}", tmp_path / "out", Labels(5), progress=False)
    assert {path.name for path in tmp_path.iterdir()} == {"tiny", "out"}
