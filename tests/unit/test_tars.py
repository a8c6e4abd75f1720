"""Indexing tars that others wrote: what is found, what is refused, and going on after a kill."""

import fcntl
import functools
import gzip
import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from sgan_dist.data.index import SPLITS, load_index, sidecar_name
from sgan_dist.data.patterns import expand
from sgan_dist.data.records import samples
from sgan_dist.data.remote import Transport
from sgan_dist.data.tars import index_shards, main
from sgan_dist.errors import UserError
from tests.servers import gs_server, http_server, s3_server, stall, status

REPOSITORY = Path(__file__).parents[2]
SCRIPT = [sys.executable, str(REPOSITORY / "launch" / "index_shards.py")]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(REPOSITORY)}


@functools.cache
def image(number, kind="JPEG", size=(12, 8), mode="RGB"):
    buffer = io.BytesIO()
    color = number * 7 % 256 if mode == "L" else (number * 7 % 256, number % 256, 99)
    Image.new(mode, size, color).save(buffer, kind)
    return buffer.getvalue()


def write_tar(path, files):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as out:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            out.addfile(info, io.BytesIO(content))


def downloaded(first, count, failed=()):
    """As img2dataset writes them: jpg, json and txt; of failed downloads the json alone."""
    files = []
    for number in range(first, first + count):
        key = f"{number:09d}"
        if number not in failed:
            files.append((f"{key}.jpg", image(number)))
        content = {"key": key, "status": "success", "meta": {"class": number % 3}}
        files.append((f"{key}.json", json.dumps(content).encode()))
        if number not in failed:
            files.append((f"{key}.txt", b"a caption"))
    return files


def classified(first, count, classes=3):
    """jpg and cls."""
    return [
        file
        for number in range(first, first + count)
        for file in (
            (f"img/{number:05d}.jpg", image(number)),
            (f"img/{number:05d}.cls", str(number % classes).encode()),
        )
    ]


@pytest.fixture
def tars(tmp_path):
    """Three unlabeled shards, two labeled, one of validation, one of test; their folder."""
    root = tmp_path / "tars"
    for number in range(3):
        failed = {number * 10 + 1, number * 10 + 9} if number else ()
        write_tar(root / f"web-{number:03d}.tar", downloaded(number * 10, 10, failed))
    for number in range(2):
        write_tar(root / f"train-{number}.tar", classified(100 + 6 * number, 6))
    write_tar(root / "val.tar", classified(200, 6))
    write_tar(root / "test.tar", classified(300, 9))
    return root


def request(root, out, **options):
    """Arguments of index_shards; `root` is a folder or the URL of a server."""
    given = {
        "unlabeled": [f"{root}/web-{{000..002}}.tar"],
        "labeled": [f"{root}/train-{{0,1}}.tar"],
        "validation": [f"{root}/val.tar"],
        "test": [f"{root}/test.tar"],
        "out": out,
        "jobs": 1,
        "progress": False,
    }
    return given | options


def command(root, out, *options):
    given = request(root, out)
    words = [*SCRIPT, *given["unlabeled"], "--out", str(out)]
    for split in ("labeled", "validation", "test"):
        words += [f"--{split}", *given[split]]
    return [*words, *options]


def run(words, **options):
    done = subprocess.run(
        words, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, **options
    )
    return done.returncode, done.stdout, done.stderr


def tree(root):
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def journaled(out):
    try:
        lines = (out / "index.journal").read_text().splitlines()
    except FileNotFoundError:
        return set()
    return {Path(json.loads(line)[0]["location"]).name for line in lines if line.endswith("}]")}


def wait_until(true):
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_what_an_index_says(tars, tmp_path):
    before = tree(tars)
    index = index_shards(**request(tars, tmp_path / "out"))
    assert load_index(tmp_path / "out") == index
    assert tree(tars) == before  # the tars are as they were
    assert index.image_shape == (8, 12, 3)
    assert (index.source, index.label, index.resize) == ("tars", "cls", False)
    assert index.class_names == ("0", "1", "2")
    assert [index.split(name).samples for name in SPLITS] == [12, 26, 6, 9]
    assert [shard.samples for shard in index.unlabeled.shards] == [10, 8, 8]
    assert index.unlabeled.label_histogram == ()
    assert index.labeled.label_histogram == (4, 4, 4)
    assert index.test.label_histogram == (3, 3, 3)
    for name in SPLITS:
        split = index.split(name)
        assert (split.layout, split.block, split.order) == ("per-sample", 1, "full")
        for shard in split.shards:
            path = Path(shard.name)
            assert path.is_absolute()
            assert shard.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
            assert shard.bytes == path.stat().st_size
    assert [Path(shard.name).name for shard in index.unlabeled.shards] == [
        f"web-{number:03d}.tar" for number in range(3)
    ]


