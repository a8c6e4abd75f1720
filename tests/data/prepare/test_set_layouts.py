"""Sources of well-known sets, in the layouts in which they are published, made here."""

from __future__ import annotations

import gzip
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.io import savemat

from sgan_dist.data.prepare.sources import load_source
from sgan_dist.data.prepare.sources.source import Columns
from sgan_dist.errors import UserError
from tests.data.prepare.idx import idx_bytes
from tests.data.prepare.test_own_images import LABELS, PICTURES, Images, picture


@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 3)])
def test_npz(tmp_path: Path, shape: tuple[int, ...]) -> None:
    images = {n: np.full((6, *shape), k, np.uint8) for k, n in enumerate(("train", "val", "test"))}
    labels = np.array([[1], [3], [7]] * 2)
    arrays: dict[str, Any] = {f"{part}_images": array for part, array in images.items()}
    numbers: dict[str, Any] = {f"{part}_labels": labels for part in images}
    path = tmp_path / "medical.npz"
    np.savez(path, **arrays, **numbers)
    source = load_source(f"npz:{path}")
    assert source.class_names == ("1", "3", "7")
    assert source.train.labels.tolist() == [0, 1, 2] * 2
    assert source.validation is not None and (source.validation.array == 1).all()
    assert source.train.array.shape[1:] == (8, 8, 3 if len(shape) == 3 else 1)
    np.savez(path, **arrays, train_labels=np.array([{}, {}, {}], object))
    with pytest.raises(UserError, match=r"holds Python objects .*may run code.*save plain arrays"):
        load_source(f"npz:{path}")
    np.savez(path, **arrays, train_labels=np.zeros((6, 14)))
    with pytest.raises(UserError, match="must be one number an image"):
        load_source(f"npz:{path}")
    np.savez(path, x=labels)
    with pytest.raises(UserError, match="it needs train_images and train_labels"):
        load_source(f"npz:{path}")


def planes(images: Images) -> bytes:
    return images.transpose(0, 3, 1, 2).tobytes()


@pytest.mark.parametrize("classes", [10, 100])
def test_cifar(tmp_path: Path, classes: int) -> None:
    names = "".join(f"class {n}\n" for n in range(classes))
    coarse = b"\5" if classes == 100 else b""
    records = [coarse + bytes([n % 7]) + planes(picture(n)[None]) for n in range(20)]
    files = ["test.bin", "train.bin"]
    if classes == 10:
        files = ["test_batch.bin", *(f"data_batch_{n}.bin" for n in range(1, 6))]
    for file in files:
        (tmp_path / file).write_bytes(b"".join(records))
    (tmp_path / ("batches.meta.txt" if classes == 10 else "fine_label_names.txt")).write_text(names)
    source = load_source(f"cifar:{tmp_path}")
    assert len(source.train.array) == 20 * (len(files) - 1)
    assert source.train.labels[:20].tolist() == [n % 7 for n in range(20)]
    np.testing.assert_array_equal(source.train.array[3], PICTURES[3])
    assert source.class_names[1] == "class 1" and source.test is not None
    (tmp_path / "test.bin").unlink(missing_ok=True)
    (tmp_path / files[-1]).write_bytes(records[0][:-1])
    (tmp_path / files[0]).write_bytes(records[0][:-1])
    with pytest.raises(UserError, match="download"):
        load_source(f"cifar:{tmp_path}")


def test_pickles_of_cifar_are_refused(tmp_path: Path) -> None:
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps({"data": b""}))
    with pytest.raises(UserError, match=r"Python version.*may run code.*binary version"):
        load_source(f"cifar:{tmp_path}")


