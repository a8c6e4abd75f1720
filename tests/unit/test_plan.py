"""What --dry_run says is what happens: shards and bytes a rank, lanes, epochs; and nothing is read."""

import contextlib
import dataclasses
import io
import os
import re

import pytest

from sgan_dist.config import Config, DataConfig, TrainConfig
from sgan_dist.data import prepare as preparing
from sgan_dist.data.index import load_index, save, with_fingerprint
from sgan_dist.data.prepare import prepare
from sgan_dist.data.storage import CacheOptions, Storage
from sgan_dist.data.stream import FullStream, WindowedStream, transport
from sgan_dist.plan import coverage
from sgan_dist.trainer import main
from tests.ranks import run_ranks
from tests.servers import http_server

TRAIN = 3840  # 12 lanes of 320
LANES = 12

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """layout -> digits of which all that is trained on is windowed, in shards across the lanes."""
    folders = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparing, "PACKED_BLOCK", 50)
        for layout in ("packed", "per-sample"):
            folders[layout] = tmp_path_factory.mktemp(layout) / "digits"
            index = prepare(
                "digits",
                folders[layout],
                labels_per_class=30,
                validation=4000 - TRAIN,
                layout=layout,
                order="windowed",
                samples_per_shard=70,
                progress=False,
            )
            assert index.unlabeled.samples == TRAIN and TRAIN % LANES == 0
            labeled = dataclasses.replace(index.labeled, order="windowed")
            save(with_fingerprint(dataclasses.replace(index, labeled=labeled)), folders[layout])
    return folders


class CountingStorage(Storage):
    """Remembers which shards were opened to be read; those opened to be checked are not counted."""

    def __init__(self, data):
        where = (data.root, transport(data), CacheOptions(data.cache))
        super().__init__(*where)
        self.opened = []
        self._checking = Storage(*where)

    def unchanged(self, shard):
        return self._checking.unchanged(shard)

    def open(self, shard):
        self.opened.append(shard)
        return super().open(shard)


def config(root, labeled_batch, unlabeled_batch, seed=0):
    data = DataConfig(str(root), None, lanes=LANES)
    batches = {"labeled_batch": labeled_batch, "unlabeled_batch": unlabeled_batch}
    return Config(seed=seed, data=dataclasses.replace(data, window_mib=1, **batches))


def told(text, split):
    """(shards, MiB as printed) of every rank, from the lines of a split."""
    lines = text.splitlines()
    start = next(number for number, line in enumerate(lines) if line.split()[0] == split) + 1
    found = []
    for line in lines[start:]:
        match = re.fullmatch(r" +rank (\d+) reads (\d+) shards?, ([\d,.]+ MiB)", line)
        if match is None:
            break
        assert int(match[1]) == len(found)
        found.append((int(match[2]), match[3]))
    return found


def mebibytes(shards):
    return f"{sum(shard.bytes for shard in shards) / 2**20:,.1f} MiB"


@pytest.mark.parametrize(
    ("layout", "world_size"),
    [("packed", 1), ("packed", 2), ("packed", 3), ("packed", 4), ("per-sample", 3)],
)
def test_ranks_read_what_the_plan_tells(prepared, layout, world_size):
    root = prepared[layout]
    index = load_index(root)
    settings = config(root, LANES, LANES, seed=world_size)
    text = coverage(settings, index, world_size)
    assert f"{LANES} lanes of about {TRAIN // LANES} samples" in text
    for split in ("labeled", "unlabeled"):
        n = index.split(split).samples
        assert n % LANES == 0  # an epoch ends with a step
        expected = []
        for rank in range(world_size):
            storage = CountingStorage(settings.data)
            share = rank * LANES // world_size, (rank + 1) * LANES // world_size
            stream = WindowedStream(
                storage, index, split, settings.seed, LANES, LANES, settings.data.window_mib, *share
            )
            for step in range(n // LANES):
                stream.take(step)
            expected.append((len(storage.opened), mebibytes(storage.opened)))
        assert told(text, split) == expected
        # borders are read by two lanes, and all shards by somebody
        assert sum(count for count, _ in expected) > len(index.split(split).shards)


def test_a_split_in_memory_is_read_by_every_rank(prepared):
    root = prepared["packed"]
    index = load_index(root)
    index = dataclasses.replace(index, labeled=dataclasses.replace(index.labeled, order="full"))
    settings = config(root, 36, 0)
    storage = CountingStorage(settings.data)
    FullStream(storage, index, "labeled", 0, 36)
    shards = set(storage.opened)
    assert shards == set(index.labeled.shards)
    for world_size in (1, 4):
        text = coverage(settings, index, world_size)
        assert "every rank" in text and "rank 0" not in text and "unlabeled" not in text
        assert f"{len(shards)} shards, {mebibytes(shards)}" in text


def dry_run(rank, argv):
    # nothing for accelerate to warn of, and no proxy
    os.environ |= {"OMP_NUM_THREADS": "1", "no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1"}
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        code = main([*argv, "--dry_run"])
    return code, said.getvalue()


def command(root, tmp_path, *overrides):
    return [
        f"--data.root={root}",
        "--data.source=null",
        f"--data.cache={tmp_path / 'cache'}",
        f"--run_dir={tmp_path / 'run'}",
        "--data.labeled_batch=24",
        "--data.unlabeled_batch=48",
        f"--data.lanes={LANES}",
        "--train.fake_batch=12",
        "--train.steps=160",
        "--train.baseline_steps=0",
        *overrides,
    ]


def test_a_dry_run_tells_the_plan_and_reads_the_index_alone(prepared, tmp_path):
    root = prepared["packed"]
    index = load_index(root)
    with http_server(root) as server:
        settings = Config(
            data=DataConfig(server.url, labeled_batch=24, unlabeled_batch=48, lanes=LANES),
            train=TrainConfig(steps=160),
        )
        (code, text), other = run_ranks(2, dry_run, command(server.url, tmp_path))
        assert (code, other[0]) == (0, 0) and "reads" not in other[1]
        assert [path for path, _ in server.seen] == ["/index.json"]
    assert coverage(settings, index, 2) in text
    assert "windowed order" in text and f"{LANES} lanes" in text
    for numbers in ("24 labeled + 48 unlabeled + 12 generated", "12 + 24 + 6 a rank"):
        assert numbers in text
    assert "300 images in 5 shards" in text and "12.5 steps, 12.8 epochs in all" in text
    assert "3840 images in 55 shards" in text and "80.0 steps, 2.0 epochs in all" in text
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()


def test_a_world_that_does_not_fit_stops_first(prepared, tmp_path):
    root = prepared["packed"]
    with http_server(root) as server:
        for overrides, message in (
            (("--data.labeled_batch=25",), "data.labeled_batch is 25, which 2 processes"),
            (("--data.lanes=3",), "data.lanes is 3: it must be a multiple of the 2 process"),
            (("--train.fake_batch=9",), "train.fake_batch is 9"),
        ):
            server.seen.clear()
            argv = command(server.url, tmp_path, *overrides)
            (code, text), (other, nothing) = run_ranks(2, dry_run, argv)
            assert code == other == 2
            assert text.startswith("error: ") and message in text and nothing == ""
            assert text.count("\n") == 1
            assert [path for path, _ in server.seen] == ["/index.json"]
    assert not (tmp_path / "run").exists()
