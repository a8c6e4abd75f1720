"""Indexing that stops and continues: broken shards, kills, interrupts, and other options."""

from __future__ import annotations

import gzip
import os
import re
import signal
import subprocess
from pathlib import Path

import numpy as np
import psutil
import pytest
from filelock import FileLock

from sgan_dist.data.index import load_index, sidecar_name
from sgan_dist.data.prepare.foreign import index_shards
from sgan_dist.errors import UserError
from tests.data.prepare.commands import ENVIRONMENT, file_sums, run
from tests.data.prepare.tars import (
    classified,
    command,
    downloaded,
    image,
    request,
    scanned,
    wait_until,
    write_tar,
)
from tests.servers import http_server, stall, status

pytestmark = pytest.mark.process


def scanners(parent: int) -> list[psutil.Process]:
    """The scanning processes of a program, from their first moment."""
    return [c for c in psutil.Process(parent).children() if "spawn_main" in " ".join(c.cmdline())]


def test_broken_shards_are_all_named_and_the_others_are_kept(tars: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / ".scanned").mkdir(parents=True)  # as a killed run leaves it
    whole = (tars / "web-001.tar").read_bytes()
    (tars / "web-001.tar").write_bytes(whole[: len(whole) // 3 + 100])
    (tars / "web-002.tar").write_bytes(b"<html>not found</html>" * 100)
    (tars / "train-1.tar").write_bytes(gzip.compress((tars / "train-1.tar").read_bytes()))
    write_tar(tars / "val.tar", [("0.json", b"{}")])
    with pytest.raises(UserError) as caught:
        index_shards(**request(tars, out))
    message = str(caught.value)
    for name, reason in (
        ("web-001", "cut off"),
        ("web-002", "not a tar"),
        ("train-1", "compressed"),
        ("val", "no image"),
    ):
        assert re.search(rf"{name}\.tar \([^)]*{reason}", message)
    assert message.startswith("4 of 7 shards") and "test.tar" not in message
    assert scanned(out) == {"web-000.tar", "train-0.tar", "test.tar"}
    assert not (out / "index.json").exists()
    # once they are repaired or left out of the patterns, the others are not even opened again
    (tars / "web-001.tar").write_bytes(whole)
    write_tar(tars / "train-1.tar", classified(106, 6))
    write_tar(tars / "val.tar", classified(200, 6))
    times = {path.name: path.stat() for path in tars.iterdir()}
    (tars / "web-000.tar").write_bytes(b"x" * times["web-000.tar"].st_size)
    os.utime(tars / "web-000.tar", ns=(0, times["web-000.tar"].st_mtime_ns))
    some = [str(tars / f"web-{number:03d}.tar") for number in (1, 0)]
    index = index_shards(**request(tars, out, unlabeled=some))
    assert [shard.samples for shard in index.unlabeled.shards] == [8, 10]
    assert [len(np.load(out / sidecar_name("unlabeled", number))) for number in (0, 1)] == [8, 10]


def test_damaged_results_are_not_used(tars: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_tar(tars / "val.tar", [("0.json", b"{}")])
    with pytest.raises(UserError, match="1 of 7 shards"):
        index_shards(**request(tars, out))
    for number, path in enumerate(sorted((out / ".scanned").iterdir())):
        if number % 4 == 0:
            path.unlink()
        elif path.suffix == ".json":
            path.write_text(('[{"split": "unlab', "[{}, {}, {}]", '[{}, {"old": 1}]')[number % 3])
    write_tar(tars / "val.tar", classified(200, 6))
    index = index_shards(**request(tars, out))
    assert index == index_shards(**request(tars, tmp_path / "fresh"))
    assert file_sums(out) == file_sums(tmp_path / "fresh")


def test_missing_remote_shards(tars: Path, tmp_path: Path) -> None:
    (tars / "web-001.tar").unlink()
    with http_server(tars) as server:
        with pytest.raises(UserError, match=r"1 of 7 .*web-001\.tar \(it does not exist\)"):
            index_shards(**request(server.url, tmp_path / "out"))
        assert len(scanned(tmp_path / "out")) == 6
        server.faults["/web-001.tar"] = status(403)
        with pytest.raises(UserError, match="403"):
            index_shards(**request(server.url, tmp_path / "out"))
        # those that were scanned were downloaded once
        assert {server.requests[f"/{name}"] for name in scanned(tmp_path / "out")} == {1}


def test_changed_local_shards_are_scanned_again(tars: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tars / "test.tar").write_bytes(b"")
    with pytest.raises(UserError, match="an empty file"):
        index_shards(**request(tars, out))
    write_tar(tars / "web-000.tar", downloaded(50, 7))
    shard = tars / "web-001.tar"
    time_ns = shard.stat().st_mtime_ns + 5
    shard.write_bytes(shard.read_bytes().replace(b"a caption", b"A CAPTION"))
    os.utime(shard, ns=(time_ns, time_ns))
    write_tar(tars / "test.tar", classified(0, 3))
    index = index_shards(**request(tars, out))
    assert index.unlabeled.shards[0].samples == 7
    fresh = index_shards(**request(tars, tmp_path / "fresh"))
    assert fresh == index


def test_other_options_use_the_results(tars: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_tar(tars / "val.tar", [("x.jpg", image(1, size=(9, 9))), ("x.cls", b"0")])
    with http_server(tars) as server:
        with pytest.raises(UserError, match="--image_size"):
            index_shards(**request(server.url, out))
        index = index_shards(**request(server.url, out, image_size=(8, 8)))
        assert len(server.requests) == 7 and set(server.requests.values()) == {1}
        fresh = index_shards(**request(server.url, tmp_path / "fresh", image_size=(8, 8)))
    assert index == fresh
    # the results depend on the place of the label, so labeled shards are read again
    with pytest.raises(UserError, match="no record of the labeled shards has a label"):
        index_shards(**request(tars, tmp_path / "label", label="json:class", image_size=(8, 8)))


def test_a_killed_run_continues(tars: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with http_server(tars) as server:
        words = command(server.url, out, "--jobs", "2", "--tries", "2")
        server.faults["/web-001.tar"] = stall
        with subprocess.Popen(words, env=ENVIRONMENT, stderr=subprocess.PIPE) as process:
            wait_until(lambda: len(scanned(out)) == 6)
            children = psutil.Process(process.pid).children(recursive=True)
            process.kill()
            assert process.stderr is not None
            process.stderr.read()
        psutil.wait_procs(children, timeout=30)
        assert not any(child.is_running() for child in children)  # no scan outlives it
        assert not (out / "index.json").exists()
        before = dict(server.requests)
        del server.faults["/web-001.tar"]
        code, output, errors = run(words)
        assert code == 0, errors
        assert "6 of 7 shards were scanned before" in errors
        assert "26 samples in 3 shard(s)" in output
        again = {name: n - before[name] for name, n in server.requests.items() if n > before[name]}
        assert again == {"/web-001.tar": 1}
        whole = index_shards(**request(server.url, tmp_path / "whole"))
    assert load_index(out).fingerprint == whole.fingerprint
    assert file_sums(out) == file_sums(tmp_path / "whole")
    assert {path.name for path in tmp_path.iterdir()} == {"tars", "out", "whole"}


@pytest.mark.parametrize("early", [True, False])
def test_an_interrupted_run_ends_at_once(tars: Path, tmp_path: Path, early: bool) -> None:
    out = tmp_path / "out"
    with http_server(tars) as server:
        server.faults["/web-001.tar"] = stall
        process = subprocess.Popen(
            command(server.url, out, "--jobs", "2"),
            env=ENVIRONMENT,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            # a shell's background jobs, and so this suite in one, ignore Ctrl-C
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        with process:
            if early:
                wait_until(lambda: scanners(process.pid))  # they are importing
            else:
                wait_until(lambda: len(scanned(out)) == 6)  # one process is idle
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of them
            _, errors = process.communicate(timeout=20)  # a stalled request may take 30 seconds
        assert process.returncode == 130
        assert "the same command continues" in errors and "Traceback" not in errors


def test_a_killed_scanning_process(tars: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with http_server(tars) as server:
        server.faults["/web-001.tar"] = stall
        words = command(server.url, out, "--jobs", "2")
        with subprocess.Popen(words, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) as process:
            wait_until(lambda: server.requests["/web-001.tar"])
            for child in scanners(process.pid):
                child.kill()
            _, errors = process.communicate()
        assert process.returncode == 2
        assert "a process was killed" in errors and "Traceback" not in errors


def test_two_runs_at_once(tars: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with FileLock(tmp_path / ".out.lock"):
        with pytest.raises(UserError, match="another run is indexing"):
            index_shards(**request(tars, out))
        assert not any(out.iterdir())
    index_shards(**request(tars, out))
    with http_server(tars) as server:
        server.faults["/web-001.tar"] = stall
        words = command(server.url, tmp_path / "both", "--jobs", "1")
        with subprocess.Popen(words, env=ENVIRONMENT, stderr=subprocess.DEVNULL) as first:
            wait_until(lambda: server.requests["/web-001.tar"])
            code, _, errors = run(words)
            first.kill()
        assert code == 2 and "another run is indexing" in errors


def test_a_kill_after_the_index_leaves_a_dataset(tars: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    index = index_shards(**request(tars, out))
    clean = file_sums(out)
    (out / ".scanned").mkdir()
    (out / ".scanned" / "0.npy").write_bytes(b"")
    assert load_index(out) == index
    assert index_shards(**request(tars, out)) == index
    assert file_sums(out) == clean
