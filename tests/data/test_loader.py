"""The loader: one global batch for every world size and number of workers; how workers end."""

from __future__ import annotations

import dataclasses
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sgan_dist.config import Config
from sgan_dist.data.index import DatasetIndex, load_index
from sgan_dist.data.lanes import LaneWorkers
from sgan_dist.data.loader import (
    SemiSupervisedBatch,
    SemiSupervisedLoader,
    batch_rows,
    check_shares,
)
from sgan_dist.data.prepare.shards import prepare
from sgan_dist.data.prepare.splits import Labels
from sgan_dist.errors import UserError
from tests.data.datasets import LAYOUTS, data_config, in_windowed_order, with_split

REPOSITORY = Path(__file__).parents[2]
STEPS = 4
Tensors = dict[str, Tensor]  # the fields of a batch

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),
]


@pytest.fixture(scope="module", autouse=True)
def fresh_fork_server() -> Iterator[None]:
    """A process has one fork server; another test file may have started it, without the mask."""
    forkserver._forkserver._stop()  # type: ignore[attr-defined]
    yield
    forkserver._forkserver._stop()  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """layout -> folder: digits of which few are trained on, which keeps the tests fast."""
    folders = {}
    for layout in LAYOUTS:
        folders[layout] = tmp_path_factory.mktemp(layout) / "digits"
        prepare(
            "digits",
            folders[layout],
            labels=Labels(2),
            validation=3200,
            layout=layout,
            samples_per_shard=300,
            progress=False,
        )
    return folders


def tensors(batch: SemiSupervisedBatch) -> Tensors:
    return {
        field.name: getattr(batch, field.name)
        for field in dataclasses.fields(batch)
        if field.name not in ("step", "rows", "skips")
    }


def global_batches(
    index: DatasetIndex, config: Config, world_size: int = 1, start: int = 0
) -> list[Tensors]:
    """The ranks' slices end to end, for a few steps."""
    ranks = []
    for rank in range(world_size):
        with SemiSupervisedLoader(index, config, rank, world_size) as loader:
            batches = list(itertools.islice(loader.batches(start), STEPS))
        assert [batch.step for batch in batches] == list(range(start, start + STEPS))
        ranks.append([tensors(batch) for batch in batches])
    return [
        {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}
        for pieces in zip(*ranks, strict=True)
    ]


def assert_same(batches: list[Tensors], expected: list[Tensors]) -> None:
    for batch, other in zip(batches, expected, strict=True):
        assert all(torch.equal(batch[name], other[name]) for name in other)


@pytest.mark.process
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("windowed", [(), ("unlabeled",), ("labeled", "unlabeled")])
def test_every_world_and_number_of_workers_sees_the_same(
    prepared: dict[str, Path], layout: str, windowed: tuple[str, ...]
) -> None:
    root = prepared[layout]
    index = in_windowed_order(load_index(root), *windowed)
    expected = global_batches(index, data_config(root))
    first = expected[0]
    assert first["labeled"].shape == (48, 28, 28, 1) and first["unlabeled"].shape == (96, 28, 28, 1)
    assert first["labeled"].dtype == first["unlabeled"].dtype == torch.uint8
    assert first["labels"].dtype == first["unlabeled_ids"].dtype == torch.int64
    for world_size in (2, 3, 4, 5, 7, 50):  # of 24 lanes, 50 ranks have none or one
        assert_same(global_batches(index, data_config(root), world_size), expected)
    for world_size, workers in ((1, 1), (1, 3), (2, 3), (4, 1)) if windowed else ((1, 3),):
        config = data_config(root, workers=workers)
        assert_same(global_batches(index, config, world_size), expected)
    for workers in (0, 3):
        config = data_config(root, workers=workers)
        later = global_batches(index, config, start=STEPS - 1)
        assert_same(later[:1], expected[-1:])


def test_layouts_give_the_same_full_batches(prepared: dict[str, Path]) -> None:
    packed, per_sample = (
        global_batches(load_index(root), data_config(root)) for root in prepared.values()
    )
    assert_same(packed, per_sample)


def test_twenty_labels_are_enough_for_a_larger_batch(prepared: dict[str, Path]) -> None:
    root = prepared["packed"]
    orders: tuple[tuple[str, ...], ...] = ((), ("labeled",))
    for windowed in orders:
        index = in_windowed_order(load_index(root), *windowed)
        assert index.labeled.samples == 20
        batches = global_batches(index, data_config(root))
        ids = torch.cat([batch["labeled_ids"] for batch in batches])
        counts = torch.bincount(ids, minlength=20)
        assert counts.max() - counts.min() <= (1 if not windowed else 2)