def test_each_sidecar_leads_to_each_sample(tars, tmp_path):
    out = tmp_path / "out"
    index = index_shards(**request(tars, out))
    sidecars = {path for path in out.rglob("*") if path.is_file()} - {out / "index.json"}
    for name in SPLITS:
        for number, shard in enumerate(index.split(name).shards):
            sidecars.remove(out / sidecar_name(name, number))
            offsets = np.load(out / sidecar_name(name, number))
            assert offsets.dtype == np.int64 and len(offsets) == shard.samples + 1
            with open(shard.name, "rb") as file:
                every = list(samples(file))
                assert len(every) == shard.samples
                for place, record in enumerate(every):
                    assert next(samples(file, int(offsets[place]))) == record
                assert offsets[-1] == every[-1].end
    assert not sidecars and sorted(path.name for path in out.iterdir()) == [
        "index.json",
        *sorted(SPLITS),
    ]


def test_labels_from_json_and_names_from_a_file(tars, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("cat\ndog\nhorse\ncow\n")
    everything = [str(tars / "web-*.tar")]
    options = {"label": "json:meta.class", "labeled": everything, "test": everything}
    given = request(tars, tmp_path / "out", **options, class_names=names, validation=everything)
    index = index_shards(**given)
    assert index.label == "json:meta.class"
    assert index.class_names == ("cat", "dog", "horse", "cow")
    # 0, 3, 6, 9 of shard 0; 12, 15, 18 of shard 1; 21 failed, 24 and 27 of shard 2
    assert index.labeled.label_histogram[0] == 9
    assert sum(index.labeled.label_histogram) == 26 and index.labeled.label_histogram[3] == 0
    assert load_index(tmp_path / "out") == index


def test_image_sizes(tars, tmp_path):
    write_tar(
        tars / "val.tar", [*classified(200, 6), ("x.jpg", image(1, size=(9, 9))), ("x.cls", b"0")]
    )
    with pytest.raises(
        UserError, match=r"8 x 12 .*record .*9 x 9 .*val\.tar, record x.*--image-size"
    ):
        index_shards(**request(tars, tmp_path / "out"))
    index = index_shards(**request(tars, tmp_path / "out", image_size=16))
    assert (index.image_shape, index.resize) == ((16, 16, 3), True)
    index = index_shards(**request(tars, tmp_path / "gray", image_size=16, gray=True))
    assert (index.image_shape, index.resize) == ((16, 16, 1), True)
    write_tar(tars / "val.tar", [("x.jpg", image(1, mode="L")), ("x.cls", b"0")])
    with pytest.raises(UserError, match=r"\(color\).*\(gray\)"):
        index_shards(**request(tars, tmp_path / "mixed"))


def test_the_fingerprint_is_of_the_contents(tars, tmp_path):
    index = index_shards(**request(tars, tmp_path / "out"))
    again = index_shards(**request(tars, tmp_path / "again", jobs=2))
    assert again == index
    tars.rename(tmp_path / "moved")
    moved = index_shards(**request(tmp_path / "moved", tmp_path / "third"))
    assert moved.fingerprint == index.fingerprint
    other = index_shards(**request(tmp_path / "moved", tmp_path / "fourth", order="windowed"))
    assert other.unlabeled.order == "windowed" and other.labeled.order == "full"
    assert other.fingerprint != index.fingerprint


def test_over_http(tars, tmp_path):
    with http_server(tars) as server:
        server.faults["/web-001.tar"] = [status(500)]
        index = index_shards(**request(server.url, tmp_path / "out", jobs=2))
        assert server.requests["/web-001.tar"] == 2
        names = [shard.name for shard in index.unlabeled.shards]
        assert names == [f"{server.url}/web-{number:03d}.tar" for number in range(3)]
        assert load_index(tmp_path / "out") == index
    local = index_shards(**request(tars, tmp_path / "local"))
    assert index.fingerprint == local.fingerprint
    assert sorted(tree(tmp_path / "out")) == sorted(tree(tmp_path / "local"))


@pytest.mark.parametrize("server, scheme", [(s3_server, "s3"), (gs_server, "gs")], ids=["s3", "gs"])
def test_patterns_in_object_stores(server, scheme, tars, tmp_path):
    with server("bucket") as store:
        store.upload(tars, "bucket")
        root = f"{scheme}://bucket"
        given = request(root, tmp_path / "out", unlabeled=[f"{root}/web-*.tar"])
        index = index_shards(**given)
        names = [shard.name for shard in index.unlabeled.shards]
        assert names == [f"{root}/web-{number:03d}.tar" for number in range(3)]
        with pytest.raises(UserError, match="matches"):
            index_shards(**given | {"unlabeled": [f"{root}/nothing-*.tar"]})
    local = index_shards(**request(tars, tmp_path / "local"))
    assert index.fingerprint == local.fingerprint


def test_through_a_pipe(tars, tmp_path):
    index = index_shards(**request(f"pipe:cat {tars}", tmp_path / "out"))
    assert index.labeled.shards[0].name == f"pipe:cat {tars}/train-0.tar"
    local = index_shards(**request(tars, tmp_path / "local"))
    assert index.fingerprint == local.fingerprint


def test_patterns(tars, monkeypatch):
    monkeypatch.chdir(tars)
    paths = [str(tars / f"web-{number:03d}.tar") for number in range(3)]
    for patterns in (
        ["web-{000..002}.tar"],
        ["web-*.tar"],
        ["./web-00[0-2].tar"],
        ["web-000.tar::web-{001,002}.tar"],
        ["web-000.tar", "../tars/web-00{1..2}.tar"],
        [str(tars / "web-??[012].tar")],
    ):
        assert list(expand(patterns, "unlabeled")) == paths
    assert expand(["web-002.tar", "web-000.tar"], "test") == (paths[2], paths[0])
    (tars / "odd[1].tar").write_bytes(b"")
    assert expand(["odd[1].tar"], "test") == (str(tars / "odd[1].tar"),)
    assert expand(["http://a/{00..02}.tar"], "test") == tuple(
        f"http://a/0{n}.tar" for n in range(3)
    )
    for patterns, why in (
        (["nothing-*.tar"], "no test shard .*nothing"),
        (["web-{000..003}.tar"], "web-003.tar"),
        (["web-000.tar", "web-00*.tar"], "web-000.tar twice"),
        (["web-000.tar", "./web-000.tar"], "twice"),
        (["web-{000.tar"], "web-{000.tar"),
        (["http://a/*.tar"], "brace range"),
        (["ftp://a/b.tar"], "ftp://a/b.tar"),
        (["web-000.tar::"], "empty"),
        ([], "at least one"),
        ([str(tars)], "no test shard"),
    ):
        with pytest.raises(UserError, match=why):
            expand(patterns, "test")


@pytest.mark.parametrize(
    "content, why",
    [(None, "no cls file"), (b"cat", "'cat'"), (b"-1", "'-1'"), (b"9999999", "9999999")],
    ids=["absent", "word", "negative", "huge"],
)
@pytest.mark.parametrize("split", ["labeled", "validation", "test"])
def test_labels_that_are_none_are_named(content, why, split, tars, tmp_path):
    name = {"labeled": "train-1", "validation": "val", "test": "test"}[split]
    files = [("bad.jpg", image(5))] + ([] if content is None else [("bad.cls", content)])
    write_tar(tars / f"{name}.tar", [*classified(0, 3), *files])
    with pytest.raises(UserError, match=rf"{split} shard .*{name}\.tar, record bad.*{why}"):
        index_shards(**request(tars, tmp_path / "out"))


def test_labels_beyond_the_classes_are_named(tars, tmp_path):
    write_tar(tars / "test.tar", [*classified(0, 6), ("far.jpg", image(5)), ("far.cls", b"3")])
    with pytest.raises(UserError, match=r"test\.tar, record far has the label 3.* class 2"):
        index_shards(**request(tars, tmp_path / "out"))
    names = tmp_path / "names"
    names.write_text("a\nb\nc\n")
    with pytest.raises(UserError, match=r"test\.tar, record far has the label 3.* 3"):
        index_shards(**request(tars, tmp_path / "out", class_names=names))
    names.write_text("a\nb\nc\nd")
    index = index_shards(**request(tars, tmp_path / "out", class_names=names))
    assert index.test.label_histogram == (2, 2, 2, 1)
    write_tar(tars / "train-0.tar", [("far.jpg", image(5)), ("far.cls", b"500")])
    with pytest.raises(UserError, match="501 classes"):
        index_shards(**request(tars, tmp_path / "gaps"))


def test_options_that_make_no_sense(tars, tmp_path):
    names = tmp_path / "names"
    for options, why in (
        ({"gray": True}, "--image-size"),
        ({"image_size": 0}, "image size is 0"),
        ({"label": "json"}, "json:KEY"),
        ({"label": "json:"}, "json:KEY"),
        ({"order": "random"}, "random"),
        ({"jobs": 0}, "jobs is 0"),
        ({"class_names": names}, "cannot read class names"),
    ):
        with pytest.raises(UserError, match=why):
            index_shards(**request(tars, tmp_path / "out", **options))
    for text in ("", "a\n\nb", "a\nb\na"):
        names.write_text(text)
        with pytest.raises(UserError, match="none empty and none twice"):
            index_shards(**request(tars, tmp_path / "out", class_names=names))
    assert not (tmp_path / "out").exists()


def test_broken_shards_are_all_named_and_the_others_are_kept(tars, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "index.journal").write_text('[{"split": "unlab')  # as a killed run leaves it
    whole = (tars / "web-001.tar").read_bytes()
    (tars / "web-001.tar").write_bytes(whole[: len(whole) // 3 + 100])
    (tars / "web-002.tar").write_bytes(b"<html>not found</html>" * 100)
    (tars / "train-1.tar").write_bytes(gzip.compress((tars / "train-1.tar").read_bytes()))
    write_tar(tars / "val.tar", [("0.json", b"{}")])
    with pytest.raises(UserError) as told:
        index_shards(**request(tars, out))
    message = str(told.value)
    for name, why in (
        ("web-001", "cut off"),
        ("web-002", "not a tar"),
        ("train-1", "compressed"),
        ("val", "no image"),
    ):
        assert re.search(rf"{name}\.tar \([^)]*{why}", message)
    assert message.startswith("4 of 7 shards") and "test.tar" not in message
    assert journaled(out) == {"web-000.tar", "train-0.tar", "test.tar"}
    assert not (out / "index.json").exists()
    # mended or left out of the patterns, the others are not read again: not even opened
    (tars / "web-001.tar").write_bytes(whole)
    write_tar(tars / "train-1.tar", classified(106, 6))
    write_tar(tars / "val.tar", classified(200, 6))
    times = {path.name: path.stat() for path in tars.iterdir()}
    (tars / "web-000.tar").write_bytes(b"x" * times["web-000.tar"].st_size)
    os.utime(tars / "web-000.tar", ns=(0, times["web-000.tar"].st_mtime_ns))
    some = [str(tars / f"web-{number:03d}.tar") for number in (1, 0)]
    index = index_shards(**request(tars, out, unlabeled=some))
    assert [shard.samples for shard in index.unlabeled.shards] == [8, 10]
    assert [len(np.load(out / sidecar_name("unlabeled", number))) for number in (0, 1)] == [9, 11]


def test_remote_shards_that_are_not_there(tars, tmp_path):
    (tars / "web-001.tar").unlink()
    with http_server(tars) as server:
        with pytest.raises(UserError, match=r"1 of 7 .*web-001\.tar \(it is not there\)"):
            index_shards(**request(server.url, tmp_path / "out"))
        assert len(journaled(tmp_path / "out")) == 6
        server.faults["/web-001.tar"] = status(403)
        with pytest.raises(UserError, match="403"):
            index_shards(**request(server.url, tmp_path / "out"))
        # scanned ones were asked for once
        assert {server.requests[f"/{name}"] for name in journaled(tmp_path / "out")} == {1}


def test_images_that_cannot_be_read_are_counted_and_stay_samples(tars, tmp_path, capsys):
    broken = [
        ("bad.jpg", b"\xff\xd8\xff"),
        ("bad.cls", b"1"),
        ("worse.jpg", b""),
        ("worse.cls", b"0"),
    ]
    write_tar(tars / "train-0.tar", [*broken, *classified(100, 6)])
    index = index_shards(**request(tars, tmp_path / "out", progress=True))
    assert index.labeled.samples == 14 and index.labeled.label_histogram == (5, 5, 4)
    said = capsys.readouterr().err
    assert re.search(r"2 images can't be read.*data\.max_skips.*train-0\.tar, record bad", said)
    assert "4 records have no image" in said
    write_tar(tars / "val.tar", broken)
    with pytest.raises(UserError, match="no image of the validation shards"):
        index_shards(**request(tars, tmp_path / "other"))


def test_shards_without_an_end_are_said(tars, tmp_path, capsys):
    """Between two records nobody can tell a tar that was cut short from one without end."""
    shard = tars / "web-001.tar"
    with tarfile.open(shard) as opened:
        at = next(info.offset for info in opened if info.name.endswith("14.jpg"))
    shard.write_bytes(shard.read_bytes()[:at])
    index = index_shards(**request(tars, tmp_path / "out", progress=True))
    assert [part.samples for part in index.unlabeled.shards] == [10, 3, 8]
    assert re.search(r"1 shards lack the zeros.*web-001\.tar", capsys.readouterr().err)


def test_remarks_on_classes_and_shared_shards(tars, tmp_path, capsys):
    names = tmp_path / "names"
    names.write_text("a\nb\nc\nd\ne")
    same = [str(tars / "train-0.tar")]
    given = request(tars, tmp_path / "out", class_names=names, test=same, progress=True)
    index_shards(**given)
    said = capsys.readouterr().err
    assert "without a labeled sample: 3, 4" in said
    assert "1 test shard(s) are trained on too" in said and "validation shard" not in said


def test_the_same_again_is_done_and_another_is_refused(tars, tmp_path, capsys):
    out = tmp_path / "out"
    given = request(tars, out, unlabeled=[str(tars / "web-*.tar")])
    index = index_shards(**given)
    before = tree(out)
    assert index_shards(**given | {"progress": True, "jobs": 2}) == index
    assert "nothing to do" in capsys.readouterr().err
    for options in ({"image_size": 8}, {"order": "windowed"}, {"test": given["validation"]}):
        with pytest.raises(UserError, match="holds another dataset"):
            index_shards(**given | options)
    write_tar(tars / "web-003.tar", downloaded(500, 2))
    with pytest.raises(UserError, match="match other shards now"):
        index_shards(**given)
    assert tree(out) == before
    other = tmp_path / "full"
    write_tar(other / "labeled" / "0.tar", classified(0, 3))
    with pytest.raises(UserError, match="holds no index"):
        index_shards(**given | {"out": other})
    assert sorted(tree(other)) == ["labeled/0.tar"]


def test_local_shards_that_changed_are_scanned_again(tars, tmp_path):
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


def test_other_options_use_what_was_scanned(tars, tmp_path):
    out = tmp_path / "out"
    write_tar(tars / "val.tar", [("x.jpg", image(1, size=(9, 9))), ("x.cls", b"0")])
    with http_server(tars) as server:
        with pytest.raises(UserError, match="--image-size"):
            index_shards(**request(server.url, out))
        index = index_shards(**request(server.url, out, image_size=8))
        asked = dict(server.requests)
        assert asked.pop("/test.tar") <= 2  # the last one, which the error may have stopped
        assert len(asked) == 6 and set(asked.values()) == {1}
        fresh = index_shards(**request(server.url, tmp_path / "fresh", image_size=8))
    assert index == fresh
    # where the label is decides what is found in labeled shards, so they are read again
    with pytest.raises(UserError, match="no json file"):
        index_shards(**request(tars, tmp_path / "label", label="json:class"))


def test_killed_half_way_it_goes_on(tars, tmp_path):
    out = tmp_path / "out"
    with http_server(tars) as server:
        words = command(server.url, out, "--jobs", "2", "--tries", "2")
        server.faults["/web-001.tar"] = stall
        with subprocess.Popen(words, env=ENVIRONMENT, stderr=subprocess.PIPE) as process:
            wait_until(lambda: len(journaled(out)) == 6)
            children = psutil.Process(process.pid).children(recursive=True)
            process.kill()
            process.stderr.read()
        psutil.wait_procs(children, timeout=30)
        assert not any(child.is_running() for child in children)  # no scan goes on alone
        assert not (out / "index.json").exists()
        asked = dict(server.requests)
        del server.faults["/web-001.tar"]
        code, said, told = run(words)
        assert code == 0, told
        assert "6 of 7 shards were scanned before" in told and "26 samples in 3 shard(s)" in said
        again = {name: n - asked[name] for name, n in server.requests.items() if n > asked[name]}
        assert again == {"/web-001.tar": 1}
        whole = index_shards(**request(server.url, tmp_path / "whole"))
    assert load_index(out).fingerprint == whole.fingerprint
    assert tree(out) == tree(tmp_path / "whole")


def scanners(parent: int) -> list[psutil.Process]:
    """The processes in which a program's shards are scanned, from their first moment."""
    return [c for c in psutil.Process(parent).children() if "spawn_main" in " ".join(c.cmdline())]


@pytest.mark.parametrize("early", [True, False])
def test_interrupted_it_ends_at_once_and_says_so(tars, tmp_path, early):
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
                wait_until(lambda: len(journaled(out)) == 6)  # one process is idle
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of them
            _, told = process.communicate(timeout=20)  # the stalled request is given 30 seconds
        assert process.returncode == 130
        assert "the same command goes on" in told and "Traceback" not in told


def test_a_scanning_process_that_is_killed(tars, tmp_path):
    out = tmp_path / "out"
    with http_server(tars) as server:
        server.faults["/web-001.tar"] = stall
        with subprocess.Popen(
            command(server.url, out, "--jobs", "1"), env=ENVIRONMENT, stderr=subprocess.PIPE
        ) as process:
            wait_until(lambda: server.requests["/web-001.tar"])
            for child in scanners(process.pid):
                child.kill()
            told = process.stderr.read().decode()
        assert process.returncode == 2
        assert "a process that scans was killed" in told and "Traceback" not in told


def test_transport_that_fails_stops_with_the_shards_name(tars, tmp_path):
    with http_server(tars) as server:
        server.faults["/train-1.tar"] = status(503)
        given = request(server.url, tmp_path / "out", transport=Transport(2, 5.0))
        with pytest.raises(UserError, match=r"train-1\.tar.*503"):
            index_shards(**given)
        assert server.requests["/train-1.tar"] == 2


def test_two_runs_at_once(tars, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    held = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another run is indexing"):
            index_shards(**request(tars, out))
        assert not any(out.iterdir())
    finally:
        os.close(held)
    index_shards(**request(tars, out))
    with http_server(tars) as server:
        server.faults["/web-001.tar"] = stall
        words = command(server.url, tmp_path / "both", "--jobs", "1")
        with subprocess.Popen(words, env=ENVIRONMENT, stderr=subprocess.DEVNULL) as first:
            wait_until(lambda: server.requests["/web-001.tar"])
            code, _, told = run(words)
            first.kill()
        assert code == 2 and "another run is indexing" in told


def test_a_kill_between_index_and_clearing_up_leaves_a_dataset(tars, tmp_path):
    out = tmp_path / "out"
    index = index_shards(**request(tars, out))
    clean = tree(out)
    (out / "index.journal").write_text("")
    (out / ".scanned").mkdir()
    (out / ".scanned" / "0.npy").write_bytes(b"")
    assert load_index(out) == index
    assert index_shards(**request(tars, out)) == index
    assert tree(out) == clean


def test_a_folder_that_cannot_be_written(tars, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot use .*file"):
        index_shards(**request(tars, tmp_path / "file" / "out"))


def test_the_command_line(tars, tmp_path, capsys):
    given = command(tars, tmp_path / "out")[len(SCRIPT) :]
    assert main([*given, "--image_size", "16", "--gray", "--order", "windowed"]) == 0
    said = capsys.readouterr().out
    assert "unlabeled: 26 samples in 3 shard(s), windowed" in said
    index = load_index(tmp_path / "out")
    assert index.fingerprint[:12] in said and index.image_shape == (16, 16, 1)
    assert main(given) == 2
    assert "holds another dataset" in capsys.readouterr().err


def test_a_bad_option_is_a_sentence(tars, tmp_path, capsys):
    given = command(tars, tmp_path / "out")[len(SCRIPT) :]
    assert main([*given, "--tries", "0"]) == 2
    assert capsys.readouterr().err == "error: data.tries is 0: give at least 1\n"
