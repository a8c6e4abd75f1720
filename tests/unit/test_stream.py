"""Streams over real shards: the right samples from any step on, and damage that is named."""

import dataclasses
import hashlib
import io
import re
import shutil
import tarfile
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from sgan_dist.config import DataConfig
from sgan_dist.data.index import Shard, load_index
from sgan_dist.data.prepare import prepare
from sgan_dist.data.stream import (
    FullStream,
    WindowedStream,
    open_storage,
    read_split,
    window_samples,
)
from sgan_dist.errors import UserError

LAYOUTS = ("packed", "per-sample")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """layout -> folder: digits in shards that no block, lane or window divides."""
    folders = {}
    for layout in LAYOUTS:
        folders[layout] = tmp_path_factory.mktemp(layout) / "digits"
        prepare("digits", folders[layout], layout=layout, samples_per_shard=600, progress=False)
    return folders


@pytest.fixture
def copy(prepared, tmp_path):
    def of(layout):
        shutil.copytree(prepared[layout], tmp_path / layout)
        return tmp_path / layout

    return of


def local(root):
    return open_storage(DataConfig(root=str(root)))


def everything(root, index, split):
    """The split's images and labels by id."""
    parts = list(read_split(local(root), index, split, 0, 1, block=300))
    ids = np.concatenate([part[2] for part in parts])
    assert ids.tolist() == list(range(index.split(split).samples))
    labels = None if parts[0][1] is None else np.concatenate([part[1] for part in parts])
    return np.concatenate([part[0] for part in parts]), labels


