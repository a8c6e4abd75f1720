"""Terabytes: 10^9 samples in 100,000 shards, by index alone; and windows of large images."""

import dataclasses
import hashlib
import io
import tarfile
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from sgan_dist.config import Config, DataConfig
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
from sgan_dist.plan import coverage
from tests.servers import http_server

MIB = 2**20
SHARDS, PER_SHARD = 100_000, 10_000
SAMPLES = SHARDS * PER_SHARD
LANES, BATCH = 256, 2048
EACH = BATCH // LANES
EPOCH = SAMPLES // BATCH  # steps
BYTES = {"packed": 800, "per-sample": 151_000}  # an image

pytestmark = pytest.mark.timeout(240)


def split_of(name, layout, order, shards, per_shard):
    listed = tuple(
        Shard(
            f"{name}/{number:06d}.tar",
            per_shard,
            per_shard * BYTES[layout],
            hashlib.sha256(f"{name} {number}".encode()).hexdigest(),
        )
        for number in range(shards)
    )
    block = {"packed": 256, "per-sample": 1}[layout]
    return SplitIndex(layout, order, block, shards * per_shard, (), listed)


def index_of(**splits):
    return with_fingerprint(
        DatasetIndex(
            **splits,
            image_shape=(28, 28, 1),
            class_names=tuple("0123456789"),
            label="cls",
            resize=False,
            source="none",
            request="an index without data",
            label_seed=0,
            labels_per_class=100,
            order_version=ordering.ORDER_VERSION,
            fingerprint="",
        )
    )


@pytest.fixture(scope="module")
def large():
    """The index, without any data: 10^9 unlabeled samples, 10^6 labeled ones."""
    small = {name: split_of(name, "packed", "full", 1, 100) for name in ("validation", "test")}
    return index_of(
        labeled=split_of("labeled", "packed", "windowed", 100, PER_SHARD),
        unlabeled=split_of("unlabeled", "packed", "windowed", SHARDS, PER_SHARD),
        **small,
    )


@pytest.fixture(scope="module")
def server(large, tmp_path_factory):
    """Serves the index, and nothing else."""
    folder = tmp_path_factory.mktemp("large")
    save(large, folder)
    with http_server(folder) as server:
        yield server


@pytest.fixture(scope="module")
def order():
    """The order of the unlabeled samples."""
    window = 256 * MIB // LANES // BYTES["packed"]
    return WindowedOrder(np.full(SHARDS, PER_SHARD), LANES, window, 7, "unlabeled")


def test_starting_opens_no_shard(large, server, tmp_path):
    index = load_index(server.url)
    assert index == large and index.unlabeled.samples == 10**9
    data = DataConfig(
        root=server.url,
        labeled_batch=256,
        unlabeled_batch=BATCH,
        lanes=LANES,
        cache=str(tmp_path),
        tries=1,
    )
    with SemiSupervisedLoader(index, data, 0, 0, 2) as loader:
        loader.batches(10**6)
    WindowedStream(open_storage(data), index, "unlabeled", 0, BATCH, LANES, 256, 0, LANES // 2)
    report = coverage(Config(data=data), index, 8)
    assert f"{SHARDS} shards" in report
    assert [path for path, _ in server.seen] == ["/index.json"]
    assert not any(tmp_path.iterdir())


@pytest.mark.slow  # tracemalloc makes json four times slower
def test_an_index_and_a_stream_in_memory(server):
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
            split = dataclasses.replace(index.unlabeled, layout=layout, shards=shards)
            index = dataclasses.replace(index, unlabeled=split)
            before, _ = tracemalloc.get_traced_memory()
            tracemalloc.reset_peak()
            data = DataConfig(root=server.url)
            stream = WindowedStream(
                open_storage(data), index, "unlabeled", 0, BATCH, LANES, 256, 0, LANES
            )
            _, peak = tracemalloc.get_traced_memory()
            windows = LANES * window_samples(split, LANES, 256)
            images = windows * 28 * 28 if layout == "packed" else 8 * windows
            numbers = 3 * 8 * windows  # ids, labels, and the order in which they are taken
            assert peak - before < images + numbers + 8 * MIB
            assert images + numbers < (270 if layout == "packed" else 1) * MIB
            del stream
    finally:
        tracemalloc.stop()


def test_a_step_costs_as_much_as_its_windows(order, monkeypatch):
    """What is hashed and sorted depends on windows and lanes, but for once an epoch."""
    permuted, keyed = [], ordering.permutation

    def counted(n, *key):
        permuted.append(n)
        return keyed(n, *key)

    monkeypatch.setattr(ordering, "permutation", counted)
    steps = np.random.default_rng(0).integers(0, 5 * EPOCH, 6).tolist()
    for step in [0, *steps, 10**6 * EPOCH]:
        epochs = {order.locate(lane, step * EACH)[0] for lane in range(LANES)}
        for epoch in epochs:
            for line in (epoch, epoch + 1):  # of an epoch and the next: once, however many steps
                order.pieces(line, 0, 1)
        assert set(permuted) <= {SHARDS} and len(permuted) <= len(epochs) + 1
        permuted.clear()
        tracemalloc.start()
        pieces = 0
        for lane in range(LANES):
            position = step * EACH
            epoch, window, inside = order.locate(lane, position)
            start, stop = order.window_line(lane, epoch, window)
            found = order.pieces(epoch, start, stop)
            assert sum(piece.samples for piece in found) == stop - start
            assert 0 <= order.window_permutation(lane, epoch, window)[inside] < stop - start
            pieces += len(found) + len(order.following(lane, position, order.window))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert len(permuted) == LANES and max(permuted) <= order.window
        assert pieces <= LANES * 6  # a window touches two shards, or three where the line is cut
        assert peak < MIB
        permuted.clear()


@pytest.mark.parametrize("epoch", [0, 3, 10**6])
def test_a_large_epoch_is_exact(order, epoch):
    cuts = np.array([lane_cut(SAMPLES, LANES, lane, epoch) for lane in range(LANES + 1)])
    lengths = np.array([lane_length(SAMPLES, LANES, lane, epoch) for lane in range(LANES)])
    assert cuts[0] == 0 and cuts[-1] == SAMPLES and (np.diff(cuts) == lengths).all()
    assert lengths.max() - lengths.min() <= 1
    found = [order.pieces(epoch, cuts[lane], cuts[lane + 1]) for lane in range(LANES)]
    pieces = np.array([piece for lane in found for piece in lane])
    assert pieces[:, 2].min() > 0 and len(pieces) <= SHARDS + LANES + 1
    # shard after shard, each piece begins where the one before it ends
    pieces = pieces[np.lexsort((pieces[:, 1], pieces[:, 0]))]
    ends = pieces[:, 0] * PER_SHARD + pieces[:, 1] + pieces[:, 2]
    starts = pieces[:, 0] * PER_SHARD + pieces[:, 1]
    assert starts[0] == 0 and ends[-1] == SAMPLES and (starts[1:] == ends[:-1]).all()


def noise(random):
    """A PNG of about 150 kB, which nothing compresses."""
    return png(random.integers(0, 256, (224, 224, 3), np.uint8))


def plain(random):
    """A PNG of less than 1 kB."""
    return png(np.broadcast_to(random.integers(0, 256, 3, np.uint8), (224, 224, 3)))


def png(array):
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(array)).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def written(folder, kinds, per_shard):
    """An unlabeled split of per-sample shards, each of images of one kind; and all their bytes."""
    random = np.random.default_rng(0)
    images = {kind: [kind(random) for _ in range(8)] for kind in set(kinds)}
    shards = []
    for number, kind in enumerate(kinds):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for place in range(per_shard):
                image = images[kind][place % 8]
                member = tarfile.TarInfo(f"{number * per_shard + place:06d}.png")
                member.size = len(image)
                tar.addfile(member, io.BytesIO(image))
        data = buffer.getvalue()
        name = f"{number:06d}.tar"
        (folder / name).write_bytes(data)
        shards.append(Shard(name, per_shard, len(data), hashlib.sha256(data).hexdigest()))
    split = SplitIndex("per-sample", "windowed", 1, per_shard * len(kinds), (), tuple(shards))
    others = dict.fromkeys(("labeled", "validation", "test"), split)
    return dataclasses.replace(index_of(unlabeled=split, **others), image_shape=(224, 224, 3))


