"""Training over http: passing faults change nothing, lasting ones stop all ranks with one message."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import re
import shutil
import struct
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sgan_dist import cli
from sgan_dist.data.index import DatasetIndex, load_index, save, with_fingerprint
from sgan_dist.data.prepare import shards
from sgan_dist.data.prepare.shards import prepare
from sgan_dist.data.prepare.sources import load_source
from sgan_dist.data.prepare.splits import Labels
from sgan_dist.data.remote import transfer
from tests.data.datasets import LAYOUTS, rewrite_shard, tar_files
from tests.distributed.runs import (
    EXACT,
    largest_difference,
    metrics,
    parameters,
    summary,
)
from tests.ranks import CONTEXT, run, run_ranks, with_children
from tests.servers import Fault, Handler, cut, drop, garble, http_server, slow, status

BLOCK, SHARD = 5, 10  # samples
# images of 84 x 84: an epoch is 13.75 steps, and a window of 1 MiB less than a third of it
TRAIN = 660

Outcome = tuple[int, str]  # exit code and output

pytestmark = [
    pytest.mark.timeout(240),
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),
]


@pytest.fixture(scope="module", autouse=True)
def fork_server() -> Iterator[None]:
    """A process has one fork server; this one saves each rank an import of seconds."""
    forkserver._forkserver._stop()  # type: ignore[attr-defined]
    CONTEXT.set_forkserver_preload(["sgan_dist.run.trainer", "torch._dynamo"])
    forkserver.ensure_running()
    yield
    forkserver._forkserver._stop()  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """layout -> a few large digits in many small shards; the unlabeled ones are windowed."""
    digits = load_source("digits")
    source = tmp_path_factory.mktemp("idx")
    order = np.random.default_rng(0).permutation(len(digits.train.array))
    parts = {"train": order[: TRAIN + 40], "t10k": order[TRAIN + 40 : TRAIN + 100]}
    for part, rows in parts.items():
        images = np.kron(digits.train.array[rows, :, :, 0], np.ones((1, 3, 3), np.uint8))
        for name, array in (("images-idx3", images), ("labels-idx1", digits.train.labels[rows])):
            header = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
            (source / f"{part}-{name}-ubyte").write_bytes(header + array.astype("u1").tobytes())
    folders = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "PACKED_BLOCK", BLOCK)
        for layout in LAYOUTS:
            folders[layout] = tmp_path_factory.mktemp(layout) / "digits"
            prepare(
                f"idx:{source}",
                folders[layout],
                labels=Labels(6),
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
        f"--remote.cache={directory.parent / 'cache'}",
        f"--run_dir={directory}",
        "--name=small",
        "--batch.labeled=12",
        "--batch.unlabeled=48",
        "--stream.lanes=12",
        "--stream.lane_window_mib=0.08",
        "--remote.tries=4",
        "--batch.fake=12",
        "--model.discriminator=mlp",
        "--model.generator=mlp",
        '--model.discriminator_args={"sizes": [40, 20]}',
        '--model.generator_args={"width": 20}',
        "--optim.decay=0",
        "--loss.consistency=0",
        "--augment.elastic=0",
        "--train.steps=16",
        "--train.log_every=1",
        "--train.evaluate_every=0",
        "--train.sample_every=0",
        "--checkpoint.every=4",
        "--tracking.wandb=false",
        *overrides,
    ]


def train(rank: int, argv: list[str]) -> Outcome:
    """`sgan-dist train` on one rank of a launcher, with short waits between tries."""
    # no warnings from accelerate, and no proxy
    os.environ |= {"OMP_NUM_THREADS": "1", "no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1"}
    transfer.BACKOFF_SECONDS = 0.05
    output = io.StringIO()
    with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
        code = cli.main(["train", *argv])
    return code, output.getvalue()


def launch(world_size: int, *argv: Any) -> list[Outcome]:
    return run_ranks(world_size, with_children, train, command(*argv))


def assert_done(outcomes: list[Outcome]) -> str:
    """All ranks ended well; returns their output."""
    text = "".join(output for _, output in outcomes)
    assert [code for code, _ in outcomes] == [0] * len(outcomes), text
    return text


def assert_stopped(outcomes: list[Outcome], directory: Path, code: int = 2) -> str:
    """All ranks stopped with one message, which is returned; it is in FAILED if it is final."""
    assert [rank_code for rank_code, _ in outcomes] == [code] * len(outcomes)
    first, *others = (output for _, output in outcomes)
    # each rank reports its own retries, and rank 0 alone the errors
    lines = [line for output in others for line in output.splitlines()]
    assert all(line.startswith("retrying ") for line in lines), lines
    messages = re.findall(r"^error: .*", first, re.MULTILINE)
    assert len(messages) == 1 and "Traceback" not in first, first
    message: str = messages[0].removeprefix("error: ")
    if code == 2:
        assert (directory / "FAILED").read_text() == message + "\n"
    else:
        assert not (directory / "FAILED").exists()
    assert not (directory / "DONE").exists()
    return message


def assert_same_run(run: Path, other: Path) -> None:
    assert summary(run)["weights_sha256"] == summary(other)["weights_sha256"]
    assert metrics(run) == metrics(other)
    assert summary(run)["test_error"] == summary(other)["test_error"]


LocalRun = Callable[..., Path]


@pytest.fixture(scope="module")
def local(prepared: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> LocalRun:
    """(world size, layout) -> a run on local files, made once."""

    @functools.cache
    def local_run(world_size: int, layout: str = "packed") -> Path:
        run = tmp_path_factory.mktemp("local") / "run"
        assert_done(launch(world_size, prepared[layout], run))
        return run

    return local_run


def shard_paths(index: DatasetIndex, *splits: str) -> list[str]:
    """The paths of these splits' shards on a server."""
    return [f"/{shard.name}" for split in splits for shard in index.split(split).shards]