def test_without_an_unlabeled_stream(prepared: dict[str, Path]) -> None:
    root = prepared["packed"]
    index = load_index(root)
    first = global_batches(index, data_config(root, supervised_only=True))[0]
    both = global_batches(index, data_config(root))[0]
    assert first["unlabeled"].shape == (0, 28, 28, 1) and first["unlabeled"].dtype == torch.uint8
    assert first["unlabeled_ids"].shape == (0,) and len(first["labeled"]) == 48
    assert_same([{"labeled": first["labeled"]}], [{"labeled": both["labeled"]}])


def test_other_seeds_give_other_batches(prepared: dict[str, Path]) -> None:
    root = prepared["packed"]
    index = in_windowed_order(load_index(root), "unlabeled")
    one, other = (global_batches(index, data_config(root, seed=seed))[0] for seed in (1, 2))
    assert not torch.equal(one["unlabeled_ids"], other["unlabeled_ids"])
    assert not torch.equal(one["labeled_ids"], other["labeled_ids"])


@pytest.mark.process
@pytest.mark.skipif("SGAN_DATA" not in os.environ, reason="SGAN_DATA is not set")
def test_mnist(tmp_path: Path) -> None:
    root = tmp_path / "mnist"
    spec = f"idx:{Path(os.environ['SGAN_DATA']) / 'mnist'}"
    index = prepare(spec, root, order="windowed", progress=False)
    config = data_config(root, unlabeled=2400, window_mib=16)
    with SemiSupervisedLoader(index, config, 0, 1) as loader:
        batches = loader.batches(0)
        # 55,000 = 22 steps of 2,400 samples and 2,200 more
        ids = torch.cat([next(batches).unlabeled_ids for _ in range(2 * 23)])
    counts = torch.bincount(ids, minlength=55000)
    assert counts.min() >= 2 and counts.max() <= 3
    expected = global_batches(index, config, start=20)
    for world_size, workers in ((3, 0), (2, 2)):
        config = data_config(root, unlabeled=2400, window_mib=16, workers=workers)
        assert_same(global_batches(index, config, world_size, start=20), expected)


@pytest.mark.parametrize(
    ("windowed", "world_size", "fields", "message"),
    [
        (("unlabeled",), 2, {"lanes": 5}, "lanes is 5: .* choose 1, 2, 3, 4, 6, 8"),
        (("unlabeled",), 1, {"lanes": 7}, "lanes is 7: .* divide batch.unlabeled = 96"),
        (("labeled", "unlabeled"), 1, {"lanes": 96}, "batch.labeled = 48 and batch.unlabeled = 96"),
        (("unlabeled",), 2, {"workers": 13}, "workers is 13, .* only 12 of the 24 lanes"),
    ],
)
def test_refused_combinations(
    prepared: dict[str, Path],
    windowed: tuple[str, ...],
    world_size: int,
    fields: dict[str, Any],
    message: str,
) -> None:
    index = in_windowed_order(load_index(prepared["packed"]), *windowed)
    with pytest.raises(UserError, match=message):
        SemiSupervisedLoader(index, data_config(prepared["packed"], **fields), 0, world_size)


def test_the_rows_of_ranks_make_the_batch(prepared: dict[str, Path]) -> None:
    index = in_windowed_order(load_index(prepared["packed"]), "unlabeled")
    config = data_config("nowhere")
    for world_size in (1, 5, 24, 100):
        for split, batch in config.batches.items():
            ranks = [batch_rows(index, config, split, r, world_size) for r in range(world_size)]
            assert [row for rows in ranks for row in rows] == list(range(batch))
            each = 1 if split == "labeled" else 4  # a lane's samples of a step
            assert max(map(len, ranks)) - min(map(len, ranks)) <= each


def test_shares_are_checked_without_data(prepared: dict[str, Path]) -> None:
    full = load_index(prepared["packed"])
    index = in_windowed_order(full, "unlabeled")
    for world_size in (1, 2, 5, 24, 100):
        check_shares(index, data_config("nowhere"), world_size)
    with pytest.raises(
        UserError, match=r"workers is 1, but of the 100 .* one has only 0 of the 24"
    ):
        check_shares(index, data_config("nowhere", workers=1), 100)
    with pytest.raises(UserError, match="lanes is 7"):
        check_shares(index, data_config("nowhere", lanes=7), 1)
    check_shares(full, data_config("nowhere", lanes=7), 1)


def test_an_empty_unlabeled_split_is_refused(prepared: dict[str, Path]) -> None:
    root = prepared["packed"]
    index = with_split(load_index(root), "unlabeled", samples=0, shards=())
    with pytest.raises(UserError, match="no unlabeled samples"):
        SemiSupervisedLoader(index, data_config(root), 0, 1)