def peak_of(folder, index, lanes, batch, window_mib):
    """The most memory that an epoch of a stream takes."""
    storage = open_storage(DataConfig(root=str(folder)))
    n, ids = index.unlabeled.samples, []
    tracemalloc.start()
    try:
        stream = WindowedStream(storage, index, "unlabeled", 0, batch, lanes, window_mib, 0, lanes)
        for step in range(n // batch):
            ids.append(stream.take(step)[2])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sorted(np.concatenate(ids)) == list(range(n))
    return peak


def test_windows_of_large_images_keep_to_their_budget(tmp_path):
    index = written(tmp_path, [noise] * 6, 36)
    lanes, batch, budget = 4, 8, 16 * MIB
    window = window_samples(index.unlabeled, lanes, 16)
    assert 2 * window == index.unlabeled.samples // lanes  # two full windows an epoch
    peak = peak_of(tmp_path, index, lanes, batch, 16)
    # beside the windows: the batch, decoded, and an image that is decoded
    assert 0.9 * budget < peak < budget + (batch + 2) * 224 * 224 * 3 + MIB


def test_windows_are_cut_by_the_mean_image(tmp_path):
    """Where large images lie together windows hold more than the budget, at most by largest/mean."""
    index = written(tmp_path, [noise, plain] * 3, 40)
    lanes, batch, budget = 4, 8, 8 * MIB
    sizes = [shard.bytes / shard.samples for shard in index.unlabeled.shards]
    largest, mean = max(sizes), sum(sizes) / len(sizes)
    assert largest > 1.9 * mean
    peak = peak_of(tmp_path, index, lanes, batch, 8)
    batch_bytes = (batch + 2) * 224 * 224 * 3 + MIB
    assert budget < peak < budget * largest / mean + batch_bytes


def test_a_start_reads_shards_of_its_first_windows(tmp_path):
    """And no more than the next ones, which are brought ahead."""
    served = tmp_path / "served"
    served.mkdir()
    index = written(served, [plain] * 120, 5)
    save(index, served)
    lanes = 4
    with http_server(served) as server:
        data = DataConfig(root=server.url, cache=str(tmp_path / "cache"))
        storage = open_storage(data)
        window = 12
        mib = window * lanes * sum(s.bytes for s in index.unlabeled.shards) / 600 / MIB
        stream = WindowedStream(storage, index, "unlabeled", 0, 8, lanes, mib, 0, lanes)
        stream.take(30)
        storage.close()
        asked = {path for path in server.requests if path.endswith(".tar")}
    # 12 samples lie in at most four shards of five; as many are brought ahead
    assert lanes * 3 <= len(asked) <= lanes * 2 * 4
