"""Terabytes: 10^9 samples in 100,000 shards, by index alone; and windows of large images."""

from __future__ import annotations

import dataclasses
import hashlib
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.random import Generator

from sgan_dist.data import order as ordering
from sgan_dist.data.index import (
    DatasetIndex,
    Shard,
    SplitIndex,
    load_index,
    save,
    with_fingerprint,
)
from sgan_dist.data.loader import SemiSupervisedLoader
from sgan_dist.data.order import WindowedOrder, lane_cut, lane_length
from sgan_dist.data.stream import WindowedStream, open_storage, window_samples
from sgan_dist.run.preflight import coverage
from tests.data.datasets import data_config, png_bytes, tar_bytes, with_split
from tests.servers import FolderServer, http_server

MIB = 2**20
SHARDS, PER_SHARD = 100_000, 10_000
SAMPLES = SHARDS * PER_SHARD
LANES, BATCH = 256, 2048
EACH = BATCH // LANES
EPOCH = SAMPLES // BATCH  # steps
BYTES = {"packed": 800, "per-sample": 151_000}  # an image
DECODED = 224 * 224 * 3  # bytes of an image of `write_split`

pytestmark = pytest.mark.timeout(240)


def packed_split(name: str, order: str, shards: int, per_shard: int) -> SplitIndex:
    listed = tuple(
        Shard(
            f"{name}/{number:06d}.tar",
            per_shard,
            per_shard * BYTES["packed"],
            hashlib.sha256(f"{name} {number}".encode()).hexdigest(),
        )
        for number in range(shards)
    )
    return SplitIndex("packed", order, 256, shards * per_shard, (), listed)


def index_of(**splits: SplitIndex) -> DatasetIndex:
    return with_fingerprint(
        DatasetIndex(
            **splits,
            image_hwc=(28, 28, 1),
            class_names=tuple("0123456789"),
            label="cls",
            resize="none",
            source="none",
            request="an index without data",
            label_seed=0,
            labels_per_class=100,
            order_version=ordering.ORDER_VERSION,
            fingerprint="",
            decode_version=1,
        )
    )


@pytest.fixture(scope="module")
def large() -> DatasetIndex:
    """The index, without any data: 10^9 unlabeled samples, 10^6 labeled ones."""
    return index_of(
        labeled=packed_split("labeled", "windowed", 100, PER_SHARD),
        unlabeled=packed_split("unlabeled", "windowed", SHARDS, PER_SHARD),
        validation=packed_split("validation", "full", 1, 100),
        test=packed_split("test", "full", 1, 100),
    )


@pytest.fixture(scope="module")
def server(large: DatasetIndex, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FolderServer]:
    """Serves the index, and nothing else."""
    folder = tmp_path_factory.mktemp("large")
    save(large, folder)
    with http_server(folder) as server:
        yield server


@pytest.fixture(scope="module")
def order() -> WindowedOrder:
    """The order of the unlabeled samples."""
    window = 256 * MIB // LANES // BYTES["packed"]
    return WindowedOrder([PER_SHARD] * SHARDS, LANES, window, 7, "unlabeled")