def worker_pids(loader: SemiSupervisedLoader) -> list[int]:
    assert isinstance(loader._lanes, LaneWorkers)
    return [process.pid for process in loader._lanes.processes if process.pid is not None]


def process_state(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on; none where the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except FileNotFoundError:
        return []


def alive(pid: int) -> bool:
    return process_state(pid)[:1] not in ([], ["Z"])


def assert_gone(pids: Iterable[int], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < deadline, f"still alive: {pids}"
        time.sleep(0.05)


@pytest.fixture
def with_workers(prepared: dict[str, Path]) -> Iterator[SemiSupervisedLoader]:
    root = prepared["packed"]
    index = in_windowed_order(load_index(root), "unlabeled")
    with SemiSupervisedLoader(index, data_config(root, workers=2), 0, 1) as loader:
        yield loader


@pytest.mark.process
def test_a_killed_worker_is_an_error_and_no_hang(with_workers: SemiSupervisedLoader) -> None:
    batches = with_workers.batches(0)
    next(batches)
    pids = worker_pids(with_workers)
    os.kill(pids[1], signal.SIGKILL)
    with pytest.raises(UserError, match=f"data worker {pids[1]} died .exit code -9"):
        for _ in itertools.islice(batches, 10_000):
            pass
    with_workers.close()
    assert_gone(pids)


@pytest.mark.process
def test_close_ends_workers_even_stopped_ones(with_workers: SemiSupervisedLoader) -> None:
    next(with_workers.batches(0))
    pids = worker_pids(with_workers)
    os.kill(pids[0], signal.SIGSTOP)
    with_workers.close()
    assert_gone(pids)
    with_workers.close()
    assert next(with_workers.batches(7)).step == 7


@pytest.mark.process
def test_only_the_parent_ends_workers(with_workers: SemiSupervisedLoader) -> None:
    batches = with_workers.batches(0)
    next(batches)
    pids = worker_pids(with_workers)
    fork_server = int(process_state(pids[0])[1])
    assert fork_server != os.getpid()
    for pid in (*pids, fork_server):
        os.kill(pid, signal.SIGTERM)
        os.kill(pid, signal.SIGINT)
    for _ in itertools.islice(batches, 300):
        pass
    assert all(alive(pid) for pid in (*pids, fork_server))


@pytest.mark.process
def test_damage_that_a_worker_finds_is_one_sentence(tmp_path: Path) -> None:
    root = tmp_path / "digits"
    prepare("digits", root, samples_per_shard=600, progress=False)
    index = in_windowed_order(load_index(root), "unlabeled")
    for path in root.glob("unlabeled/*.tar"):
        path.write_bytes(b"\xff" * path.stat().st_size)
    message = r"^cannot read shard unlabeled/.*prepare the dataset again$"
    with (
        SemiSupervisedLoader(index, data_config(root, workers=2), 0, 1) as loader,
        pytest.raises(UserError, match=message),
    ):
        next(loader.batches(0))


SCRIPT = """
import sys, time
from sgan_dist.config import BatchConfig, Config, DataConfig, StreamConfig
from sgan_dist.data.index import load_index
from sgan_dist.data.loader import SemiSupervisedLoader

if __name__ == "__main__":
    root, end = sys.argv[1:]
    config = Config(
        data=DataConfig(root=root),
        batch=BatchConfig(labeled=8, unlabeled=8),
        stream=StreamConfig(lanes=4, workers=2),
    )
    loader = SemiSupervisedLoader(load_index(root), config, 0, 1)
    batches = loader.batches(0)
    next(batches)
    print(*(process.pid for process in loader._lanes.processes), flush=True)
    if end == "wait":
        time.sleep(600)
"""


def run_script(tmp_path: Path, end: str) -> tuple[subprocess.Popen[str], list[int]]:
    """Runs SCRIPT on prepared digits; returns the process and its workers' pids."""
    root = tmp_path / "digits"
    prepare("digits", root, order="windowed", progress=False)
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, str(script), str(root), end],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    )
    assert process.stdout is not None
    pids = [int(pid) for pid in process.stdout.readline().split()]
    assert len(pids) == 2
    return process, pids


@pytest.mark.process
def test_workers_die_with_their_parent(tmp_path: Path) -> None:
    process, pids = run_script(tmp_path, end="wait")
    assert all(alive(pid) for pid in pids)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert_gone(pids)


@pytest.mark.process
def test_a_program_that_does_not_close_ends_well(tmp_path: Path) -> None:
    process, pids = run_script(tmp_path, end="at once")
    assert process.wait(60) == 0
    assert_gone(pids)
