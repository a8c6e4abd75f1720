"""Streams over real shards: the right samples from any step on, and damage that is named."""

from __future__ import annotations

import re
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sgan_dist.data.index import DatasetIndex, fingerprint, load_index
from sgan_dist.data.order import Int64s
from sgan_dist.data.prepare.shards import prepare
from sgan_dist.data.reader import Bytes
from sgan_dist.data.remote.cache import Storage
from sgan_dist.data.stream import (
    FullStream,
    Samples,
    WindowedStream,
    open_storage,
    read_split,
    window_samples,
)
from sgan_dist.errors import UserError
from tests.data.datasets import (
    LAYOUTS,
    data_config,
    npy_bytes,
    png_bytes,
    rewrite_shard,
    tar_files,
    with_split,
    without_sidecars,
)

CopyOf = Callable[[str], Path]
Files = dict[str, bytes]
LANES = 6


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """layout -> folder: digits in shards that no block, lane or window divides."""
    folders = {}
    for layout in LAYOUTS:
        folders[layout] = tmp_path_factory.mktemp(layout) / "digits"
        prepare("digits", folders[layout], layout=layout, samples_per_shard=600, progress=False)
    return folders


@pytest.fixture
def copy(prepared: dict[str, Path], tmp_path: Path) -> CopyOf:
    """layout -> a copy of its folder, which the test may change."""
    return lambda layout: Path(shutil.copytree(prepared[layout], tmp_path / layout))


def local_storage(root: Path) -> Storage:
    return open_storage(data_config(root))


def whole_split(root: Path, index: DatasetIndex, split: str) -> tuple[Bytes, Int64s | None]:
    """The split's images and labels by id."""
    parts = list(read_split(local_storage(root), index, split, 0, 1, block=300))
    ids = np.concatenate([part.ids for part in parts])
    assert ids.tolist() == list(range(index.split(split).samples))
    labels = [part.labels for part in parts if part.labels is not None]
    images = np.concatenate([part.images for part in parts])
    return images, np.concatenate(labels) if labels else None


def full_stream(root: Path, index: DatasetIndex, split: str, batch: int = 8) -> FullStream:
    return FullStream(local_storage(root), index, split, data_config(root), batch)


def windowed_stream(
    root: Path,
    index: DatasetIndex,
    split: str = "unlabeled",
    lanes: tuple[int, int] = (0, LANES),
    window: int = 100,
) -> WindowedStream:
    """A stream of some of six lanes with windows of about `window` samples."""
    mean = sum(s.bytes for s in index.split(split).shards) / index.split(split).samples
    mib = window * LANES * mean / 2**20
    config = data_config(root, seed=1, lanes=LANES, window_mib=mib)
    return WindowedStream(local_storage(root), index, split, config, 60, range(*lanes))


def assert_labels(taken: Samples, labels: Int64s | None) -> None:
    """The samples have these labels, by id, or none."""
    if labels is None:
        assert taken.labels is None
    else:
        assert taken.labels is not None and (taken.labels == labels[taken.ids]).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("split", ["labeled", "unlabeled"])
def test_full_stream(prepared: dict[str, Path], layout: str, split: str) -> None:
    root = prepared[layout]
    index = load_index(root)
    images, labels = whole_split(root, index, split)
    stream = full_stream(root, index, split, batch=64)
    for step in (0, 1, 100):
        taken = stream.take(step, 16, 48)
        assert taken.images.dtype == np.uint8
        assert taken.ids.dtype == np.int64 and len(taken.ids) == 32
        assert (taken.images == images[taken.ids]).all()
        assert_labels(taken, labels)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("split", ["labeled", "unlabeled"])