@pytest.mark.parametrize("layout", ["packed", pytest.param("per-sample", marks=pytest.mark.slow)])
def test_a_bad_server_changes_nothing(
    layout: str, prepared: dict[str, Path], local: LocalRun, tmp_path: Path
) -> None:
    root = prepared[layout]
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
        shards = shard_paths(index, "labeled", "unlabeled", "validation", "test")
        for number, path in enumerate(shards):
            server.faults[path] = list(passing[number % len(passing)])
            if layout == "per-sample":
                sidecar_faults: list[list[Fault]] = [[], [status(500)], [drop]]
                server.faults[f"{path}.offsets.npy"] = sidecar_faults[number % 3]
        server.faults["/index.json"] = [status(502), drop]
        assert_done(launch(2, server.url, tmp_path / "run"))
        assert {path for path in server.requests if path.endswith(".tar")} == set(shards)
        assert server.requests["/index.json"] >= 3
        assert sum(map(len, server.faults.values())) < len(shards)  # type: ignore[arg-type]
        config = (tmp_path / "run" / "config.yaml").read_text()
        assert f"root: {server.url}\n" in config  # where a report finds it again
    assert_same_run(tmp_path / "run", local(2, layout))


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
        message = assert_stopped(launch(2, server.url, run, "--remote.tries=2"), run)
        assert shard in message and "no longer match the index" in message
        # two tries of each of two ranks, when it is prefetched and when it is opened
        assert server.requests[f"/{shard}"] <= 2 * 2 * 2


def closing_after(shards: int) -> Fault:
    """Good answers to this many requests; then the server closes."""
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


def test_a_server_that_is_gone_stops_all_at_once(
    prepared: dict[str, Path], local: LocalRun, tmp_path: Path
) -> None:
    root = prepared["packed"]
    index = load_index(root)
    directory = tmp_path / "run"
    options = ("--remote.tries=2", "--remote.read_timeout=5")
    with http_server(root) as server:
        server.faults |= dict.fromkeys(shard_paths(index, "unlabeled"), closing_after(50))
        outcomes = launch(2, server.url, directory, *options)
    message = assert_stopped(outcomes, directory, code=75)
    assert re.search(
        r"cannot download \S+/unlabeled/0000\d\d\.tar(.offsets.npy)? \(.*2 tries", message
    )
    done = len(metrics(directory))
    assert 3 <= done < 16  # a window was used at least
    # the shards are back at another address, and the run continues as if nothing had happened
    with http_server(root) as server:
        assert_done(launch(2, server.url, directory, *options))
    assert not (directory / "FAILED").exists()
    assert_same_run(directory, local(2))


