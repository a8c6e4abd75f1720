"""The loader: one global batch for every world and number of workers; workers' lives and deaths."""

import dataclasses
import itertools
import os
import signal
import subprocess
import sys
import time
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch

from sgan_dist.config import DataConfig
from sgan_dist.data.index import load_index
from sgan_dist.data.loader import SemiSupervisedLoader, check_shares
from sgan_dist.data.prepare import prepare
from sgan_dist.errors import UserError

REPOSITORY = Path(__file__).parents[2]
LAYOUTS = ("packed", "per-sample")
STEPS = 4

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),
]


@pytest.fixture(scope="module", autouse=True)
def fresh_fork_server():
    """A process has one fork server; another test file may have started it, without the mask."""
    forkserver._forkserver._stop()
    yield
    forkserver._forkserver._stop()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folders = {}
    for layout in LAYOUTS:
        folders[layout] = tmp_path_factory.mktemp(layout) / "digits"
        # much validation leaves few images to train on, which keeps the tests fast
        prepare(
            "digits",
            folders[layout],
            labels_per_class=2,
            validation=3200,
            layout=layout,
            samples_per_shard=300,
            progress=False,
        )
    return folders


def loaded(root, *windowed):
    """The index, with these splits in windowed order."""
    index = load_index(root)
    orders = {
        split: dataclasses.replace(index.split(split), order="windowed") for split in windowed
    }
    return dataclasses.replace(index, **orders)


def config(root, **fields):
    defaults = {"labeled_batch": 48, "unlabeled_batch": 96, "lanes": 24, "window_mib": 1}
    return DataConfig(**{"root": str(root)} | defaults | fields)


def tensors(batch):
    return {
        field.name: getattr(batch, field.name)
        for field in dataclasses.fields(batch)
        if field.name not in ("step", "skips")
    }