def test_windowed_stream_is_the_same_from_any_step(
    prepared: dict[str, Path], layout: str, split: str
) -> None:
    root = prepared[layout]
    index = load_index(root)
    images, labels = whole_split(root, index, split)
    n = len(images)
    stream = windowed_stream(root, index, split)
    steps = [stream.take(step) for step in range(2 * n // 60 + 2)]
    for taken in steps:
        assert (taken.images == images[taken.ids]).all()
        assert_labels(taken, labels)
    # the first two epochs hold every sample twice, but for what lanes are ahead or behind
    counts = np.bincount(np.concatenate([taken.ids for taken in steps]), minlength=n)
    assert counts.min() >= 2 and counts.sum() == 60 * len(steps)
    # from a step on, by arithmetic; and lane by lane
    for step in (len(steps) - 1, 1, len(steps) // 2):
        assert (windowed_stream(root, index, split).take(step).ids == steps[step].ids).all()
        assert (stream.take(step).images == steps[step].images).all()
    pieces = [windowed_stream(root, index, split, lanes).take(3) for lanes in ((0, 1), (1, 6))]
    assert (np.concatenate([piece.images for piece in pieces]) == steps[3].images).all()


def test_layouts_give_the_same_split(prepared: dict[str, Path]) -> None:
    indexes = {layout: load_index(prepared[layout]) for layout in LAYOUTS}
    for split in ("labeled", "unlabeled", "validation", "test"):
        packed, per_sample = (whole_split(prepared[x], indexes[x], split) for x in LAYOUTS)
        assert (packed[0] == per_sample[0]).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_more_lanes_than_samples(prepared: dict[str, Path], layout: str) -> None:
    root = prepared[layout]
    index = load_index(root)
    config = data_config(root, lanes=256)
    stream = WindowedStream(local_storage(root), index, "labeled", config, 512, range(256))
    # epoch e of n = 100 samples is dealt after e * n samples, to the lanes round-robin
    taken = np.stack([stream.take(step).ids.reshape(256, 2) for step in range(5)])
    dealt = taken.transpose(0, 2, 1).reshape(-1)
    for epoch in range(len(dealt) // 100):
        assert sorted(dealt[epoch * 100 : epoch * 100 + 100]) == list(range(100))


def test_windows_hold_the_bytes_asked_for(prepared: dict[str, Path]) -> None:
    split = load_index(prepared["packed"]).unlabeled
    samples = window_samples(split, 1 / 8)
    total = sum(shard.bytes for shard in split.shards)
    assert 0.9 * 2**20 < samples * 8 * total / split.samples <= 2**20
    assert window_samples(split, 1e-6) == 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_reading_without_the_sidecar(prepared: dict[str, Path], copy: CopyOf, layout: str) -> None:
    root = copy(layout)
    index = load_index(root)
    expected = windowed_stream(prepared[layout], index).take(40)
    for sidecar in root.rglob("*.samples.npy"):
        sidecar.unlink()
    old = without_sidecars(index)
    assert old.fingerprint == fingerprint(old) == index.fingerprint
    taken = windowed_stream(root, old).take(40)
    assert (taken.images == expected.images).all() and (taken.ids == expected.ids).all()
    labeled = full_stream(root, old, "labeled")
    assert_labels(labeled.take(3, 0, 8), whole_split(prepared[layout], index, "labeled")[1])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sequential_steps_open_each_shard_once_a_lane(copy: CopyOf, layout: str) -> None:
    root = copy(layout)
    index = load_index(root)
    stream = windowed_stream(root, index, lanes=(0, 1), window=20)
    first = stream.take(0)
    # the lane's shard is open, and the places of its records are known
    for path in root.rglob("unlabeled/*"):
        path.unlink()
    assert (stream.take(1).ids != first.ids).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_read_split_gives_each_sample_to_one_rank(
    prepared: dict[str, Path], layout: str, world_size: int
) -> None:
    root = prepared[layout]
    index = load_index(root)
    images, labels = whole_split(root, index, "test")
    assert labels is not None
    for rank in range(world_size):
        parts = list(read_split(local_storage(root), index, "test", rank, world_size, block=64))
        own = index.test.shards[rank::world_size]
        assert all(len(part.ids) == 64 for part in parts[:-1])
        if not own:
            assert not parts
            continue
        ids = np.concatenate([part.ids for part in parts])
        starts = np.cumsum([0, *(shard.samples for shard in index.test.shards)])
        shards = range(rank, len(index.test.shards), world_size)
        assert ids.tolist() == [i for n in shards for i in range(starts[n], starts[n + 1])]
        assert (np.concatenate([part.images for part in parts]) == images[ids]).all()
        got_labels = [part.labels for part in parts if part.labels is not None]
        assert (np.concatenate(got_labels) == labels[ids]).all()


def test_read_split_holds_little(prepared: dict[str, Path]) -> None:
    root = prepared["packed"]
    index = load_index(root)
    tracemalloc.start()
    for _ in read_split(local_storage(root), index, "unlabeled", 0, 1, block=64):
        pass
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3500 * 784 / 2


def change_second_shard(
    root: Path, index: DatasetIndex, split: str, change: Callable[[Files], Files]
) -> DatasetIndex:
    """Changes the files of a split's second shard, or only one."""
    number = min(1, len(index.split(split).shards) - 1)
    files = tar_files(root / index.split(split).shards[number].name)
    return rewrite_shard(root, index, split, number, change(files))


def replace_last(
    suffix: str, data: bytes | Callable[[bytes], bytes] | None
) -> Callable[[Files], Files]:
    """Replaces the last record's file with that suffix; None removes it, a function maps it."""

    def change(files: Files) -> Files:
        last = max(name for name in files if name.endswith(suffix))
        if data is None:
            return {name: content for name, content in files.items() if name != last}
        return files | {last: data(files[last]) if callable(data) else data}

    return change


def add_record(files: Files) -> Files:
    last_record = list(files.items())[-2:]
    return files | {f"999999{name[6:]}": data for name, data in last_record}


BLANK = np.zeros((144, 28, 28, 1), np.uint8)
Replacement = bytes | Callable[[bytes], bytes] | None
# layout, split, the file that is replaced in the last record of the split's second shard, its
# replacement, and the reason that is reported
DAMAGE: dict[str, tuple[str, str, str, Replacement, str]] = {
    "float images": (
        *("packed", "labeled", ".images.npy"),
        *(npy_bytes(np.zeros((100, 28, 28, 1))), "float64"),
    ),
    "narrow": (
        *("packed", "test", ".images.npy"),
        *(npy_bytes(BLANK[:, :27]), r"\(144, 27, 28, 1\).*expected"),
    ),
    "one less": ("packed", "test", ".images.npy", npy_bytes(BLANK[:143]), r"shape \(143, 28"),
    "fortran": (
        *("packed", "test", ".images.npy"),
        *(npy_bytes(np.asfortranarray(BLANK[..., 0])), "shape"),
    ),
    "garbage": ("packed", "test", ".images.npy", b"garbage", "not a .npy file"),
    "nothing": ("packed", "test", ".images.npy", b"", "not a .npy file"),
    "cut": ("packed", "unlabeled", ".images.npy", lambda d: d[:-1], "bytes, too few or too many"),
    "header": ("packed", "test", ".images.npy", lambda d: d[:20] + b"!" * 30 + d[50:], "."),
    "no images": ("packed", "test", ".images.npy", None, "it has no images.npy"),
    "no labels": ("packed", "test", ".labels.npy", None, "it has no labels.npy"),
    "label 10": (
        *("packed", "test", ".labels.npy"),
        *(npy_bytes(np.full(144, 10)), "label 10 is not one of 10"),
    ),
    "png garbage": ("per-sample", "unlabeled", ".png", b"garbage", "."),
    "png cut": ("per-sample", "test", ".png", lambda d: d[:-30], "."),
    "png narrow": (
        *("per-sample", "test", ".png"),
        *(png_bytes(np.zeros((28, 27), np.uint8)), "28.*27"),
    ),
    "png colors": (
        *("per-sample", "test", ".png"),
        *(png_bytes(np.zeros((28, 28, 3), np.uint8)), "28"),
    ),
    "word label": ("per-sample", "test", ".cls", b"three", "label -1 is not one of 10"),
    "label 11": ("per-sample", "labeled", ".cls", b"11", "label 11 is not one of 10"),
    "no label": ("per-sample", "test", ".cls", None, "label -1 is not one of 10"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_records_that_were_indexed_damaged_are_replaced(
    prepared: dict[str, Path], copy: CopyOf, case: str
) -> None:
    layout, split, suffix, data, message = DAMAGE[case]
    root = copy(layout)
    images, labels = whole_split(prepared[layout], load_index(prepared[layout]), split)
    index = change_second_shard(root, load_index(root), split, replace_last(suffix, data))
    n = len(images)
    number = min(1, len(index.split(split).shards) - 1)
    shard = index.split(split).shards[number]
    count = sum(s.samples for s in index.split(split).shards[: number + 1])
    block = index.split(split).block
    record = (shard.samples - 1) // block
    damaged = set(range(count - shard.samples + record * block, count))

    if n > len(damaged):
        full = full_stream(root, index, split)
        skips = full.skips
        seen = np.concatenate([full.take(step, 0, 8).ids for step in range(n // 8)])
        assert not damaged & set(seen) and len(seen) == n // 8 * 8
        taken = full_stream(root, index, split).take(17, 2, 7)
        assert (taken.ids == full.take(17, 2, 7).ids).all()
        assert (taken.images == images[taken.ids]).all()
        assert_labels(taken, labels)

        stream = windowed_stream(root, index, split, window=10**6)
        steps = [stream.take(step) for step in range(2 * n // 60)]
        assert stream.skips == skips
        for taken in steps:
            assert not damaged & set(taken.ids) and (taken.images == images[taken.ids]).all()
            assert_labels(taken, labels)
        for step in (len(steps) - 1, 1):  # it does not matter what else was read before
            pieces = [
                windowed_stream(root, index, split, lanes, window=10**6).take(step)
                for lanes in ((0, 1), (1, 6))
            ]
            assert (np.concatenate([piece.ids for piece in pieces]) == steps[step].ids).all()
        ((name, skipped_record, samples, why),) = skips
        assert (name, skipped_record, samples) == (shard.name, record, len(damaged))
        assert re.search(message, why)
    else:
        with pytest.raises(UserError, match="all samples of the labeled split are damaged"):
            full_stream(root, index, split)
        with pytest.raises(UserError, match="all samples of a window of the labeled split"):
            windowed_stream(root, index, split).take(0)

    parts = [part.ids for part in read_split(local_storage(root), index, split, 0, 1)]
    left = sorted(set(range(n)) - damaged)
    assert (np.concatenate(parts).tolist() if parts else []) == left


def test_a_wholly_damaged_window_is_named(copy: CopyOf) -> None:
    root = copy("packed")
    change = replace_last(".images.npy", b"x")
    index = change_second_shard(root, load_index(root), "unlabeled", change)
    with pytest.raises(UserError, match=r"unlabeled/000001.tar: not a .npy.*leave that shard out"):
        list(map(windowed_stream(root, index, window=10).take, range(60)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_damage_since_the_index_was_made_is_named(copy: CopyOf, layout: str) -> None:
    suffix = {"packed": ".images.npy", "per-sample": ".png"}[layout]
    root = copy(layout)
    old = load_index(root)
    index = change_second_shard(root, old, "test", replace_last(suffix, lambda d: b"?" * len(d)))
    shards = index.test.shards
    assert shards[1].bytes == old.test.shards[1].bytes
    index = with_split(index, "test", shards=(shards[0], old.test.shards[1]))
    reads: tuple[Callable[[], Any], ...] = (
        lambda: full_stream(root, index, "test"),
        lambda: list(read_split(local_storage(root), index, "test", 0, 1)),
        lambda: list(map(windowed_stream(root, index, "test").take, range(20))),
    )
    for read in reads:
        with pytest.raises(UserError, match=r"shard test/000001.tar.*sha256.*copy it again"):
            read()


def test_wrong_number_of_records_is_named(copy: CopyOf) -> None:
    root = copy("packed")
    old = load_index(root)
    index = change_second_shard(root, old, "test", add_record)
    with pytest.raises(UserError, match=r"000001.tar: it has 3 records, its index says 2"):
        full_stream(root, index, "test")
    index = change_second_shard(root, old, "test", lambda files: dict(list(files.items())[:2]))
    with pytest.raises(UserError, match=r"000001.tar: it has 1 records, its index says 2"):
        list(read_split(local_storage(root), index, "test", 0, 1))


@pytest.mark.parametrize("keep", [0, 100, 512, 100_000, 300_000])
def test_truncated_and_garbled_tars_are_named(copy: CopyOf, keep: int) -> None:
    root = copy("packed")
    index = load_index(root)
    path = root / "unlabeled" / "000001.tar"
    whole = path.read_bytes()
    for data, why in (
        (whole[:keep], f"has {keep} bytes, the index says {len(whole)}"),
        (whole[:keep] + b"\xff" * 600 + whole[keep + 600 :], "sha256"),
    ):
        path.write_bytes(data)
        with pytest.raises(UserError, match=rf"unlabeled/000001.tar.*{why}"):
            full_stream(root, index, "unlabeled")
        if keep <= 512:
            with pytest.raises(UserError, match=rf"unlabeled/000001.tar.*{why}"):
                list(map(windowed_stream(root, index).take, range(60)))


def test_flipped_pixels_of_a_split_in_memory_are_noticed(copy: CopyOf) -> None:
    root = copy("packed")
    path = root / "labeled" / "000000.tar"
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"labeled/000000.tar .*sha256 differs"):
        full_stream(root, load_index(root), "labeled")


@pytest.mark.parametrize("change", [lambda d: d[:-1] + b"x", lambda d: b"", lambda d: d + b"x"])
def test_a_changed_sidecar_is_refused(copy: CopyOf, change: Callable[[bytes], bytes]) -> None:
    root = copy("per-sample")
    for sidecar in root.glob("unlabeled/*.samples.npy"):
        sidecar.write_bytes(change(sidecar.read_bytes()))
    with pytest.raises(UserError, match=r"samples.npy .*(has changed|no longer matches).*copy it"):
        windowed_stream(root, load_index(root)).take(0)
    for sidecar in root.glob("unlabeled/*.samples.npy"):
        sidecar.unlink()
    with pytest.raises(UserError, match=r"samples.npy .*No such file.*copy it again"):
        windowed_stream(root, load_index(root)).take(0)
