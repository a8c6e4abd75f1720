"""Ranks and workers may change at any checkpoint: each sample is seen once an epoch, all the same.

1 -> 3 -> 2 -> 4 ranks at random steps, with 0, 1 or 2 workers each, over two epochs and a bit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import multiprocessing
import random
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sgan_dist.config import Config, DataConfig
from sgan_dist.data import prepare as preparing
from sgan_dist.data.index import DatasetIndex, load_index, save, with_fingerprint
from sgan_dist.data.loader import SemiSupervisedLoader
from sgan_dist.data.order import WindowedOrder
from sgan_dist.data.prepare import prepare
from sgan_dist.data.stream import window_samples
from sgan_dist.trainer import fit
from tests.conftest import small_config
from tests.distributed.test_world_size import EXACT, largest_difference, parameters
from tests.ranks import CONTEXT, run_ranks
from tests.servers import FolderServer, environment, http_server

WORLDS = (1, 3, 2, 4)
BATCHES = {"labeled": 36, "unlabeled": 48}  # epochs of different lengths, in steps
STEPS = 46  # of 21.1 an epoch of unlabeled, 13.9 an epoch of labeled
LANES = 12
SEED = 5
PLACES = ("local", "http")
LAYOUTS = ("packed", "per-sample")
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
    """A process has one; this one is for ranks that go past any proxy to 127.0.0.1."""
    forkserver._forkserver._stop()  # type: ignore[attr-defined]
    CONTEXT.set_forkserver_preload(["sgan_dist.trainer", "torch._dynamo"])
    with environment(no_proxy="127.0.0.1", NO_PROXY="127.0.0.1"):
        forkserver.ensure_running()
    yield
    forkserver._forkserver._stop()  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """layout -> digits in shards, and packed in blocks, that no lane and no window divides."""
    folders = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparing, "PACKED_BLOCK", 100)
        for layout in LAYOUTS:
            folders[layout] = tmp_path_factory.mktemp(layout) / "digits"
            prepare(
                "digits",
                folders[layout],
                labels_per_class=50,
                validation=2987,  # which leaves 1,013 images to train on
                layout=layout,
                samples_per_shard=130,
                progress=False,
            )
    return folders


@contextlib.contextmanager
def served(folder: Path, place: str) -> Iterator[tuple[str, FolderServer | None]]:
    """Where the dataset is read from."""
    if place == "local":
        yield str(folder), None
        return
    with http_server(folder) as server:
        yield server.url, server


def windowed(index: DatasetIndex, splits: tuple[str, ...]) -> DatasetIndex:
    orders = {name: dataclasses.replace(index.split(name), order="windowed") for name in splits}
    return with_fingerprint(dataclasses.replace(index, **orders))  # type: ignore[arg-type]


def config(root: str, tmp_path: Path, workers: int = 0) -> DataConfig:
    return DataConfig(
        root=root,
        labeled_batch=BATCHES["labeled"],
        unlabeled_batch=BATCHES["unlabeled"],
        lanes=LANES,
        window_mib=0.125,  # type: ignore[arg-type]  # a few windows for each lane and epoch
        workers=workers,
        cache=str(tmp_path / "cache"),
    )


def with_children(rank: int, work: Callable[..., Any], *args: Any) -> Any:
    """`work(rank, *args)` in a process of `run_ranks`, which are daemons, and may have no workers."""
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    return work(rank, *args)


def read(
    rank: int, index: DatasetIndex, data: DataConfig, world_size: int, start: int, stop: int
) -> list[Batch]:
    """What a rank gets from one checkpoint to the next."""
    with SemiSupervisedLoader(index, data, SEED, rank, world_size) as loader:
        batches = list(itertools.islice(loader.batches(start), stop - start))
    assert [batch.step for batch in batches] == list(range(start, stop))
    names = ("labeled", "labels", "unlabeled", "labeled_ids", "unlabeled_ids")
    return [{name: getattr(batch, name).numpy() for name in names} for batch in batches]


def joined(ranks: list[list[Batch]]) -> list[Batch]:
    """The global batches: the ranks' parts end to end, in the order of the lanes."""
    return [
        {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        for parts in zip(*ranks, strict=True)
    ]


def stages(seed: int) -> list[tuple[int, int, int]]:
    """(world size, start, stop), at random steps; each world makes some."""
    steps = sorted(random.Random(seed).sample(range(1, STEPS), len(WORLDS) - 1))
    return list(zip(WORLDS, [0, *steps], [*steps, STEPS], strict=True))


def uninterrupted(index: DatasetIndex, folder: Path, tmp_path: Path) -> list[Batch]:
    """The same steps by one rank, from local files, without a break."""
    return read(0, index, config(str(folder), tmp_path), 1, 0, STEPS)


def epochs(index: DatasetIndex, name: str, data: DataConfig) -> np.ndarray[Any, Any]:
    """The epoch of every sample of every global batch, (STEPS, batch), by arithmetic alone."""
    split, batch = index.split(name), BATCHES[name]
    if split.order == "full":
        return np.arange(STEPS * batch).reshape(STEPS, batch) // split.samples
    order = WindowedOrder(
        [shard.samples for shard in split.shards],
        LANES,
        window_samples(split, LANES, data.window_mib),
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


def assert_once_an_epoch(index: DatasetIndex, batches: list[Batch], data: DataConfig) -> None:
    for name, batch in BATCHES.items():
        n = index.split(name).samples
        tags = epochs(index, name, data).ravel()
        ids = np.concatenate([step[f"{name}_ids"] for step in batches])
        complete, more = divmod(STEPS * batch, n)
        assert complete >= 2 and more > 0
        for epoch in range(complete):
            assert sorted(ids[tags == epoch].tolist()) == list(range(n))
        last = ids[tags == complete].tolist()
        assert len(last) == more and len(set(last)) == more
        assert tags.max() == complete


def assert_same(got: list[Batch], expected: list[Batch]) -> None:
    assert len(got) == len(expected) == STEPS
    for step, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
        for name in theirs:
            assert np.array_equal(ours[name], theirs[name]), f"{name} of step {step}"


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
    got = []
    with served(folder, place) as (root, server):
        index = windowed(load_index(root), ORDERS[orders])
        for (world_size, start, stop), n in zip(stages(seed), workers, strict=True):
            args = (index, config(root, tmp_path, n), world_size, start, stop)
            got += joined(run_ranks(world_size, with_children, read, *args))
        if server is not None:
            asked = {path for path in server.requests if path.endswith(".tar")}
            shards = {f"/{s.name}" for name in BATCHES for s in index.split(name).shards}
            assert asked == shards  # it was really there that the samples came from
            assert {server.requests[path] for path in asked} == {1}
    assert_same(got, uninterrupted(index, folder, tmp_path))
    assert_once_an_epoch(index, got, config(root, tmp_path))


IN_TURN = [  # orders, layout, place, most workers, seeds
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
    ("orders", "layout", "place", "most_workers", "seeds"),
    [*IN_TURN, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE_IN_TURN)],
    ids=lambda value: None if isinstance(value, str | int) else f"seeds-from-{value[0]}",
)
def test_any_checkpoints(
    orders: str,
    layout: str,
    place: str,
    most_workers: int,
    seeds: Sequence[int],
    prepared: dict[str, Path],
    tmp_path: Path,
) -> None:
    """The same of other steps, with the ranks one after the other in this process."""
    folder = prepared[layout]
    with served(folder, place) as (root, _):
        index = windowed(load_index(root), ORDERS[orders])
        expected = uninterrupted(index, folder, tmp_path)
        assert_once_an_epoch(index, expected, config(root, tmp_path))
        for seed in seeds:
            draw = random.Random(f"workers {seed}")
            got = []
            for world_size, start, stop in stages(seed):
                data = config(root, tmp_path, draw.randint(0, most_workers))
                ranks = [
                    read(rank, index, data, world_size, start, stop) for rank in range(world_size)
                ]
                got += joined(ranks)
            assert_same(got, expected)


def train(rank: int, config: Config) -> int:
    return fit(config)


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
        "--data.window_mib=1",
        "--data.labeled_batch=12",
        "--data.unlabeled_batch=48",
        f"--data.cache={tmp_path / 'cache'}",
    )
    served_folder = tmp_path / "served"
    served_folder.mkdir()
    for split in ("labeled", "unlabeled", "validation", "test"):
        (served_folder / split).symlink_to(folder / split)
    save(windowed(load_index(folder), ORDERS["windowed"]), served_folder)

    alone = small_config(served_folder, tmp_path / "alone", *options, "--train.steps=24")
    assert run_ranks(1, train, alone) == [0]
    with http_server(served_folder) as server:
        for world_size, steps, n in zip(WORLDS, (5, 11, 16, 24), workers, strict=True):
            changing = small_config(
                Path(),
                tmp_path / "changing",
                *options,
                f"--data.root={server.url}",
                f"--train.steps={steps}",
                f"--data.workers={n}",
            )
            assert run_ranks(world_size, with_children, train, changing) == [0] * world_size
        assert any(path.startswith("/unlabeled/") for path in server.requests)
    found = largest_difference(parameters(tmp_path / "alone"), parameters(tmp_path / "changing"))
    assert found < 1e-12