def damage(source: Path, folder: Path) -> dict[str, int]:
    """Makes a copy in which some records are damaged, and indexes it; returns them, with samples.

    They are in unlabeled shards that different ranks read, and in a labeled one.
    """
    shutil.copytree(source, folder)
    index, records = load_index(folder), {}
    for split, number, nth, suffixes in (
        *(("unlabeled", number, number % 2 - 1, "images.npy .png") for number in (0, 21, 40, 61)),
        ("labeled", 1, 0, "labels.npy .cls"),
    ):
        shard, block = index.split(split).shards[number], index.split(split).block
        files = tar_files(folder / shard.name)
        name = [name for name in files if name.endswith(tuple(suffixes.split()))][nth]
        index = rewrite_shard(folder, index, split, number, files | {name: b"broken"})
        record = range(-(-shard.samples // block))[nth]
        records[f"{shard.name}, record {record}"] = block
    save(with_fingerprint(index), folder)
    return records


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
    """With any ranks, workers and resumes: counted, and named once."""
    records = damage(prepared[layout], tmp_path / "digits")
    total = sum(records.values())
    # more than two epochs; the largest number of damaged images that is allowed
    options = (*EXACT, "--train.steps=32", f"--data.max_skips={total}")
    output = {"alone": "", "changing": ""}
    with http_server(tmp_path / "digits") as server:
        output["alone"] = assert_done(launch(1, server.url, tmp_path / "alone", *options))
        for world_size, workers, steps in stages:
            more = (f"--train.steps={steps}", f"--stream.workers={workers}")
            outcomes = launch(world_size, server.url, tmp_path / "changing", *options, *more)
            output["changing"] += assert_done(outcomes)
    for name, text in output.items():
        named = re.findall(
            r"^skipped (.*): .+ \(damaged when it was indexed\)$", text, re.MULTILINE
        )
        assert sorted(named) == sorted(records), text
        assert summary(tmp_path / name)["skipped_images"] == total
        counts = [line["data/skipped"] for line in metrics(tmp_path / name)]
        assert counts == sorted(counts) and counts[-1] == total
    runs = parameters(tmp_path / "alone"), parameters(tmp_path / "changing")
    assert largest_difference(*runs) < 1e-12


def test_too_much_damage_stops_all(prepared: dict[str, Path], tmp_path: Path) -> None:
    records = damage(prepared["packed"], tmp_path / "digits")
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
    cache_gib: str, prepared: dict[str, Path], local: LocalRun, tmp_path: Path
) -> None:
    index = load_index(prepared["packed"])
    shards = shard_paths(index, "labeled", "unlabeled", "validation", "test")
    directories = [tmp_path / "a", tmp_path / "b"]
    with http_server(prepared["packed"]) as server, ThreadPoolExecutor(2) as pool:
        runs = [
            pool.submit(launch, 1, server.url, directory, f"--remote.cache_gib={cache_gib}")
            for directory in directories
        ]
        for outcomes in runs:
            assert_done(outcomes.result())
        counts = {path: count for path, count in server.requests.items() if path.endswith(".tar")}
    assert set(counts) == set(shards)
    cached = [p for p in (tmp_path / "cache").glob("[0-9a-f][0-9a-f]/*") if not p.suffix]
    if cache_gib == "1":
        assert set(counts.values()) == {1} and len(cached) == len(shards)
    else:
        size = sum(path.stat().st_size for path in cached)
        split_size = sum(shard.bytes for shard in index.unlabeled.shards)
        assert size <= float(cache_gib) * 2**30 < split_size
    for directory in directories:
        assert_same_run(directory, local(1))


@pytest.mark.slow
def test_as_launched(prepared: dict[str, Path], tmp_path: Path) -> None:
    """Two ranks with a worker each; the server closes, and is started again."""
    index = load_index(prepared["packed"])
    directory = tmp_path / "run"
    with http_server(prepared["packed"]) as server:
        server.faults |= dict.fromkeys(shard_paths(index, "unlabeled"), closing_after(50))
        argv = command(server.url, directory, "--remote.tries=2", "--stream.workers=1")
        launched = ("accelerate", "launch", "--multi_gpu", "--num_processes", "2")
        code, output = run(*launched, "launch/train.py", *argv, ACCELERATE_USE_CPU="true")
    assert code != 0 and output.count("error: cannot download") == 1, output
    assert "exitcode  : 75" in output and "/unlabeled/0000" in output, output
    assert not (directory / "FAILED").exists()
    with http_server(prepared["packed"]) as server:
        argv[0] = f"--data.root={server.url}"
        code, output = run(*launched, "launch/train.py", *argv, ACCELERATE_USE_CPU="true")
        assert code == 0 and (directory / "DONE").exists(), output
        code, output = run("sgan-dist", "evaluate", str(directory), "--json")
        assert code == 0, output
    figures = json.loads(output[output.index("{") :])
    assert figures["error"] == summary(directory)["test_error"]