def take(index, data, world_size=1, start=0, seed=5):
    """Global batches: the ranks' slices end to end, for a few steps."""
    ranks = []
    for rank in range(world_size):
        with SemiSupervisedLoader(index, data, seed, rank, world_size) as loader:
            batches = list(itertools.islice(loader.batches(start), STEPS))
        assert [batch.step for batch in batches] == list(range(start, start + STEPS))
        ranks.append([tensors(batch) for batch in batches])
    return [
        {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        for parts in zip(*ranks, strict=True)
    ]


def assert_same(got, expected):
    for ours, theirs in zip(got, expected, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("windowed", [(), ("unlabeled",), ("labeled", "unlabeled")])
def test_every_world_and_number_of_workers_sees_the_same(prepared, layout, windowed):
    root = prepared[layout]
    index = loaded(root, *windowed)
    expected = take(index, config(root))
    first = expected[0]
    assert first["labeled"].shape == (48, 28, 28, 1) and first["unlabeled"].shape == (96, 28, 28, 1)
    assert first["labeled"].dtype == first["unlabeled"].dtype == torch.uint8
    assert first["labels"].dtype == first["unlabeled_ids"].dtype == torch.int64
    for world_size in (2, 3, 4):
        assert_same(take(index, config(root), world_size), expected)
    for world_size, workers in ((1, 1), (1, 3), (2, 3), (4, 1)) if windowed else ((1, 3),):
        assert_same(take(index, config(root, workers=workers), world_size), expected)
    for workers in (0, 3):
        later = take(index, config(root, workers=workers), start=STEPS - 1)
        assert_same(later[:1], expected[-1:])


def test_layouts_give_the_same_full_batches(prepared):
    packed, per_sample = (take(loaded(prepared[x]), config(prepared[x])) for x in LAYOUTS)
    assert_same(packed, per_sample)


def test_twenty_labels_are_enough_for_a_larger_batch(prepared):
    root = prepared["packed"]
    for windowed in ((), ("labeled",)):
        index = loaded(root, *windowed)
        assert index.labeled.samples == 20
        ids = torch.cat([batch["labeled_ids"] for batch in take(index, config(root))])
        counts = torch.bincount(ids, minlength=20)
        assert counts.max() - counts.min() <= (1 if not windowed else 2)


def test_without_an_unlabeled_stream(prepared):
    root = prepared["packed"]
    first = take(loaded(root), config(root, unlabeled_batch=0))[0]
    both = take(loaded(root), config(root))[0]
    assert first["unlabeled"].shape == (0, 28, 28, 1) and first["unlabeled"].dtype == torch.uint8
    assert first["unlabeled_ids"].shape == (0,) and len(first["labeled"]) == 48
    assert_same([{"labeled": first["labeled"]}], [{"labeled": both["labeled"]}])


def test_other_seeds_give_other_batches(prepared):
    index = loaded(prepared["packed"], "unlabeled")
    data = config(prepared["packed"])
    one, other = take(index, data, seed=1)[0], take(index, data, seed=2)[0]
    assert not torch.equal(one["unlabeled_ids"], other["unlabeled_ids"])
    assert not torch.equal(one["labeled_ids"], other["labeled_ids"])


@pytest.mark.skipif("SGAN_DATA" not in os.environ, reason="SGAN_DATA is not set")
def test_mnist(tmp_path):
    root = tmp_path / "mnist"
    spec = f"idx:{Path(os.environ['SGAN_DATA']) / 'mnist'}"
    index = prepare(spec, root, order="windowed", progress=False)
    data = config(root, unlabeled_batch=2400, window_mib=16)
    with SemiSupervisedLoader(index, data, 0, 0, 1) as loader:
        batches = loader.batches(0)
        # 55,000 = 22 steps of 2,400 samples and 2,200 more
        ids = torch.cat([next(batches).unlabeled_ids for _ in range(2 * 23)])
    counts = torch.bincount(ids, minlength=55000)
    assert counts.min() >= 2 and counts.max() <= 3
    for world_size, workers in ((3, 0), (2, 2)):
        expected = take(index, data, start=20)
        assert_same(
            take(index, dataclasses.replace(data, workers=workers), world_size, 20), expected
        )


@pytest.mark.parametrize(
    ("windowed", "world_size", "fields", "message"),
    [
        ((), 5, {}, "labeled_batch is 48, which 5 processes .* 1, 2, 3, 4, 6, 8, 12, 16, 24 or 48"),
        ((), 3, {"unlabeled_batch": 64}, "unlabeled_batch is 64, which 3 .* multiple of 3"),
        (("unlabeled",), 2, {"lanes": 3}, "lanes is 3: .* multiple of the 2 .* choose 2, 4, 6, 8"),
        (("unlabeled",), 1, {"lanes": 7}, "lanes is 7: .* divide data.unlabeled_batch = 96"),
        (("labeled", "unlabeled"), 1, {"lanes": 96}, "labeled_batch = 48 and data.unlabeled_b"),
        (("unlabeled",), 2, {"workers": 13}, "workers is 13, .* only 12 of the 24 lanes"),
    ],
)
def test_refused_combinations(prepared, windowed, world_size, fields, message):
    root = prepared["packed"]
    with pytest.raises(UserError, match=message):
        SemiSupervisedLoader(loaded(root, *windowed), config(root, **fields), 0, 0, world_size)


def test_shares_are_checked_without_data(prepared):
    index = loaded(prepared["packed"], "unlabeled")
    for world_size in (1, 2, 24):
        check_shares(index, config("nowhere"), world_size)
    with pytest.raises(UserError, match="labeled_batch is 48, which 5 processes"):
        check_shares(index, config("nowhere"), 5)
    with pytest.raises(UserError, match="lanes is 7"):
        check_shares(index, config("nowhere", lanes=7), 1)
    check_shares(loaded(prepared["packed"]), config("nowhere", lanes=7), 1)


def test_an_empty_unlabeled_split_is_refused(prepared):
    index = loaded(prepared["packed"])
    empty = dataclasses.replace(index.unlabeled, samples=0, shards=())
    with pytest.raises(UserError, match="no unlabeled samples"):
        SemiSupervisedLoader(
            dataclasses.replace(index, unlabeled=empty), config(prepared["packed"]), 0, 0, 1
        )


def worker_pids(loader):
    return [process.pid for process in loader._processes]


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def assert_gone(pids, seconds=30):
    deadline = time.monotonic() + seconds
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < deadline, f"still alive: {pids}"
        time.sleep(0.05)


@pytest.fixture
def with_workers(prepared):
    root = prepared["packed"]
    with SemiSupervisedLoader(
        loaded(root, "unlabeled"), config(root, workers=2), 0, 0, 1
    ) as loader:
        yield loader


def test_a_killed_worker_is_an_error_and_no_hang(with_workers):
    batches = with_workers.batches(0)
    next(batches)
    pids = worker_pids(with_workers)
    os.kill(pids[1], signal.SIGKILL)
    with pytest.raises(UserError, match=f"data worker {pids[1]} died .exit code -9"):
        for _ in itertools.islice(batches, 10_000):
            pass
    with_workers.close()
    assert_gone(pids)


def test_close_ends_workers_even_stopped_ones(with_workers):
    next(with_workers.batches(0))
    pids = worker_pids(with_workers)
    os.kill(pids[0], signal.SIGSTOP)
    with_workers.close()
    assert_gone(pids)
    with_workers.close()
    assert next(with_workers.batches(7)).step == 7


def test_only_the_parent_ends_workers(with_workers):
    batches = with_workers.batches(0)
    next(batches)
    pids = worker_pids(with_workers)
    fork_server = int(Path(f"/proc/{pids[0]}/stat").read_text().rsplit(")", 1)[1].split()[1])
    assert fork_server != os.getpid()
    for pid in (*pids, fork_server):
        os.kill(pid, signal.SIGTERM)
        os.kill(pid, signal.SIGINT)
    for _ in itertools.islice(batches, 300):
        pass
    assert all(alive(pid) for pid in (*pids, fork_server))


def test_damage_found_by_a_worker_is_one_sentence(prepared, tmp_path):
    root = tmp_path / "digits"
    prepare("digits", root, samples_per_shard=600, progress=False)
    index = loaded(root, "unlabeled")
    for path in root.glob("unlabeled/*.tar"):
        path.write_bytes(b"\xff" * path.stat().st_size)
    with (
        SemiSupervisedLoader(index, config(root, workers=2), 0, 0, 1) as loader,
        pytest.raises(
            UserError, match=r"^cannot read shard unlabeled/.*prepare the dataset again$"
        ),
    ):
        next(loader.batches(0))


SCRIPT = """
import sys, time
from sgan_dist.config import DataConfig
from sgan_dist.data.index import load_index
from sgan_dist.data.loader import SemiSupervisedLoader

if __name__ == "__main__":
    root, then = sys.argv[1:]
    data = DataConfig(root=root, labeled_batch=8, unlabeled_batch=8, lanes=4, workers=2)
    loader = SemiSupervisedLoader(load_index(root), data, 0, 0, 1)
    batches = loader.batches(0)
    next(batches)
    print(*(process.pid for process in loader._processes), flush=True)
    if then == "wait":
        time.sleep(600)
"""


def run_script(tmp_path, then):
    root = tmp_path / "digits"
    prepare("digits", root, order="windowed", progress=False)
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, str(script), str(root), then],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    )
    pids = [int(pid) for pid in process.stdout.readline().split()]
    assert len(pids) == 2
    return process, pids


def test_workers_die_with_their_parent(tmp_path):
    process, pids = run_script(tmp_path, "wait")
    assert all(alive(pid) for pid in pids)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert_gone(pids)


def test_a_program_that_forgets_to_close_ends_well(tmp_path):
    process, pids = run_script(tmp_path, "end")
    assert process.wait(60) == 0
    assert_gone(pids)
