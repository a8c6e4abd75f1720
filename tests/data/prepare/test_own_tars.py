"""Tars as people have them: what is read right, and what is refused with the reason and the fix."""

from __future__ import annotations

import json
import re
import stat
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sgan_dist import checkpoint
from sgan_dist.cli import main
from sgan_dist.config import RemoteConfig
from sgan_dist.data import known_labels
from sgan_dist.data.index import SPLITS, DatasetIndex, load_index
from sgan_dist.data.prepare.foreign import index_shards
from sgan_dist.data.remote.cache import Storage
from sgan_dist.data.stream import read_split
from sgan_dist.errors import UserError
from tests.data.prepare.tars import Files, classified, downloaded, image, request, write_tar
from tests.servers import FolderServer, Handler, http_server, status

pytestmark = pytest.mark.process


def read_ids(root: Path | str, split: str, cache: Path | None = None) -> tuple[Any, Any]:
    """Images and labels of a split."""
    remote = RemoteConfig(cache=None if cache is None else str(cache), tries=2)
    storage = Storage(str(root), remote)
    parts = list(read_split(storage, load_index(str(root), remote), split, 0, 1))
    labels = [part.labels for part in parts if part.labels is not None]
    return np.concatenate([part.images for part in parts]), labels


def with_unlabeled(files: Files, location: Path, tars: Path, out: Path) -> DatasetIndex:
    write_tar(location, files)
    return index_shards(**request(tars, out, unlabeled=[str(location)]))


# One partly labeled set


@pytest.mark.parametrize("label", ["cls", "json:label", "folder", "output.txt"])
def test_a_partly_labeled_set(tars: Path, tmp_path: Path, label: str) -> None:
    files: list[tuple[str, bytes]] = []
    for number in range(30):
        name = ("ant", "bee", "cat")[number % 3] if number % 2 else None
        key = f"{name}/{number:03d}" if label == "folder" and name else f"{number:03d}"
        files.append((f"{key}.jpg", image(number)))
        if label.startswith("json"):
            files.append((f"{key}.json", json.dumps({"label": name}).encode()))
        elif name and label != "folder":
            files.append((f"{key}.{label}", name.encode()))
    write_tar(tars / "all.tar", files)
    every = [str(tars / "all.tar")]
    index = index_shards(
        unlabeled=every,
        labeled=every,
        validation=(),
        test=(),
        validation_fraction=0.2,
        test_fraction=0.2,
        out=tmp_path / "out",
        label=label,
        jobs=1,
        progress=False,
    )
    assert index.class_names == ("ant", "bee", "cat")
    held = index.validation.samples + index.test.samples
    assert index.labeled.samples + held == 15 and held > 0
    assert index.unlabeled.samples == 30 - held
    known = np.load(tmp_path / "out" / known_labels.NAME)
    assert (known >= 0).sum() == index.labeled.samples and len(known) == index.unlabeled.samples
    seen: dict[str, set[bytes]] = {}
    for split in SPLITS:
        images, _ = read_ids(tmp_path / "out", split)
        seen[split] = {picture.tobytes() for picture in images}
    assert seen["labeled"] <= seen["unlabeled"] and not seen["validation"] & seen["test"]
    assert not seen["unlabeled"] & (seen["validation"] | seen["test"])


def test_fractions_and_patterns_exclude_each_other(tars: Path, tmp_path: Path) -> None:
    wrong: list[dict[str, Any]] = [
        {"validation_fraction": 0.1},
        {"validation": []},
        {"test": [], "test_fraction": 1.5},
    ]
    for options in wrong:
        with pytest.raises(UserError, match=r"shards, or --.*_fraction"):
            index_shards(**request(tars, tmp_path / "out", **options))


def test_a_cut_does_not_depend_on_the_order_of_shards(tars: Path, tmp_path: Path) -> None:
    shards = [str(tars / "train-0.tar"), str(tars / "train-1.tar")]
    cut = {"validation": (), "test": (), "validation_fraction": 0.3, "test_fraction": 0.3}
    seen = []
    for number, some in enumerate((shards, shards[::-1])):
        out = tmp_path / str(number)
        index_shards(**request(tars, out, unlabeled=some, labeled=some, **cut))
        seen.append({split: {x.tobytes() for x in read_ids(out, split)[0]} for split in SPLITS})
    assert seen[0] == seen[1]


# What other programs do to tars


