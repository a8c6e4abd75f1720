"""index.json: round trip, fingerprint, and the refusals."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from sgan_dist.data.index import (
    FULL_ORDER_BYTES,
    SPLITS,
    DatasetIndex,
    Shard,
    SplitIndex,
    fingerprint,
    load_index,
    order_for,
    save,
    with_fingerprint,
)
from sgan_dist.data.prepare.shards import prepare
from sgan_dist.errors import UserError
from tests.data.datasets import with_split


def edit(root: Path, **fields: Any) -> None:
    path = root / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_round_trip(digits_copy: Path) -> None:
    index = load_index(digits_copy)
    assert index.image_hwc == (28, 28, 1)
    assert index.class_names == tuple("0123456789")
    assert index.source == "digits"
    assert [index.split(name).samples for name in SPLITS] == [100, 3500, 500, 1000]
    assert index.labeled.label_histogram == (10,) * 10
    assert index.unlabeled.label_histogram == ()
    save(index, digits_copy)
    assert load_index(digits_copy) == index


def test_an_index_with_the_old_name_of_the_shape_is_read(digits_copy: Path) -> None:
    index, path = load_index(digits_copy), digits_copy / "index.json"
    content = json.loads(path.read_text())
    content["image_shape"] = content.pop("image_hwc")
    path.write_text(json.dumps(content))
    assert load_index(digits_copy) == index


def test_fingerprints_are_pinned() -> None:
    # another one here means that no run of an earlier version can be resumed
    split = SplitIndex("packed", "full", 256, 10, (5, 5), (Shard("a.tar", 10, 9000, "0" * 64),))
    index = DatasetIndex(
        **dict.fromkeys(SPLITS, split),
        image_hwc=(28, 28, 1),
        class_names=("a", "b"),
        label="cls",
        resize="none",
        source="any",
        request="any",
        label_seed=0,
        labels_per_class=5,
        order_version=2,
        fingerprint="",
        decode_version=1,
    )
    assert fingerprint(index) == "15bcd7b63042d8387bdad02ee6c2437e50a25f38319d98b9c4261355e979358a"


def test_the_json_holds_no_path_of_the_machine(digits_copy: Path) -> None:
    assert str(digits_copy.parent) not in (digits_copy / "index.json").read_text()


def test_order_by_size() -> None:
    assert order_for(FULL_ORDER_BYTES // 784, (28, 28, 1)) == "full"
    assert order_for(FULL_ORDER_BYTES // 784 + 1, (28, 28, 1)) == "windowed"


def test_fingerprint_covers_what_is_trained_on(digits: Path) -> None:
    index = load_index(digits)
    shard = index.unlabeled.shards[0]
    changed = [
        with_split(index, "unlabeled", order="windowed"),
        with_split(index, "unlabeled", shards=(dataclasses.replace(shard, sha256="0"),)),
        dataclasses.replace(index, class_names=("a",) * 10),
        dataclasses.replace(index, order_version=3),
    ]
    assert len({fingerprint(i) for i in (index, *changed)}) == 5
    # a renamed file is the same data
    renamed = with_split(index, "unlabeled", shards=(dataclasses.replace(shard, name="x"),))
    assert fingerprint(renamed) == index.fingerprint


def test_absent(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=r"no dataset at .*sgan-dist prepare --source"):
            load_index(folder)


@pytest.mark.parametrize("content", ["{", "[]", '{"index_version": 99}', '{"index_version": 1}'])
def test_not_an_index(tmp_path: Path, content: str) -> None:
    root = tmp_path / "a folder"
    root.mkdir()
    (root / "index.json").write_text(content)
    advice = re.escape(f"remove {root} (rm -r '{root}') and prepare the dataset again") + "$"
    with pytest.raises(UserError, match=f"index.json .*{advice}") as loading:
        load_index(root)
    # preparing stops with the same words, and works once they are followed
    with pytest.raises(UserError) as preparing:
        prepare("digits", root, progress=False)
    assert str(preparing.value) == str(loading.value)
    shutil.rmtree(root)
    prepare("digits", root, progress=False)


def test_changed_by_hand(digits_copy: Path) -> None:
    edit(digits_copy, class_names=list("abcdefghij"))
    with pytest.raises(UserError, match="changed by hand"):
        load_index(digits_copy)


def test_another_order_version(digits_copy: Path) -> None:
    index = dataclasses.replace(load_index(digits_copy), order_version=3)
    save(with_fingerprint(index), digits_copy)
    with pytest.raises(UserError, match="order version 3"):
        load_index(digits_copy)


@pytest.mark.parametrize("split", ["labeled", "validation", "test"])
def test_empty_splits(digits_copy: Path, split: str) -> None:
    index = load_index(digits_copy)
    index = with_split(index, split, samples=0, shards=(), label_histogram=(0,) * 10)
    save(with_fingerprint(index), digits_copy)
    with pytest.raises(UserError, match=f"has no {split} samples: remove .* and prepare"):
        load_index(digits_copy)


def test_missing_and_truncated_shards_are_named(digits_copy: Path) -> None:
    shard = digits_copy / "unlabeled" / "000000.tar"
    data = shard.read_bytes()
    shard.write_bytes(data[:-1])
    with pytest.raises(UserError, match=f"unlabeled/000000.tar .*{len(data) - 1} bytes"):
        load_index(digits_copy)
    shard.unlink()
    with pytest.raises(UserError, match=r"unlabeled/000000.tar .*cannot be found"):
        load_index(digits_copy)
