"""Ranks and workers may change at any checkpoint: still each sample is seen once an epoch.

1 -> 3 -> 2 -> 4 ranks at random steps, with 0, 1 or 2 workers each, over two epochs and a bit.
"""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Iterator, Sequence
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sgan_dist.config import Config
from sgan_dist.data.index import DatasetIndex, load_index, save
from sgan_dist.data.loader import SemiSupervisedLoader
from sgan_dist.data.order import WindowedOrder
from sgan_dist.data.prepare import shards
from sgan_dist.data.prepare.shards import prepare
from sgan_dist.data.prepare.splits import Labels
from sgan_dist.data.stream import window_samples
from tests.conftest import small_config
from tests.data.datasets import LAYOUTS, data_config, in_windowed_order
from tests.distributed.runs import EXACT, largest_difference, parameters, train_rank
from tests.ranks import CONTEXT, run_ranks, with_children
from tests.servers import FolderServer, environment, http_server

WORLDS = (1, 3, 2, 4)
BATCHES = {"labeled": 36, "unlabeled": 48}  # epochs of different lengths, in steps
STEPS = 46  # of 21.1 an epoch of unlabeled, 13.9 an epoch of labeled
LANES = 12
SEED = 5
PLACES = ("local", "http")
ORDERS = {  # the splits in windowed order; the others are held in memory
    "full": (),
    "unlabeled windowed": ("unlabeled",),
    "labeled windowed": ("labeled",),
    "windowed": ("labeled", "unlabeled"),
}

Batch = dict[str, np.ndarray[Any, Any]]

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),
]


@pytest.fixture(scope="module", autouse=True)
def fork_server() -> Iterator[None]:
    """A process has one fork server; this one's ranks reach 127.0.0.1 without a proxy."""
    forkserver._forkserver._stop()  # type: ignore[attr-defined]
    CONTEXT.set_forkserver_preload(["sgan_dist.run.trainer", "torch._dynamo"])
    with environment(no_proxy="127.0.0.1", NO_PROXY="127.0.0.1"):
        forkserver.ensure_running()
    yield
    forkserver._forkserver._stop()  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """layout -> digits in shards and packed blocks that no lane and no window divides."""
    folders = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "PACKED_BLOCK", 100)
        for layout in LAYOUTS:
            folders[layout] = tmp_path_factory.mktemp(layout) / "digits"
            prepare(
                "digits",
                folders[layout],
                labels=Labels(50),
                validation=2987,  # which leaves 1,013 images to train on
                layout=layout,
                samples_per_shard=130,
                progress=False,
            )
    return folders


@contextlib.contextmanager
def served(folder: Path, place: str) -> Iterator[tuple[str, FolderServer | None]]:
    """The root from which the dataset is read, and its server if there is one."""
    if place == "local":
        yield str(folder), None
        return
    with http_server(folder) as server:
        yield server.url, server


def config(root: str, tmp_path: Path, workers: int = 0) -> Config:
    return data_config(
        root,
        labeled=BATCHES["labeled"],
        unlabeled=BATCHES["unlabeled"],
        lanes=LANES,
        window_mib=0.125,  # a few windows for each lane and epoch
        workers=workers,
        cache=tmp_path / "cache",
        seed=SEED,
    )


def read(
    rank: int, index: DatasetIndex, config: Config, world_size: int, start: int, stop: int
) -> list[Batch]:
    """A rank's batches from one checkpoint to the next."""
    with SemiSupervisedLoader(index, config, rank, world_size) as loader:
        batches = list(itertools.islice(loader.batches(start), stop - start))
    assert [batch.step for batch in batches] == list(range(start, stop))
    names = ("labeled", "labels", "unlabeled", "labeled_ids", "unlabeled_ids")
    return [{name: getattr(batch, name).numpy() for name in names} for batch in batches]