def windowed(root, index, split="unlabeled", lanes=(0, 6), window=100, batch=60, seed=1):
    """A stream with windows of about `window` samples, of six lanes; asked for in bytes."""
    mean = sum(s.bytes for s in index.split(split).shards) / index.split(split).samples
    return WindowedStream(
        local(root), index, split, seed, batch, 6, window * 6 * mean / 2**20, *lanes
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("split", ["labeled", "unlabeled"])
def test_full_stream(prepared, layout, split):
    root = prepared[layout]
    index = load_index(root)
    images, labels = everything(root, index, split)
    stream = FullStream(local(root), index, split, 1, 64)
    for step in (0, 1, 100):
        got, got_labels, ids = stream.take(step, 16, 48)
        assert got.dtype == np.uint8 and ids.dtype == np.int64 and len(ids) == 32
        assert (got == images[ids]).all()
        if labels is None:
            assert got_labels is None
        else:
            assert (got_labels == labels[ids]).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("split", ["labeled", "unlabeled"])
def test_windowed_stream_is_the_same_from_any_step(prepared, layout, split):
    root = prepared[layout]
    index = load_index(root)
    images, labels = everything(root, index, split)
    n = len(images)
    stream = windowed(root, index, split)
    steps = [stream.take(step) for step in range(2 * n // 60 + 2)]
    for got, got_labels, ids in steps:
        assert (got == images[ids]).all()
        assert (got_labels is None) if labels is None else (got_labels == labels[ids]).all()
    # the first two epochs hold every sample twice, but for what lanes are ahead or behind
    counts = np.bincount(np.concatenate([ids for _, _, ids in steps]), minlength=n)
    assert counts.min() >= 2 and counts.sum() == 60 * len(steps)
    # from a step on, by arithmetic; and lane by lane
    for step in (len(steps) - 1, 1, len(steps) // 2):
        assert (windowed(root, index, split).take(step)[2] == steps[step][2]).all()
        assert (stream.take(step)[0] == steps[step][0]).all()
    pairs = [windowed(root, index, split, lanes=lanes).take(3) for lanes in ((0, 1), (1, 6))]
    assert (np.concatenate([pair[0] for pair in pairs]) == steps[3][0]).all()


def test_layouts_give_the_same_split(prepared):
    indexes = {layout: load_index(prepared[layout]) for layout in LAYOUTS}
    for split in ("labeled", "unlabeled", "validation", "test"):
        packed, per_sample = (everything(prepared[x], indexes[x], split) for x in LAYOUTS)
        assert (packed[0] == per_sample[0]).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_more_lanes_than_samples(prepared, layout):
    root = prepared[layout]
    index = load_index(root)
    stream = WindowedStream(local(root), index, "labeled", 0, 512, 256, 1, 0, 256)
    # epoch e of n = 100 samples is dealt after e * n samples, to lanes in turn
    taken = np.stack([stream.take(step)[2].reshape(256, 2) for step in range(5)])
    dealt = taken.transpose(0, 2, 1).reshape(-1)
    for epoch in range(len(dealt) // 100):
        assert sorted(dealt[epoch * 100 : epoch * 100 + 100]) == list(range(100))


def test_windows_hold_the_bytes_asked_for(prepared):
    split = load_index(prepared["packed"]).unlabeled
    samples = window_samples(split, 8, 1)
    total = sum(shard.bytes for shard in split.shards)
    assert 0.9 * 2**20 < samples * 8 * total / split.samples <= 2**20
    assert window_samples(split, 10**6, 1) == 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_reading_without_the_sidecar(prepared, copy, layout):
    root = copy(layout)
    index = load_index(root)
    expected = windowed(prepared[layout], index).take(40)
    for sidecar in root.rglob("*.offsets.npy"):
        sidecar.unlink()
    got = windowed(root, index).take(40)
    assert (got[0] == expected[0]).all() and (got[2] == expected[2]).all()


def test_sequential_steps_open_each_shard_once_a_lane(prepared, copy):
    root = copy("packed")
    index = load_index(root)
    stream = windowed(root, index, lanes=(0, 1), window=20)
    first = stream.take(0)
    # the lane's shard is open and its sidecar read: what is gone now is not missed
    for path in root.rglob("unlabeled/*"):
        path.unlink()
    assert (stream.take(1)[2] != first[2]).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_read_split_gives_each_sample_to_one_rank(prepared, layout, world_size):
    root = prepared[layout]
    index = load_index(root)
    images, labels = everything(root, index, "test")
    for rank in range(world_size):
        parts = list(read_split(local(root), index, "test", rank, world_size, block=64))
        assert all(len(part[2]) == 64 for part in parts[:-1]) and 0 < len(parts[-1][2]) <= 64
        ids = np.concatenate([part[2] for part in parts])
        assert ids.tolist() == list(range(rank, len(images), world_size))
        assert (np.concatenate([part[0] for part in parts]) == images[ids]).all()
        assert (np.concatenate([part[1] for part in parts]) == labels[ids]).all()


def test_read_split_holds_little(prepared):
    root = prepared["packed"]
    index = load_index(root)
    tracemalloc.start()
    for _ in read_split(local(root), index, "unlabeled", 0, 1, block=64):
        pass
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3500 * 784 / 2


def rewrite(root, index, split, change, refresh=True):
    """Change the records of a split's second shard; with `refresh`, bring the index up to it."""
    number = min(1, len(index.split(split).shards) - 1)
    shard = index.split(split).shards[number]
    path = root / shard.name
    with tarfile.open(path) as tar:
        records = {member.name: tar.extractfile(member).read() for member in tar}
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in change(records).items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    for sidecar in root.rglob("*.offsets.npy"):
        sidecar.unlink()
    if not refresh:
        return index
    data = path.read_bytes()
    fresh = Shard(shard.name, shard.samples, len(data), hashlib.sha256(data).hexdigest())
    shards = list(index.split(split).shards)
    shards[number] = fresh
    return dataclasses.replace(
        index, **{split: dataclasses.replace(index.split(split), shards=tuple(shards))}
    )


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def png(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG")
    return buffer.getvalue()


def change_last(suffix, data):
    """Replace the last record's file with that suffix; None drops it, a function maps it."""

    def change(records):
        name = max(name for name in records if name.endswith(suffix))
        if data is None:
            return {key: value for key, value in records.items() if key != name}
        return records | {name: data(records[name]) if callable(data) else data}

    return change


def extra(records):
    return records | {f"999999{name[6:]}": data for name, data in list(records.items())[-2:]}


BLANK = np.zeros((144, 28, 28, 1), np.uint8)
# layout, split, file that is replaced in the last record of the split's second shard, by what, and
# what is said of it
DAMAGE = {
    "float images": (
        "packed",
        "labeled",
        ".images.npy",
        npy(np.zeros((100, 28, 28, 1))),
        "float64",
    ),
    "narrow": (
        "packed",
        "test",
        ".images.npy",
        npy(BLANK[:, :27]),
        r"\(144, 27, 28, 1\).*expected",
    ),
    "one less": ("packed", "test", ".images.npy", npy(BLANK[:143]), r"shape \(143, 28"),
    "fortran": ("packed", "test", ".images.npy", npy(np.asfortranarray(BLANK[..., 0])), "shape"),
    "garbage": ("packed", "test", ".images.npy", b"garbage", "not a .npy file"),
    "nothing": ("packed", "test", ".images.npy", b"", "not a .npy file"),
    "cut": ("packed", "unlabeled", ".images.npy", lambda d: d[:-1], "bytes, too few or too many"),
    "header": ("packed", "test", ".images.npy", lambda d: d[:20] + b"!" * 30 + d[50:], "."),
    "no images": ("packed", "test", ".images.npy", None, "it has no images.npy"),
    "no labels": ("packed", "test", ".labels.npy", None, "it has no labels.npy"),
    "label 10": (
        "packed",
        "test",
        ".labels.npy",
        npy(np.full(144, 10)),
        "label 10 is not one of 10",
    ),
    "png garbage": ("per-sample", "unlabeled", ".png", b"garbage", "."),
    "png cut": ("per-sample", "test", ".png", lambda d: d[:-30], "."),
    "png narrow": ("per-sample", "test", ".png", png(np.zeros((28, 27), np.uint8)), "28.*27"),
    "png colors": ("per-sample", "test", ".png", png(np.zeros((28, 28, 3), np.uint8)), "28"),
    "word label": ("per-sample", "test", ".cls", b"three", "'three', not a class number"),
    "label 11": ("per-sample", "labeled", ".cls", b"11", "label 11 is not one of 10"),
    "no label": ("per-sample", "test", ".cls", None, "no cls file"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_records_that_were_indexed_damaged_are_replaced(prepared, copy, case):
    layout, split, suffix, data, message = DAMAGE[case]
    root = copy(layout)
    images, labels = everything(prepared[layout], load_index(prepared[layout]), split)
    index = rewrite(root, load_index(root), split, change_last(suffix, data))
    n = len(images)
    number = min(1, len(index.split(split).shards) - 1)
    shard = index.split(split).shards[number]
    count = sum(s.samples for s in index.split(split).shards[: number + 1])
    block = index.split(split).block
    record = (shard.samples - 1) // block
    damaged = set(range(count - shard.samples + record * block, count))

    if n > len(damaged):
        full = FullStream(local(root), index, split, 0, 8)
        met = full.skips
        seen = np.concatenate([full.take(step, 0, 8)[2] for step in range(n // 8)])
        assert not damaged & set(seen) and len(seen) == n // 8 * 8
        again = FullStream(local(root), index, split, 0, 8)
        got, got_labels, ids = again.take(17, 2, 7)
        assert (ids == full.take(17, 2, 7)[2]).all() and (got == images[ids]).all()
        assert got_labels is None or (got_labels == labels[ids]).all()

        stream = windowed(root, index, split, window=10**6)
        steps = [stream.take(step) for step in range(2 * n // 60)]
        assert stream.skips == met
        for got, got_labels, ids in steps:
            assert not damaged & set(ids) and (got == images[ids]).all()
            assert got_labels is None or (got_labels == labels[ids]).all()
        for step in (len(steps) - 1, 1):  # whatever else was read before, and by whom
            pairs = [
                windowed(root, index, split, lanes=lanes, window=10**6).take(step)
                for lanes in ((0, 1), (1, 6))
            ]
            assert (np.concatenate([pair[2] for pair in pairs]) == steps[step][2]).all()
        ((name, at, samples, why),) = met
        assert (name, at, samples) == (shard.name, record, len(damaged))
        assert re.search(message, why)
    else:
        with pytest.raises(UserError, match="all samples of the labeled split are damaged"):
            FullStream(local(root), index, split, 0, 8)
        with pytest.raises(UserError, match="all samples of a window of the labeled split"):
            windowed(root, index, split).take(0)

    got = [part[2] for part in read_split(local(root), index, split, 0, 1)]
    left = sorted(set(range(n)) - damaged)
    assert (np.concatenate(got).tolist() if got else []) == left


def test_a_wholly_damaged_window_is_named(copy):
    root = copy("packed")
    index = rewrite(root, load_index(root), "unlabeled", change_last(".images.npy", b"x"))
    with pytest.raises(UserError, match=r"unlabeled/000001.tar: not a .npy.*leave that shard out"):
        list(map(windowed(root, index, window=10).take, range(60)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_damage_since_the_index_was_made_is_named(copy, layout):
    suffix = {"packed": ".images.npy", "per-sample": ".png"}[layout]
    root = copy(layout)
    prepared_index = load_index(root)
    index = rewrite(root, prepared_index, "test", change_last(suffix, lambda d: b"?" * len(d)))
    shards = list(index.test.shards)
    shards[1] = dataclasses.replace(shards[1], sha256=prepared_index.test.shards[1].sha256)
    index = dataclasses.replace(index, test=dataclasses.replace(index.test, shards=tuple(shards)))
    for attempt in (
        lambda: FullStream(local(root), index, "test", 0, 8),
        lambda: list(read_split(local(root), index, "test", 0, 1)),
        lambda: list(map(windowed(root, index, "test").take, range(20))),
    ):
        with pytest.raises(UserError, match=r"shard test/000001.tar.*sha256.*copy it again"):
            attempt()


def test_wrong_number_of_records_is_named(copy):
    root = copy("packed")
    prepared_index = load_index(root)
    index = rewrite(root, prepared_index, "test", extra)
    with pytest.raises(UserError, match=r"000001.tar: it has 3 records, its index says 2"):
        FullStream(local(root), index, "test", 0, 8)
    index = rewrite(root, prepared_index, "test", lambda r: dict(list(r.items())[:2]))
    with pytest.raises(UserError, match=r"000001.tar: it has 1 records, its index says 2"):
        list(read_split(local(root), index, "test", 0, 1))


@pytest.mark.parametrize("keep", [0, 100, 512, 100_000, 300_000])
def test_truncated_and_garbled_tars_are_named(copy, keep):
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
            FullStream(local(root), index, "unlabeled", 0, 8)
        if keep <= 512:
            with pytest.raises(UserError, match=rf"unlabeled/000001.tar.*{why}"):
                list(map(windowed(root, index).take, range(60)))


def test_flipped_pixels_of_a_split_in_memory_are_noticed(copy):
    root = copy("packed")
    path = root / "labeled" / "000000.tar"
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"labeled/000000.tar .*sha256 differs"):
        FullStream(local(root), load_index(root), "labeled", 0, 8)


@pytest.mark.parametrize("data", [b"garbage", b"", npy(np.arange(2)), npy(np.arange(4.0))])
def test_a_broken_sidecar_is_named(copy, data):
    root = copy("packed")
    for sidecar in root.glob("unlabeled/*.offsets.npy"):
        sidecar.write_bytes(data)
    with pytest.raises(UserError, match=r"offsets.npy.*delete it"):
        windowed(root, load_index(root)).take(0)