def test_starting_opens_no_shard(large: DatasetIndex, server: FolderServer, tmp_path: Path) -> None:
    index = load_index(server.url)
    assert index == large and index.unlabeled.samples == 10**9
    config = data_config(
        server.url,
        labeled=256,
        unlabeled=BATCH,
        lanes=LANES,
        window_mib=256,
        cache=tmp_path,
        tries=1,
    )
    with SemiSupervisedLoader(index, config, 0, 2) as loader:
        loader.batches(10**6)
    WindowedStream(open_storage(config), index, "unlabeled", config, BATCH, range(LANES // 2))
    report = coverage(config, index, 8)
    assert f"{SHARDS} shards" in report
    assert [path for path, _ in server.seen] == ["/index.json"]
    assert not any(tmp_path.iterdir())


@pytest.mark.slow  # tracemalloc makes json four times slower
def test_an_index_and_a_stream_in_memory(server: FolderServer) -> None:
    tracemalloc.start()
    try:
        index = load_index(server.url)
        held, peak = tracemalloc.get_traced_memory()
        assert held < 48 * MIB and peak < 120 * MIB
        for layout in ("packed", "per-sample"):
            shards = tuple(
                dataclasses.replace(shard, bytes=PER_SHARD * BYTES[layout])
                for shard in index.unlabeled.shards
            )
            index = with_split(index, "unlabeled", layout=layout, shards=shards)
            before, _ = tracemalloc.get_traced_memory()
            tracemalloc.reset_peak()
            config = data_config(server.url, lanes=LANES, window_mib=256)
            storage = open_storage(config)
            stream = WindowedStream(storage, index, "unlabeled", config, BATCH, range(LANES))
            _, peak = tracemalloc.get_traced_memory()
            windows = LANES * window_samples(index.unlabeled, 256 / LANES)
            images = windows * 28 * 28 if layout == "packed" else 8 * windows
            numbers = 3 * 8 * windows  # ids, labels, and the order in which they are taken
            assert peak - before < images + numbers + 8 * MIB
            assert images + numbers < (270 if layout == "packed" else 1) * MIB
            del stream
    finally:
        tracemalloc.stop()


def test_a_step_costs_as_much_as_its_windows(
    order: WindowedOrder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hashing and sorting depend on windows and lanes alone, except once an epoch."""
    permuted: list[int] = []
    permutation = ordering.permutation

    def counted(n: int, *key: int | str) -> ordering.Int64s:
        permuted.append(n)
        return permutation(n, *key)

    monkeypatch.setattr(ordering, "permutation", counted)
    steps = np.random.default_rng(0).integers(0, 5 * EPOCH, 6).tolist()
    for step in [0, *steps, 10**6 * EPOCH]:
        epochs = {order.locate(lane, step * EACH)[0] for lane in range(LANES)}
        for epoch in epochs:
            for line in (epoch, epoch + 1):  # cached: once an epoch, not once a step
                order.pieces(line, 0, 1)
        assert set(permuted) <= {SHARDS} and len(permuted) <= len(epochs) + 1
        permuted.clear()
        tracemalloc.start()
        pieces = 0
        for lane in range(LANES):
            position = step * EACH
            epoch, window, inside = order.locate(lane, position)
            start, stop = order.window_line(lane, epoch, window)
            window_pieces = order.pieces(epoch, start, stop)
            assert sum(piece.samples for piece in window_pieces) == stop - start
            assert 0 <= order.window_permutation(lane, epoch, window)[inside] < stop - start
            pieces += len(window_pieces) + len(order.following(lane, position, order.window))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert len(permuted) == LANES and max(permuted) <= order.window
        assert pieces <= LANES * 6  # a window touches two shards, or three where the line is cut
        assert peak < MIB
        permuted.clear()


@pytest.mark.parametrize("epoch", [0, 3, 10**6])
def test_a_large_epoch_is_exact(order: WindowedOrder, epoch: int) -> None:
    cuts = np.array([lane_cut(SAMPLES, LANES, lane, epoch) for lane in range(LANES + 1)])
    lengths = np.array([lane_length(SAMPLES, LANES, lane, epoch) for lane in range(LANES)])
    assert cuts[0] == 0 and cuts[-1] == SAMPLES and (np.diff(cuts) == lengths).all()
    assert lengths.max() - lengths.min() <= 1
    lanes = [order.pieces(epoch, cuts[lane], cuts[lane + 1]) for lane in range(LANES)]
    pieces = np.array([piece for lane in lanes for piece in lane])
    assert pieces[:, 2].min() > 0 and len(pieces) <= SHARDS + LANES + 1
    # shard after shard, each piece begins where the one before it ends
    pieces = pieces[np.lexsort((pieces[:, 1], pieces[:, 0]))]
    ends = pieces[:, 0] * PER_SHARD + pieces[:, 1] + pieces[:, 2]
    starts = pieces[:, 0] * PER_SHARD + pieces[:, 1]
    assert starts[0] == 0 and ends[-1] == SAMPLES and (starts[1:] == ends[:-1]).all()


def noise(random: Generator) -> bytes:
    """A PNG of about 150 kB, which nothing compresses."""
    return png_bytes(random.integers(0, 256, (224, 224, 3), np.uint8), compress_level=1)


def plain(random: Generator) -> bytes:
    """A PNG of less than 1 kB."""
    color = random.integers(0, 256, 3, np.uint8)
    return png_bytes(np.tile(color, (224, 224, 1)), compress_level=1)


def write_split(
    folder: Path, kinds: list[Callable[[Generator], bytes]], per_shard: int
) -> DatasetIndex:
    """Writes an unlabeled split of per-sample shards, each of images of one kind."""
    random = np.random.default_rng(0)
    images = {kind: [kind(random) for _ in range(8)] for kind in set(kinds)}
    shards = []
    for number, kind in enumerate(kinds):
        first = number * per_shard
        files = {f"{first + i:06d}.png": images[kind][i % 8] for i in range(per_shard)}
        data, name = tar_bytes(files), f"{number:06d}.tar"
        (folder / name).write_bytes(data)
        shards.append(Shard(name, per_shard, len(data), hashlib.sha256(data).hexdigest()))
    split = SplitIndex("per-sample", "windowed", 1, per_shard * len(kinds), (), tuple(shards))
    others = dict.fromkeys(("labeled", "validation", "test"), split)
    return dataclasses.replace(index_of(unlabeled=split, **others), image_hwc=(224, 224, 3))


def peak_memory(
    folder: Path, index: DatasetIndex, lanes: int, batch: int, window_mib: float
) -> int:
    """The peak memory of an epoch of a stream, in bytes."""
    config = data_config(folder, lanes=lanes, window_mib=window_mib)
    storage = open_storage(config)
    n, ids = index.unlabeled.samples, list[Any]()
    tracemalloc.start()
    try:
        stream = WindowedStream(storage, index, "unlabeled", config, batch, range(lanes))
        for step in range(n // batch):
            ids.append(stream.take(step).ids)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sorted(np.concatenate(ids)) == list(range(n))
    return peak


def test_windows_of_large_images_keep_to_their_budget(tmp_path: Path) -> None:
    index = write_split(tmp_path, [noise] * 6, 36)
    lanes, batch, budget = 4, 8, 16 * MIB
    window = window_samples(index.unlabeled, 16 / lanes)
    assert 2 * window == index.unlabeled.samples // lanes  # two full windows an epoch
    peak = peak_memory(tmp_path, index, lanes, batch, 16)
    # beside the windows: the batch, decoded, and an image that is decoded
    assert 0.9 * budget < peak < budget + (batch + 2) * DECODED + MIB


def test_windows_are_cut_by_the_mean_image(tmp_path: Path) -> None:
    """Where large images lie together, windows exceed the budget, by largest/mean at most."""
    index = write_split(tmp_path, [noise, plain] * 3, 40)
    lanes, batch, budget = 4, 8, 8 * MIB
    sizes = [shard.bytes / shard.samples for shard in index.unlabeled.shards]
    largest, mean = max(sizes), sum(sizes) / len(sizes)
    assert largest > 1.9 * mean
    peak = peak_memory(tmp_path, index, lanes, batch, 8)
    batch_bytes = (batch + 2) * DECODED + MIB
    assert budget < peak < budget * largest / mean + batch_bytes


def test_a_start_reads_shards_of_its_first_windows(tmp_path: Path) -> None:
    """And, at most, those of the next windows, which are prefetched."""
    served = tmp_path / "served"
    served.mkdir()
    index = write_split(served, [plain] * 120, 5)
    save(index, served)
    lanes = 4
    with http_server(served) as server:
        window = 12
        mib = window * lanes * sum(s.bytes for s in index.unlabeled.shards) / 600 / MIB
        config = data_config(server.url, cache=tmp_path / "cache", lanes=lanes, window_mib=mib)
        storage = open_storage(config)
        stream = WindowedStream(storage, index, "unlabeled", config, 8, range(lanes))
        stream.take(30)
        storage.close()
        requested = {path for path in server.requests if path.endswith(".tar")}
    # 12 samples lie in at most four shards of five; as many are prefetched
    assert lanes * 3 <= len(requested) <= lanes * 2 * 4