def joined(ranks: list[list[Batch]]) -> list[Batch]:
    """The global batches: the ranks' slices end to end, in the order of the lanes."""
    return [
        {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
        for pieces in zip(*ranks, strict=True)
    ]


def stages(seed: int) -> list[tuple[int, int, int]]:
    """(world size, start, stop) for each of WORLDS, at random steps."""
    steps = sorted(random.Random(seed).sample(range(1, STEPS), len(WORLDS) - 1))
    return list(zip(WORLDS, [0, *steps], [*steps, STEPS], strict=True))


def uninterrupted(index: DatasetIndex, folder: Path, tmp_path: Path) -> list[Batch]:
    """The same steps by one rank, from local files, without a restart."""
    return read(0, index, config(str(folder), tmp_path), 1, 0, STEPS)


def epochs(index: DatasetIndex, name: str, config: Config) -> np.ndarray[Any, Any]:
    """The epoch of every sample of every global batch, (STEPS, batch), by arithmetic alone."""
    split, batch = index.split(name), BATCHES[name]
    if split.order == "full":
        return np.arange(STEPS * batch).reshape(STEPS, batch) // split.samples
    order = WindowedOrder(
        [shard.samples for shard in split.shards],
        LANES,
        window_samples(split, config.stream.lane_window_mib),
        SEED,
        name,
    )
    each = batch // LANES
    assert 2 * order.window < split.samples // LANES  # several windows for each lane and epoch
    return np.array(
        [
            [order.locate(lane, step * each + k)[0] for lane in range(LANES) for k in range(each)]
            for step in range(STEPS)
        ]
    )


def assert_once_an_epoch(index: DatasetIndex, batches: list[Batch], config: Config) -> None:
    for name, batch in BATCHES.items():
        n = index.split(name).samples
        tags = epochs(index, name, config).ravel()
        ids = np.concatenate([step[f"{name}_ids"] for step in batches])
        complete, more = divmod(STEPS * batch, n)
        assert complete >= 2 and more > 0
        for epoch in range(complete):
            assert sorted(ids[tags == epoch].tolist()) == list(range(n))
        last = ids[tags == complete].tolist()
        assert len(last) == more and len(set(last)) == more
        assert tags.max() == complete


def assert_same(batches: list[Batch], expected: list[Batch]) -> None:
    assert len(batches) == len(expected) == STEPS
    for step, (batch, other) in enumerate(zip(batches, expected, strict=True)):
        for name in other:
            assert np.array_equal(batch[name], other[name]), f"{name} of step {step}"


# orders, layout, place, seed, workers; a rank with workers takes seconds to start
SOME = [
    ("windowed", "packed", "http", 0, (0, 0, 0, 0)),
    ("unlabeled windowed", "per-sample", "http", 1, (0, 0, 0, 0)),
    ("full", "packed", "local", 2, (0, 0, 0, 0)),
]
MORE = [
    ("windowed", "per-sample", "http", 3, (2, 1, 0, 2)),
    ("labeled windowed", "packed", "local", 4, (0, 2, 1, 0)),
    ("unlabeled windowed", "packed", "http", 5, (1, 0, 2, 0)),
    ("windowed", "packed", "http", 7, (0, 0, 2, 1)),
    ("full", "per-sample", "http", 6, (0, 0, 0, 0)),
]


@pytest.mark.parametrize(
    ("orders", "layout", "place", "seed", "workers"),
    [*SOME, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)],
)
def test_processes_see_each_sample_once_an_epoch(
    orders: str,
    layout: str,
    place: str,
    seed: int,
    workers: tuple[int, ...],
    prepared: dict[str, Path],
    tmp_path: Path,
) -> None:
    folder = prepared[layout]
    batches = []
    with served(folder, place) as (root, server):
        index = in_windowed_order(load_index(root), *ORDERS[orders])
        for (world_size, start, stop), n in zip(stages(seed), workers, strict=True):
            args = (index, config(root, tmp_path, n), world_size, start, stop)
            batches += joined(run_ranks(world_size, with_children, read, *args))
        if server is not None:  # the samples did come from there
            requested = {path for path in server.requests if path.endswith(".tar")}
            shards = {f"/{s.name}" for name in BATCHES for s in index.split(name).shards}
            assert requested == shards
            assert {server.requests[path] for path in requested} == {1}
    assert_same(batches, uninterrupted(index, folder, tmp_path))
    assert_once_an_epoch(index, batches, config(root, tmp_path))


