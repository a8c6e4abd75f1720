"""Damage is never missed: truncation before indexing, and any changed byte afterwards."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sgan_dist.config import RemoteConfig
from sgan_dist.data.index import SPLITS, load_index
from sgan_dist.data.prepare.foreign import index_shards
from sgan_dist.data.prepare.shards import prepare
from sgan_dist.data.prepare.splits import Labels
from sgan_dist.data.remote.cache import Storage
from sgan_dist.data.stream import read_split
from sgan_dist.errors import UserError
from tests.data.prepare.commands import ENVIRONMENT, SGAN_DIST, file_sums
from tests.data.prepare.tars import classified, image, request, write_tar
from tests.data.prepare.test_own_images import class_folder

SHARDS = ("web-000", "train-0", "val", "test")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tars of six images of noise, and their index beside them."""
    root = tmp_path_factory.mktemp("dataset")
    for number, name in enumerate(SHARDS):
        write_tar(root / "tars" / f"{name}.tar", classified(100 * number, 6))
    index_shards(
        **request(
            root / "tars",
            root / "index",
            unlabeled=[str(root / "tars" / "web-000.tar")],
            labeled=[str(root / "tars" / "train-0.tar")],
        )
    )
    return root


def read_all(root: Path) -> dict[str, bytes]:
    """The bytes of all images and labels of each split."""
    index = load_index(root)
    storage = Storage(str(root), RemoteConfig())
    everything = {}
    for split in SPLITS:
        parts = list(read_split(storage, index, split, 0, 1))
        arrays = [array for part in parts for array in (part.images, part.labels, part.ids)]
        everything[split] = b"".join(array.tobytes() for array in arrays if array is not None)
    return everything


@settings(
    deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    name=st.sampled_from([*SHARDS, "sidecar"]),
    place=st.floats(0, 1, exclude_max=True),
    change=st.integers(1, 255),
)
def test_any_changed_byte_of_an_indexed_dataset_is_refused(
    dataset: Path, tmp_path: Path, name: str, place: float, change: int
) -> None:
    expected = read_all(dataset / "index")
    root = tmp_path / "copy"
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(dataset, root)
    path = root / "tars" / f"{name}.tar"
    if name == "sidecar":
        path = root / "index" / "labeled" / "000000.tar.samples.npy"
    data = bytearray(path.read_bytes())
    assert read_all(root / "index") == expected
    data[int(place * len(data))] ^= change
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"sha256 differs|has changed since"):
        read_all(root / "index")


@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(number=st.integers(0, 5), kept=st.floats(0, 0.98), whole_tar=st.booleans())
def test_what_is_cut_short_before_indexing_is_refused_or_skipped(
    dataset: Path, tmp_path: Path, number: int, kept: float, whole_tar: bool
) -> None:
    root = tmp_path / "cut"
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(dataset / "tars", root / "tars")
    path = root / "tars" / "web-000.tar"
    arguments = request(
        root / "tars",
        root / "index",
        unlabeled=[str(path)],
        labeled=[str(root / "tars" / "train-0.tar")],
    )
    if whole_tar:
        data = path.read_bytes().rstrip(b"\0")
        path.write_bytes(data[: int(kept * len(data)) // 512 * 512 + 100])
        with pytest.raises(UserError, match="1 of 4 shards cannot be indexed"):
            index_shards(**arguments)
        return
    files = [(f"{n}.jpg", image(n)) for n in range(6)]
    files[number] = (files[number][0], image(number)[: int(kept * len(image(number)))])
    write_tar(path, files)
    index = index_shards(**arguments)
    assert index.unlabeled.samples == 5
    assert f"\t{number}\t" in (root / "index" / "skipped.tsv").read_text()


@pytest.mark.process
def test_a_killed_preparation_continues(tmp_path: Path) -> None:
    root = class_folder(tmp_path / "photos")
    for number in range(150):  # so that there are several chunks to decode
        for source in sorted(root.glob("*/0*.png"))[:30]:
            shutil.copy(source, source.with_name(f"{number:03d}-{source.name}"))
    command = [
        *SGAN_DIST, "prepare", f"--source=folder:{root}", "--image_size=24", "--jobs=2",
        "--labels_per_class=5", f"--out={tmp_path / 'out'}",
    ]  # fmt: skip
    decoded = tmp_path / ".out.decoded"
    with subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.DEVNULL) as process:
        while not list(decoded.glob("*.json")):
            assert process.poll() is None
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    before = {path: path.stat().st_mtime_ns for path in decoded.glob("*.json")}
    assert before and not (tmp_path / "out").exists()
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "images were decoded before" in done.stderr
    assert not decoded.exists()
    straight = prepare(
        f"folder:{root}",
        tmp_path / "straight",
        Labels(5),
        image_size=(24, 24),
        jobs=1,
        progress=False,
    )
    assert load_index(tmp_path / "out") == straight
    assert file_sums(tmp_path / "out") == file_sums(tmp_path / "straight")


def test_pixels_do_not_depend_on_processes_or_chunks(tmp_path: Path) -> None:
    """A chunk that is decoded again writes the same place."""
    root = class_folder(tmp_path / "photos")
    for name in ("a", "b"):
        prepare(f"folder:{root}", tmp_path / name, Labels(2), image_size=(20, 20), progress=False)
    assert file_sums(tmp_path / "a") == file_sums(tmp_path / "b")
    assert np.load(tmp_path / "a" / "unlabeled" / "known_labels.npy").dtype == np.int64
