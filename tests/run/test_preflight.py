"""What `plan` says is what happens: shards and bytes per rank, lanes and epochs. It reads the index."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import re
from collections.abc import Collection
from pathlib import Path

import pytest

from sgan_dist.cli import main
from sgan_dist.config import Config, parse
from sgan_dist.data.index import Shard, load_index, save, with_fingerprint
from sgan_dist.data.prepare import shards
from sgan_dist.data.prepare.shards import prepare
from sgan_dist.data.prepare.splits import Labels
from sgan_dist.data.remote.cache import Storage
from sgan_dist.data.stream import FullStream, WindowedStream
from sgan_dist.parallel.backends import open_backend
from sgan_dist.run.preflight import coverage, describe
from tests.ranks import run_ranks
from tests.servers import http_server

TRAIN = 3840  # 12 lanes of 320
LANES = 12

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """layout -> digits in windowed order, labeled ones included, in shards that span lanes."""
    folders = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "PACKED_BLOCK", 50)
        for layout in ("packed", "per-sample"):
            folders[layout] = tmp_path_factory.mktemp(layout) / "digits"
            index = prepare(
                "digits",
                folders[layout],
                labels=Labels(30),
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

    def __init__(self, config: Config) -> None:
        arguments = (config.data.root, config.remote)
        super().__init__(*arguments)
        self.opened: list[Shard] = []
        self._checking = Storage(*arguments)

    def unchanged(self, shard):
        return self._checking.unchanged(shard)

    def open(self, shard):
        if not shard.name.endswith(".samples.npy"):
            self.opened.append(shard)
        return super().open(shard)


def settings(root: Path | str, *overrides: str) -> list[str]:
    return [
        f"--data.root={root}",
        "--data.source=null",
        f"--stream.lanes={LANES}",
        "--batch.labeled=24",
        "--batch.unlabeled=48",
        "--batch.fake=12",
        "--train.steps=160",
        *overrides,
    ]


def planned(text: str, split: str) -> list[tuple[int, str]]:
    """(shards, MiB as printed) of every rank, from the lines of a split."""
    lines = text.splitlines()
    start = next(number for number, line in enumerate(lines) if line.split()[0] == split) + 1
    ranks: list[tuple[int, str]] = []
    for line in lines[start:]:
        match = re.fullmatch(r" +rank (\d+) reads (\d+) shards?, ([\d,.]+ MiB)", line)
        if match is None:
            break
        assert int(match[1]) == len(ranks)
        ranks.append((int(match[2]), match[3]))
    return ranks


def mebibytes(shards: Collection[Shard]) -> str:
    return f"{sum(shard.bytes for shard in shards) / 2**20:,.1f} MiB"


@pytest.mark.parametrize(
    ("layout", "world_size"),
    [("packed", 1), ("packed", 2), ("packed", 3), ("packed", 4), ("per-sample", 3)],
)
def test_ranks_read_what_is_planned(
    prepared: dict[str, Path], layout: str, world_size: int
) -> None:
    root = prepared[layout]
    index = load_index(root)
    one_a_lane = (f"--batch.labeled={LANES}", f"--batch.unlabeled={LANES}")
    small_windows = ("--stream.lane_window_mib=0.125", f"--seed={world_size}")
    config = parse(settings(root, *one_a_lane, *small_windows))
    text = coverage(config, index, world_size)
    assert f"{LANES} lanes of about {TRAIN // LANES} samples" in text
    for split in ("labeled", "unlabeled"):
        n = index.split(split).samples
        assert n % LANES == 0  # an epoch ends with a step
        expected = []
        for rank in range(world_size):
            storage = CountingStorage(config)
            share = range(rank * LANES // world_size, (rank + 1) * LANES // world_size)
            stream = WindowedStream(storage, index, split, config, LANES, share)
            for step in range(n // LANES):
                stream.take(step)
            expected.append((len(storage.opened), mebibytes(storage.opened)))
        assert planned(text, split) == expected
        # shards at borders are read by two lanes, and all are read
        assert sum(count for count, _ in expected) > len(index.split(split).shards)


def test_a_split_in_memory_is_read_by_every_rank(prepared: dict[str, Path]) -> None:
    root = prepared["packed"]
    index = load_index(root)
    index = dataclasses.replace(index, labeled=dataclasses.replace(index.labeled, order="full"))
    alone = ("--train.supervised_only=true", "--batch.labeled=36")
    config = parse(settings(root, *alone))
    storage = CountingStorage(config)
    FullStream(storage, index, "labeled", config, 36)
    opened = set(storage.opened)
    assert opened == set(index.labeled.shards)
    for world_size in (1, 4):
        text = coverage(config, index, world_size)
        assert "every rank" in text and "rank 0" not in text and "unlabeled" not in text
        assert f"{len(opened)} shards, {mebibytes(opened)}" in text


def plan(rank: int, arguments: list[str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `sgan-dist plan` on one rank."""
    # nothing for accelerate to warn of, and no proxy
    os.environ |= {"OMP_NUM_THREADS": "1", "no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1"}
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(stdout):
        code = main(["plan", *arguments])
    return code, stdout.getvalue(), stderr.getvalue()


def arguments(url: str, tmp_path: Path, *overrides: str) -> list[str]:
    folders = (f"--remote.cache={tmp_path / 'cache'}", f"--run_dir={tmp_path / 'run'}")
    return settings(url, *folders, *overrides)


@pytest.mark.process
def test_plan_reads_the_index_alone_and_writes_nothing(
    prepared: dict[str, Path], tmp_path: Path
) -> None:
    with http_server(prepared["packed"]) as server:
        line = arguments(server.url, tmp_path)
        (code, text, errors), other = run_ranks(2, plan, line)
        assert (code, errors) == (0, "") and other == (0, "", "")
        assert [path for path, _ in server.seen] == ["/index.json"]
    assert coverage(parse(line), load_index(prepared["packed"]), 2) in text
    assert "windowed order" in text and f"{LANES} lanes" in text
    for numbers in ("24 labeled + 48 unlabeled + 12 generated", "12 + 24 + 6 a rank"):
        assert numbers in text
    assert "300 images in 5 shards" in text and "12.5 steps, 12.8 epochs in all" in text
    assert "3840 images in 55 shards" in text and "80.0 steps, 2.0 epochs in all" in text
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()


@pytest.mark.process
def test_a_world_that_does_not_fit_is_refused_first(
    prepared: dict[str, Path], tmp_path: Path
) -> None:
    with http_server(prepared["packed"]) as server:
        for override, message in (
            ("--stream.lanes=5", "stream.lanes is 5: it must divide batch."),
            ("--stream.workers=99", "stream.workers is 99, but of the 2 process"),
        ):
            server.seen.clear()
            ranks = run_ranks(2, plan, arguments(server.url, tmp_path, override))
            (code, text, errors), other = ranks
            assert (code, text) == (2, "") and other == (2, "", "")
            assert errors.startswith("error: ") and message in errors, errors
            assert errors.count("\n") == 1
            assert [path for path, _ in server.seen] == ["/index.json"]
    assert not (tmp_path / "run").exists()


def test_small_shuffle_windows_are_a_warning(prepared: dict[str, Path]) -> None:
    index = load_index(prepared["packed"])

    def described(mib: float) -> str:
        options = ("--stream.lanes=2", f"--stream.lane_window_mib={mib}")
        config = parse(settings(prepared["packed"], *options))
        return describe(config, index, open_backend(config))

    assert "WARNING: unlabeled images are shuffled in windows of 1" in described(0.01)
    assert "WARNING" not in described(8)