IN_TURN = [  # orders, layout, place, maximum of workers, seeds
    *((orders, "packed", "local", 0, range(10, 18)) for orders in ORDERS),
    ("full", "per-sample", "local", 0, (20,)),
    ("windowed", "per-sample", "local", 0, (21,)),
    ("windowed", "packed", "http", 2, (22,)),
]
MORE_IN_TURN = [
    *((orders, "packed", "local", 2, range(30, 33)) for orders in ORDERS if orders != "full"),
    *((orders, "packed", "http", 0, range(40, 43)) for orders in ORDERS),
    *((orders, "per-sample", "http", 2, (50,)) for orders in ORDERS),
]


@pytest.mark.parametrize(
    ("orders", "layout", "place", "max_workers", "seeds"),
    [*IN_TURN, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE_IN_TURN)],
    ids=lambda value: None if isinstance(value, str | int) else f"seeds-from-{value[0]}",
)
def test_any_checkpoints(
    orders: str,
    layout: str,
    place: str,
    max_workers: int,
    seeds: Sequence[int],
    prepared: dict[str, Path],
    tmp_path: Path,
) -> None:
    """The same for other steps, with the ranks one after the other in this process."""
    folder = prepared[layout]
    with served(folder, place) as (root, _):
        index = in_windowed_order(load_index(root), *ORDERS[orders])
        expected = uninterrupted(index, folder, tmp_path)
        assert_once_an_epoch(index, expected, config(root, tmp_path))
        for seed in seeds:
            rng = random.Random(f"workers {seed}")
            batches = []
            for world_size, start, stop in stages(seed):
                settings = config(root, tmp_path, rng.randint(0, max_workers))
                args = (index, settings, world_size, start, stop)
                batches += joined([read(rank, *args) for rank in range(world_size)])
            assert_same(batches, expected)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [(0, 0, 0, 0), (2, 0, 1, 0)], ids=["alone", "workers"])
def test_training_is_the_same(
    workers: tuple[int, ...], prepared: dict[str, Path], tmp_path: Path
) -> None:
    """Both streams windowed and read over http; float64."""
    folder = tmp_path / "digits"
    folder.symlink_to(prepared["packed"])
    options = (
        *EXACT,
        "--optim.decay=0",  # which depends on train.steps
        "--stream.lane_window_mib=0.08",
        "--batch.labeled=12",
        "--batch.unlabeled=48",
        f"--remote.cache={tmp_path / 'cache'}",
    )
    served_folder = tmp_path / "served"
    served_folder.mkdir()
    for split in ("labeled", "unlabeled", "validation", "test"):
        (served_folder / split).symlink_to(folder / split)
    save(in_windowed_order(load_index(folder), *ORDERS["windowed"]), served_folder)

    alone = small_config(served_folder, tmp_path / "alone", *options, "--train.steps=24")
    assert run_ranks(1, train_rank, alone) == [24]
    with http_server(served_folder) as server:
        for world_size, steps, n in zip(WORLDS, (5, 11, 16, 24), workers, strict=True):
            changing = small_config(
                Path(),
                tmp_path / "changing",
                *options,
                f"--data.root={server.url}",
                f"--train.steps={steps}",
                f"--stream.workers={n}",
            )
            reached = run_ranks(world_size, with_children, train_rank, changing)
            assert reached == [steps] * world_size
        assert any(path.startswith("/unlabeled/") for path in server.requests)
    runs = parameters(tmp_path / "alone"), parameters(tmp_path / "changing")
    assert largest_difference(*runs) < 1e-12
