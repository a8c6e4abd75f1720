"""Training over http: what passes changes nothing; what stays stops all ranks with one message."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import re
import shutil
import struct
import tarfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sgan_dist.data import prepare as preparing
from sgan_dist.data import remote
from sgan_dist.data.index import DatasetIndex, load_index, save, with_fingerprint
from sgan_dist.data.prepare import prepare
from sgan_dist.data.sources import load_source
from sgan_dist.trainer import main
from tests.distributed.test_elastic import with_children
from tests.distributed.test_world_size import EXACT, largest_difference, parameters
from tests.ranks import CONTEXT, run, run_ranks
from tests.servers import Fault, Handler, cut, drop, garble, http_server, slow, status

LAYOUTS = ("packed", "per-sample")
BLOCK, SHARD = 5, 10  # samples
TRAIN = (
    660  # images of 84 x 84, so an epoch is 13.75 steps, and a window of 1 MiB less than a third
)

Outcome = tuple[int, str]  # exit code, and what was said

pytestmark = [
    pytest.mark.timeout(240),
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),
]


@pytest.fixture(scope="module", autouse=True)
def fork_server() -> Iterator[None]:
    """A process has one; this one saves each rank an import of seconds."""
    forkserver._forkserver._stop()  # type: ignore[attr-defined]
    CONTEXT.set_forkserver_preload(["sgan_dist.trainer", "torch._dynamo"])
    forkserver.ensure_running()
    yield
    forkserver._forkserver._stop()  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """layout -> a few large digits in many small shards; the unlabeled ones are windowed."""
    digits = load_source("digits")
    source = tmp_path_factory.mktemp("idx")
    order = np.random.default_rng(0).permutation(len(digits.train_images))
    parts = {"train": order[: TRAIN + 40], "t10k": order[TRAIN + 40 : TRAIN + 100]}
    for part, rows in parts.items():
        images = np.kron(digits.train_images[rows, :, :, 0], np.ones((1, 3, 3), np.uint8))
        for name, array in (("images-idx3", images), ("labels-idx1", digits.train_labels[rows])):
            header = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
            (source / f"{part}-{name}-ubyte").write_bytes(header + array.astype("u1").tobytes())
    folders = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparing, "PACKED_BLOCK", BLOCK)
        for layout in LAYOUTS:
            folders[layout] = tmp_path_factory.mktemp(layout) / "digits"
            prepare(
                f"idx:{source}",
                folders[layout],
                labels_per_class=6,
                validation=40,
                layout=layout,
                order="windowed",
                samples_per_shard=SHARD,
                progress=False,
            )
    return folders


def command(root: Path | str, directory: Path, *overrides: str) -> list[str]:
    """A short run of small networks: a little more than an epoch."""
    return [
        f"--data.root={root}",
        "--data.source=null",
        f"--data.cache={directory.parent / 'cache'}",
        f"--run_dir={directory}",
        "--name=small",
        "--data.labeled_batch=12",
        "--data.unlabeled_batch=48",
        "--data.lanes=12",
        "--data.window_mib=1",
        "--data.tries=4",
        "--train.fake_batch=12",
        "--model.discriminator=mlp",
        "--model.generator=mlp",
        '--model.discriminator_args={"sizes": [40, 20]}',
        '--model.generator_args={"width": 20}',
        "--optim.decay=0",
        "--loss.consistency=0",
        "--augment.elastic=0",
        "--train.steps=16",
        "--train.baseline_steps=0",
        "--train.log_every=1",
        "--train.evaluate_every=0",
        "--train.sample_every=0",
        "--checkpoint.every=4",
        "--tracking.wandb=false",
        *overrides,
    ]


def train(rank: int, argv: list[str]) -> Outcome:
    """launch/train.py, on one rank of a launcher; waits between tries are short."""
    # nothing for accelerate to warn of, and no proxy
    os.environ |= {"OMP_NUM_THREADS": "1", "no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1"}
    remote.BACKOFF_SECONDS = 0.05
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        code = main(argv)
    return code, said.getvalue()


def launch(world_size: int, *argv: Any) -> list[Outcome]:
    return run_ranks(world_size, with_children, train, command(*argv))


def assert_done(outcomes: list[Outcome]) -> str:
    """All ranks ended well; returns what they said."""
    text = "".join(said for _, said in outcomes)
    assert [code for code, _ in outcomes] == [0] * len(outcomes), text
    return text


def assert_stopped(outcomes: list[Outcome], directory: Path, code: int = 2) -> str:
    """All ranks stopped with one message, which is returned; FAILED holds it unless it may pass."""
    assert [found for found, _ in outcomes] == [code] * len(outcomes)
    first, *others = (said for _, said in outcomes)
    # ranks tell of their own retries, and rank 0 alone of errors
    assert all(line.startswith("retrying ") for said in others for line in said.splitlines())
    messages = re.findall(r"^error: .*", first, re.MULTILINE)
    assert len(messages) == 1 and "Traceback" not in first, first
    message: str = messages[0].removeprefix("error: ")
    if code == 2:
        assert (directory / "FAILED").read_text() == message + "\n"
    else:
        assert not (directory / "FAILED").exists()
    assert not (directory / "DONE").exists()
    return message


def summary(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "summary.json").read_text())  # type: ignore[no-any-return]


def metrics(directory: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]


def assert_same_run(ours: Path, theirs: Path) -> None:
    assert summary(ours)["weights_sha256"] == summary(theirs)["weights_sha256"]
    assert metrics(ours) == metrics(theirs)
    assert summary(ours)["test_error"] == summary(theirs)["test_error"]


@pytest.fixture(scope="module")
def local(
    prepared: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], Path]:
    """world size -> a run on local files, made once."""
    runs: dict[int, Path] = {}

    def of(world_size: int) -> Path:
        if world_size not in runs:
            runs[world_size] = tmp_path_factory.mktemp("local") / "run"
            assert_done(launch(world_size, prepared["packed"], runs[world_size]))
        return runs[world_size]

    return of


def names(index: DatasetIndex, *splits: str) -> list[str]:
    return [f"/{shard.name}" for split in splits for shard in index.split(split).shards]


def test_a_bad_server_changes_nothing(
    prepared: dict[str, Path], local: Callable[[int], Path], tmp_path: Path
) -> None:
    root = prepared["packed"]
    index = load_index(root)
    with http_server(root) as server:
        passing: list[list[Fault]] = [
            [status(500), drop],
            [drop],
            [slow(5, 0.02)],
            [status(503), slow(3, 0.02), drop],  # the slow one is good
            [cut],
            [garble, garble],
            [],
        ]
        shards = names(index, "labeled", "unlabeled", "validation", "test")
        for number, path in enumerate(shards):
            server.faults[path] = list(passing[number % len(passing)])
            server.faults[f"{path}.offsets.npy"] = [[], [status(500)], [drop]][number % 3].copy()
        server.faults["/index.json"] = [status(502), drop]
        assert_done(launch(2, server.url, tmp_path / "run"))
        assert {path for path in server.requests if path.endswith(".tar")} == set(shards)
        assert server.requests["/index.json"] >= 3
        assert sum(map(len, server.faults.values())) < len(shards)  # type: ignore[arg-type]
        config = (tmp_path / "run" / "config.yaml").read_text()
        assert f"root: {server.url}\n" in config  # where a report finds it again
    assert_same_run(tmp_path / "run", local(2))


@pytest.mark.parametrize(
    ("split", "fault"),
    [
        ("unlabeled", garble),
        pytest.param("unlabeled", cut, marks=pytest.mark.slow),
        pytest.param("labeled", garble, marks=pytest.mark.slow),
    ],
)
def test_a_shard_that_was_changed_is_named(
    split: str, fault: Fault, prepared: dict[str, Path], tmp_path: Path
) -> None:
    index = load_index(prepared["packed"])
    shard = index.split(split).shards[2].name
    run = tmp_path / "run"
    with http_server(prepared["packed"]) as server:
        server.faults[f"/{shard}"] = fault
        message = assert_stopped(launch(2, server.url, run, "--data.tries=2"), run)
        assert shard in message and "no longer match the index" in message
        assert server.requests[f"/{shard}"] <= 2 * 2 * 2  # tries, of each rank: ahead, and opening


def closing_after(shards: int) -> Fault:
    """Good answers to this many requests; then the server is gone."""
    left = iter(range(shards))

    def fault(handler: Handler, body: bytes) -> None:
        if next(left, None) is None:
            if not handler.outer.closing.is_set():
                handler.outer.closing.set()
                threading.Thread(target=handler.outer.close).start()
            return
        handler.begin(len(body))
        handler.wfile.write(body)

    return fault


def test_a_server_that_is_gone_stops_all_and_is_waited_for_by_nobody(
    prepared: dict[str, Path], local: Callable[[int], Path], tmp_path: Path
) -> None:
    root = prepared["packed"]
    index = load_index(root)
    directory = tmp_path / "run"
    options = ("--data.tries=2", "--data.timeout=5")
    with http_server(root) as server:
        server.faults |= dict.fromkeys(names(index, "unlabeled"), closing_after(50))
        outcomes = launch(2, server.url, directory, *options)
    message = assert_stopped(outcomes, directory, code=75)
    assert re.search(
        r"cannot download \S+/unlabeled/0000\d\d\.tar(.offsets.npy)? \(.*2 tries", message
    )
    done = len(metrics(directory))
    assert 3 <= done < 16  # a window was used at least
    # the shards come back at another address, and the run goes on as if nothing had been
    with http_server(root) as server:
        assert_done(launch(2, server.url, directory, *options))
    assert not (directory / "FAILED").exists()
    assert_same_run(directory, local(2))


def damaged(source: Path, folder: Path) -> tuple[DatasetIndex, dict[str, int]]:
    """A copy some records of which were damaged when it was indexed; these records, with samples.

    Of unlabeled shards that different ranks read, and of a labeled one.
    """
    shutil.copytree(source, folder)
    index, records = load_index(folder), {}
    for split, number, nth, broken in (
        *(("unlabeled", number, number % 2 - 1, "images.npy .png") for number in (0, 21, 40, 61)),
        ("labeled", 1, 0, "labels.npy .cls"),
    ):
        shard = index.split(split).shards[number]
        path = folder / shard.name
        with tarfile.open(path) as tar:
            files = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        name = [name for name in files if name.endswith(tuple(broken.split()))][nth]
        files[name] = b"broken"
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for key, data in files.items():
                member = tarfile.TarInfo(key)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        path.with_name(f"{path.name}.offsets.npy").unlink()
        data = path.read_bytes()
        fresh = dataclasses.replace(shard, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
        shards = list(index.split(split).shards)
        shards[number] = fresh
        changed = dataclasses.replace(index.split(split), shards=tuple(shards))
        index = dataclasses.replace(index, **{split: changed})  # type: ignore[arg-type]
        record = range(-(-shard.samples // changed.block))[nth]
        records[f"{shard.name}, record {record}"] = changed.block
    index = with_fingerprint(index)
    save(index, folder)
    return index, records


@pytest.mark.parametrize(
    ("layout", "stages"),
    [
        ("packed", [(2, 0, 18), (1, 0, 32)]),
        pytest.param("packed", [(2, 2, 32)], marks=pytest.mark.slow),
        pytest.param("per-sample", [(2, 0, 17), (1, 2, 32)], marks=pytest.mark.slow),
    ],
    ids=["packed", "packed-workers", "per-sample"],
)
def test_records_that_were_indexed_damaged_are_skipped(
    layout: str,
    stages: list[tuple[int, int, int]],
    prepared: dict[str, Path],
    tmp_path: Path,
) -> None:
    """By any ranks, workers and resumes alike: counted, and named once."""
    _, records = damaged(prepared[layout], tmp_path / "digits")
    total = sum(records.values())
    # two epochs and more; as many as may be
    options = (*EXACT, "--train.steps=32", f"--data.max_skips={total}")
    said = {"alone": "", "changing": ""}
    with http_server(tmp_path / "digits") as server:
        said["alone"] = assert_done(launch(1, server.url, tmp_path / "alone", *options))
        for world_size, workers, steps in stages:
            more = (f"--train.steps={steps}", f"--data.workers={workers}")
            outcomes = launch(world_size, server.url, tmp_path / "changing", *options, *more)
            said["changing"] += assert_done(outcomes)
    for name, text in said.items():
        told = re.findall(r"^skipped (.*): .+ \(damaged when it was indexed\)$", text, re.MULTILINE)
        assert sorted(told) == sorted(records), text
        assert summary(tmp_path / name)["skipped_images"] == total
        counts = [line["data/skipped"] for line in metrics(tmp_path / name)]
        assert counts == sorted(counts) and counts[-1] == total
    found = largest_difference(parameters(tmp_path / "alone"), parameters(tmp_path / "changing"))
    assert found < 1e-12


def test_too_much_damage_stops_all(prepared: dict[str, Path], tmp_path: Path) -> None:
    _, records = damaged(prepared["packed"], tmp_path / "digits")
    run = tmp_path / "run"
    outcomes = launch(2, tmp_path / "digits", run, f"--data.max_skips={sum(records.values()) - 1}")
    message = assert_stopped(outcomes, run)
    assert re.match(
        r"25 training images are damaged and data.max_skips is 24; the last is", message
    )
    assert any(record in message for record in records)


@pytest.mark.slow
@pytest.mark.parametrize("cache_gib", ["1", "1e-3"], ids=["whole", "tiny"])
def test_two_runs_share_a_cache(
    cache_gib: str, prepared: dict[str, Path], local: Callable[[int], Path], tmp_path: Path
) -> None:
    index = load_index(prepared["packed"])
    shards = names(index, "labeled", "unlabeled", "validation", "test")
    directories = [tmp_path / "a", tmp_path / "b"]
    with http_server(prepared["packed"]) as server, ThreadPoolExecutor(2) as pool:
        runs = [
            pool.submit(launch, 1, server.url, directory, f"--data.cache_gib={cache_gib}")
            for directory in directories
        ]
        for outcomes in runs:
            assert_done(outcomes.result())
        asked = {path: count for path, count in server.requests.items() if path.endswith(".tar")}
    assert set(asked) == set(shards)
    kept = [p for p in (tmp_path / "cache").glob("[0-9a-f][0-9a-f]/*") if not p.suffix]
    if cache_gib == "1":
        assert set(asked.values()) == {1} and len(kept) == len(shards)
    else:
        size = sum(path.stat().st_size for path in kept)
        assert (
            size <= float(cache_gib) * 2**30 < sum(shard.bytes for shard in index.unlabeled.shards)
        )
    for directory in directories:
        assert_same_run(directory, local(1))


@pytest.mark.slow
def test_as_launched(prepared: dict[str, Path], tmp_path: Path) -> None:
    """Two ranks with a worker each; the server goes, and comes back."""
    index = load_index(prepared["packed"])
    directory = tmp_path / "run"
    with http_server(prepared["packed"]) as server:
        server.faults |= dict.fromkeys(names(index, "unlabeled"), closing_after(50))
        argv = command(server.url, directory, "--data.tries=2", "--data.workers=1")
        launched = ("accelerate", "launch", "--multi_gpu", "--num_processes", "2")
        code, output = run(*launched, "launch/train.py", *argv, ACCELERATE_USE_CPU="true")
    assert code != 0 and output.count("error: cannot download") == 1
    assert "exitcode  : 75" in output and "/unlabeled/0000" in output, output
    assert not (directory / "FAILED").exists()
    with http_server(prepared["packed"]) as server:
        argv[0] = f"--data.root={server.url}"
        code, output = run(*launched, "launch/train.py", *argv, ACCELERATE_USE_CPU="true")
        assert code == 0 and (directory / "DONE").exists(), output
        code, output = run("python", "launch/evaluate.py", str(directory), "--json")
        assert code == 0, output
        found = json.loads(output[output.index("{") :])
    assert found["error"] == summary(directory)["test_error"]