def test_files_of_macos_and_hard_links_and_joined_and_unsorted_tars(
    tars: Path, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    path = tars / "train-1.tar"
    pictures = [(f"d/{n}.jpg", image(n)) for n in range(6)]
    labels = [(f"d/{n}.cls", b"%d" % (n % 3)) for n in range(6)]
    write_tar(path, [("d/._0.jpg", b"\0\5\x16\7"), *pictures, *labels])  # unsorted
    write_tar(tmp_path / "more.tar", [("d/0.jpg", image(9)), ("d/0.cls", b"2")])
    with open(path, "ab") as file:
        file.write((tmp_path / "more.tar").read_bytes())
    with tarfile.open(tars / "links.tar", "w") as tar:
        (tmp_path / "0.jpg").write_bytes(image(7))
        (tmp_path / "1.jpg").hardlink_to(tmp_path / "0.jpg")
        for name in ("0.jpg", "1.jpg"):
            tar.add(tmp_path / name, name)
    options = {"labeled": [str(path)], "unlabeled": [str(tars / "links.tar")]}
    index = index_shards(**request(tars, tmp_path / "out", **options))
    assert index.labeled.label_histogram == (2, 2, 3)
    assert index.unlabeled.samples == 2
    assert "1 files that macOS adds are passed over: the first is d/._0.jpg of" in log.text
    images, _ = read_ids(tmp_path / "out", "unlabeled")
    np.testing.assert_array_equal(images[0], images[1])


def test_two_images_in_a_record(tars: Path, tmp_path: Path) -> None:
    files = [(f"{n}.{kind}", image(n)) for n in range(4) for kind in ("jpg", "png")]
    with pytest.raises(UserError, match=r"record 0: it holds two images, png and jpg.*--image png"):
        with_unlabeled(files, tars / "masks.tar", tars, tmp_path / "out")
    masks = [str(tars / "masks.tar")]
    index = index_shards(**request(tars, tmp_path / "out", unlabeled=masks, image="jpg"))
    assert index.unlabeled.samples == 4


def test_dots_in_names(tars: Path, tmp_path: Path) -> None:
    files = [(f"IMG_2024.01.02_{n:04d}.jpg", image(n)) for n in range(4)]
    message = (
        r"it holds no image: IMG_2024\.01\.02_0000\.jpg has the extension 01\.02_0000\.jpg.*rename"
    )
    with pytest.raises(UserError, match=message):
        with_unlabeled(files, tars / "dots.tar", tars, tmp_path / "out")


def test_folders_at_any_depth(tars: Path, tmp_path: Path) -> None:
    for number, name in enumerate(("0.tar", "a/1.tar", "a/b/2.tar")):
        write_tar(tars / "deep" / name, downloaded(10 * number, 3))
    deep = [str(tars / "deep" / "**" / "*.tar")]
    index = index_shards(**request(tars, tmp_path / "out", unlabeled=deep))
    assert index.unlabeled.samples == 9


# A dataset that is moved or served


def test_a_dataset_is_moved_and_served_with_its_tars(tmp_path: Path) -> None:
    site = tmp_path / "site"
    for name, first in (("web-000", 0), ("train-0", 100), ("val", 200), ("test", 300)):
        write_tar(site / "tars" / f"{name}.tar", classified(first, 6))
    index = index_shards(
        **request(
            site / "tars",
            site / "index",
            unlabeled=[str(site / "tars" / "web-000.tar")],
            labeled=[str(site / "tars" / "train-0.tar")],
        )
    )
    expected, _ = read_ids(site / "index", "unlabeled")
    site.rename(tmp_path / "moved")
    moved = tmp_path / "moved" / "index"
    assert load_index(moved) == index
    np.testing.assert_array_equal(read_ids(moved, "unlabeled")[0], expected)
    with http_server(tmp_path / "moved") as server:
        images, _ = read_ids(f"{server.url}/index", "unlabeled", tmp_path / "cache")
    np.testing.assert_array_equal(images, expected)


# Secrets


def signed(secret: str) -> Callable[[Handler, bytes], None]:
    def fault(handler: Handler, body: bytes) -> None:
        if f"sig={secret}" in handler.path:
            handler.begin(len(body))
            handler.wfile.write(body)
        else:
            status(403)(handler, body)

    return fault


def sign(server: FolderServer, secret: str) -> None:
    for path in server.folder.glob("*.tar"):
        server.faults[f"/{path.name}"] = signed(secret)


def signed_command(server: FolderServer, out: Path, secret: str) -> list[str]:
    base = server.url.replace("//", "//user:pass%40word@")

    def url(name: str) -> str:
        return f"{base}/{name}.tar?sig={secret}"

    return [
        "index", url("web-{000..002}"), "--labeled", url("train-{0,1}"), "--validation", url("val"),
        "--test", url("test"), "--out", str(out), "--jobs=1", "--tries=1",
    ]  # fmt: skip


def test_index_expire_renew_resume(
    tars: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, run, cache = tmp_path / "out", tmp_path / "run", tmp_path / "cache"
    train = [
        "train", "--config=digits", f"--data.root={out}", "--data.source=null", "--batch.labeled=6",
        "--batch.unlabeled=6", "--batch.fake=6", "--train.evaluate_every=1", "--checkpoint.every=1",
        f"--run_dir={run}", f"--remote.cache={cache}", "--remote.tries=1", "--tracking.wandb=false",
    ]  # fmt: skip
    with http_server(tars) as server:
        sign(server, "FIRST")
        assert main(signed_command(server, out, "FIRST")) == 0
        fingerprint = load_index(out).fingerprint
        assert stat.S_IMODE((out / "secrets.json").stat().st_mode) == 0o600
        assert main([*train, "--train.steps=1"]) == 0
        for path in cache.glob("??/*"):
            path.unlink()
        sign(server, "SECOND")
        assert main([*train, "--train.steps=2"]) == 2
        assert "403" in (said := capsys.readouterr()).err and "--renew" in said.err
        assert main([*signed_command(server, out, "SECOND"), "--renew"]) == 0
        assert load_index(out).fingerprint == fingerprint
        assert main([*train, "--train.steps=2"]) == 0
        other = [
            word.replace("web-{000..002}", "web-000") for word in signed_command(server, out, "X")
        ]
        assert main([*other, "--renew"]) == 2
        assert "match other shards" in capsys.readouterr().err
        server.faults["/web-001.tar"] = status(500)
        assert main(signed_command(server, tmp_path / "third", "SECOND")) == 75
    secrets = re.compile(rb"pass%40word|pass@word|FIRST|SECOND|sig=")
    said = capsys.readouterr()
    assert not secrets.search((said.out + said.err).encode())
    meta = checkpoint.read_meta(checkpoint.latest(run)[0] or Path())
    assert not secrets.search(json.dumps(meta, default=str).encode())
    for path in (*tmp_path.rglob("*"),):
        if path.is_file() and path.name != "secrets.json":
            assert not secrets.search(path.read_bytes()), path


def test_urls_that_differ_in_their_query_alone(tars: Path, tmp_path: Path) -> None:
    def serve(handler: Handler, body: bytes) -> None:
        body = (tars / f"{handler.path.partition('file=')[2]}.tar").read_bytes()
        handler.begin(len(body))
        handler.wfile.write(body)

    with http_server(tars) as server:
        server.faults["/get"] = serve
        urls = [f"{server.url}/get?file={name}" for name in ("web-000", "web-001")]
        index = index_shards(**request(tars, tmp_path / "out", unlabeled=urls))
        shards = index.unlabeled.shards
        assert [shard.name for shard in shards] == [f"{server.url}/get", f"{server.url}/get#1"]
        images, _ = read_ids(tmp_path / "out", "unlabeled", tmp_path / "cache")
    local = [str(tars / f"{name}.tar") for name in ("web-000", "web-001")]
    index_shards(**request(tars, tmp_path / "local", unlabeled=local))
    np.testing.assert_array_equal(images, read_ids(tmp_path / "local", "unlabeled")[0])


def test_a_signed_root_is_not_shown(
    tars: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index_shards(**request(tars, tmp_path / "out"))
    run = tmp_path / "run"
    with http_server(tmp_path) as server:
        root = f"{server.url.replace('//', '//user:pass%40word@')}/out?sig=FIRST"
        line = [
            "train", "--config=digits", f"--data.root={root}", "--data.source=null",
            "--batch.labeled=6", "--batch.unlabeled=6", "--batch.fake=6", "--train.steps=1",
            f"--run_dir={run}", f"--remote.cache={tmp_path / 'cache'}", "--tracking.wandb=false",
        ]  # fmt: skip
        assert main(line) == 0
        assert main(["report", str(run)]) == 0
        assert main(["compare", str(run)]) == 0
    said = capsys.readouterr()
    for text in (
        said.out,
        said.err,
        *(path.read_text("latin-1") for path in run.glob("*.[hjc][ts]*")),
    ):
        assert not re.search(r"pass(%40|@)word|FIRST", text)
    assert stat.S_IMODE((run / "config.yaml").stat().st_mode) == 0o600