def test_svhn(tmp_path: Path) -> None:
    for part, count in (("train", 12), ("test", 6), ("extra", 9)):
        labels = np.arange(1, count + 1).reshape(-1, 1) % 10
        labels[labels == 0] = 10
        images = PICTURES[:count].transpose(1, 2, 3, 0)
        savemat(tmp_path / f"{part}_32x32.mat", {"X": images, "y": labels.astype(np.uint8)})
    source = load_source(f"svhn:{tmp_path}")
    assert source.train.labels.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2]
    np.testing.assert_array_equal(source.train.array, PICTURES[:12])
    assert source.unlabeled is not None
    assert source.unlabeled.known.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    (tmp_path / "test_32x32.mat").write_bytes(b"MATLAB 7.3 or no file of it" * 40)
    with pytest.raises(UserError, match=r"cannot read .*test_32x32.mat"):
        load_source(f"svhn:{tmp_path}")


def test_stl10(tmp_path: Path) -> None:
    images = np.stack([picture(n, side=96) for n in range(20)])
    for part, count in (("train", 20), ("test", 10), ("unlabeled", 5)):
        stored = images[:count].transpose(0, 3, 2, 1)  # channel, column, row
        (tmp_path / f"{part}_X.bin").write_bytes(stored.tobytes())
        if part != "unlabeled":
            labels = np.arange(count) % 10 + 1
            (tmp_path / f"{part}_y.bin").write_bytes(labels.astype(np.uint8).tobytes())
    (tmp_path / "class_names.txt").write_text("\n".join("abcdefghij"))
    (tmp_path / "fold_indices.txt").write_text("0 2 4\n1 3 5 7\n")
    source = load_source(f"stl10:{tmp_path}", Columns(fold=1))
    np.testing.assert_array_equal(source.train.array, images)
    assert np.flatnonzero(source.train.labels != -1).tolist() == [1, 3, 5, 7]
    assert source.train.known.tolist() == [n % 10 for n in range(20)]
    assert source.unlabeled is not None and len(source.unlabeled.images) == 5
    with pytest.raises(UserError, match="--fold is 2"):
        load_source(f"stl10:{tmp_path}", Columns(fold=2))


@pytest.mark.parametrize("form", ["kaggle", "7-zip", "folders", "named gz"])
def test_names_of_idx_files(tmp_path: Path, form: str) -> None:
    folder = tmp_path / "letters"
    folder.mkdir()
    for part, count in (("train", 30), ("t10k", 10)):
        labels = (np.arange(count) % 3 + 1).astype(np.uint8)  # from 1 on, as EMNIST's letters
        for kind, array in (("images-idx3", PICTURES[:count, :, :, 0]), ("labels-idx1", labels)):
            data, name = idx_bytes(array), f"{part}-{kind}-ubyte"
            if form == "kaggle":
                name = name.replace("-idx", ".idx")
            if form == "folders":
                (folder / name).mkdir()
                name = f"{name}/{name}"
            if form == "7-zip":
                name = f"emnist-letters-{name.replace('t10k', 'test')}.gz"
                data = gzip.compress(data)
            if form == "named gz":
                name += ".gz"
            (folder / name).write_bytes(data)
    for place in (folder, folder / "emnist-letters-") if form == "7-zip" else (folder,):
        source = load_source(f"idx:{place}")
        assert source.class_names == ("1", "2", "3")
        assert source.train.labels.tolist() == [0, 1, 2] * 10
        assert source.test is not None and len(source.test.labels) == 10


def test_several_sets_of_idx_files(tmp_path: Path) -> None:
    for prefix in ("emnist-letters-", "emnist-digits-"):
        for name, array in (("images-idx3", PICTURES[..., 0]), ("labels-idx1", LABELS)):
            data = idx_bytes(array.astype(np.uint8))
            (tmp_path / f"{prefix}train-{name}-ubyte").write_bytes(data)
    with pytest.raises(UserError, match=r"several sets.*emnist-digits- or .*emnist-letters-"):
        load_source(f"idx:{tmp_path}")
    assert load_source(f"idx:{tmp_path / 'emnist-digits'}").class_names == ("0", "1", "2")
