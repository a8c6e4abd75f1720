"""index.json: round trip, fingerprint, and the refusals."""

import dataclasses
import json
import re
import shutil

import pytest

from sgan_dist.data.index import (
    FULL_ORDER_BYTES,
    fingerprint,
    load_index,
    order_for,
    save,
)
from sgan_dist.data.prepare import prepare
from sgan_dist.errors import UserError


@pytest.fixture
def root(tmp_path):
    prepare("digits", tmp_path / "digits", progress=False)
    return tmp_path / "digits"


def edit(root, **fields):
    path = root / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_round_trip(root, tmp_path):
    index = load_index(root)
    assert index.image_shape == (28, 28, 1)
    assert index.class_names == tuple("0123456789")
    assert index.source == "digits"
    assert [index.split(s).samples for s in ("labeled", "unlabeled", "validation", "test")] == [
        100,
        3500,
        500,
        1000,
    ]
    assert index.labeled.label_histogram == (10,) * 10
    assert index.unlabeled.label_histogram == ()
    save(index, root)
    assert load_index(root) == index


def test_the_json_holds_no_path_of_the_machine(root):
    assert str(root.parent) not in (root / "index.json").read_text()


def test_order_by_size():
    assert order_for(FULL_ORDER_BYTES // 784, (28, 28, 1)) == "full"
    assert order_for(FULL_ORDER_BYTES // 784 + 1, (28, 28, 1)) == "windowed"


def test_fingerprint_covers_what_is_trained_on(root):
    index = load_index(root)
    shard = index.unlabeled.shards[0]

    def unlabeled(**fields):
        return dataclasses.replace(index, unlabeled=dataclasses.replace(index.unlabeled, **fields))

    changed = [
        unlabeled(order="windowed"),
        unlabeled(shards=(dataclasses.replace(shard, sha256="0"),)),
        dataclasses.replace(index, class_names=("a",) * 10),
        dataclasses.replace(index, order_version=3),
    ]
    assert len({fingerprint(i) for i in (index, *changed)}) == 5
    # a renamed file is the same data
    assert (
        fingerprint(unlabeled(shards=(dataclasses.replace(shard, name="x"),))) == index.fingerprint
    )


def test_absent(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=r"no dataset at .*prepare_shards.py --source"):
            load_index(folder)


def advice(root):
    return re.escape(f"remove {root} (rm -r '{root}') and prepare the dataset again") + "$"


@pytest.mark.parametrize("content", ["{", "[]", '{"index_version": 99}', '{"index_version": 1}'])
def test_not_an_index(tmp_path, content):
    root = tmp_path / "a folder"
    root.mkdir()
    (root / "index.json").write_text(content)
    with pytest.raises(UserError, match=f"index.json .*{advice(root)}") as caught:
        load_index(root)
    # preparing stops with the same words, and does what it should when they are followed
    with pytest.raises(UserError) as again:
        prepare("digits", root, progress=False)
    assert str(again.value) == str(caught.value)
    shutil.rmtree(root)
    prepare("digits", root, progress=False)


def test_changed_by_hand(root):
    edit(root, class_names=list("abcdefghij"))
    with pytest.raises(UserError, match="changed by hand"):
        load_index(root)


def test_another_order_version(root):
    index = dataclasses.replace(load_index(root), order_version=3)
    save(dataclasses.replace(index, fingerprint=fingerprint(index)), root)
    with pytest.raises(UserError, match="order version 3"):
        load_index(root)


@pytest.mark.parametrize("split", ["labeled", "validation", "test"])
def test_empty_splits(root, split):
    index = load_index(root)
    empty = dataclasses.replace(index.split(split), samples=0, shards=(), label_histogram=(0,) * 10)
    index = dataclasses.replace(index, **{split: empty})
    save(dataclasses.replace(index, fingerprint=fingerprint(index)), root)
    with pytest.raises(UserError, match=f"has no {split} samples: remove .* and prepare"):
        load_index(root)


def test_missing_and_truncated_shards_are_named(root):
    shard = root / "unlabeled" / "000000.tar"
    data = shard.read_bytes()
    shard.write_bytes(data[:-1])
    with pytest.raises(UserError, match=f"unlabeled/000000.tar .*{len(data) - 1} bytes"):
        load_index(root)
    shard.unlink()
    with pytest.raises(UserError, match=r"unlabeled/000000.tar .*cannot be found"):
        load_index(root)
