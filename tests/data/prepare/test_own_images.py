"""Sources of people's own images: each made here, as they have it, and read as it was made."""

from __future__ import annotations

import csv
import io
import json
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from PIL import Image

from sgan_dist.cli import SOURCES, main
from sgan_dist.config import RemoteConfig
from sgan_dist.data.index import SPLITS, DatasetIndex, load_index
from sgan_dist.data.known_labels import NAME as known_labels_file
from sgan_dist.data.prepare.shards import prepare
from sgan_dist.data.prepare.sources import KINDS, load_source
from sgan_dist.data.prepare.sources.source import Columns, Encoded, Part, number_classes
from sgan_dist.data.prepare.splits import Labels
from sgan_dist.data.remote.cache import Storage
from sgan_dist.data.stream import read_split
from sgan_dist.errors import UserError

CLASSES = ("ant", "bee", "cat")
PER_CLASS = 12
COUNT = PER_CLASS * len(CLASSES)
LABELS = np.arange(COUNT) % len(CLASSES)

Images = NDArray[np.uint8]


def picture(number: int, side: int = 32) -> Images:
    """Distinct images, uint8 (side, side, 3)."""
    y, x = np.mgrid[:side, :side]
    red = (x * 7 + number) % 256
    return np.stack([red, (y * 5 + 3 * number) % 256, np.full_like(x, number)], -1).astype(np.uint8)


PICTURES = np.stack([picture(number) for number in range(COUNT)])


def png(image: Images) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def name_of(number: int) -> str:
    return f"{number:03d}.png"


def class_folder(root: Path, unlabeled: int = 0) -> Path:
    """CLASS/NUMBER.png of all images; the last `unlabeled` ones lie in the folder itself."""
    for number, image in enumerate(PICTURES):
        labeled = number < COUNT - unlabeled
        folder = root / CLASSES[LABELS[number]] if labeled else root
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name_of(number)).write_bytes(png(image))
    return root


def read(root: Path, split: str) -> tuple[Images, NDArray[np.int64] | None]:
    parts = list(read_split(Storage(str(root), RemoteConfig()), load_index(root), split, 0, 1))
    labels = [part.labels for part in parts if part.labels is not None]
    images = np.concatenate([part.images for part in parts])
    return images, np.concatenate(labels) if labels else None


def numbers(images: Images) -> list[int]:
    """Which of PICTURES each image is."""
    found = [int(image[0, 0, 2]) for image in images]
    for number, image in zip(found, images, strict=True):
        np.testing.assert_array_equal(image, PICTURES[number])
    return found


def check_splits(root: Path, index: DatasetIndex) -> dict[str, set[int]]:
    """The images of each split, which have their own labels and are the known pictures."""
    splits = {}
    for split in SPLITS:
        images, labels = read(root, split)
        splits[split] = set(numbers(images))
        assert len(splits[split]) == index.split(split).samples
        if labels is not None:
            names = [index.class_names[label] for label in labels]
            assert names == [CLASSES[LABELS[number]] for number in numbers(images)]
    assert splits["labeled"] <= splits["unlabeled"]
    assert not splits["unlabeled"] & (splits["validation"] | splits["test"])
    return splits


def known_labels(root: Path) -> NDArray[np.int64]:
    labels: NDArray[np.int64] = np.load(root / known_labels_file)
    return labels


def test_the_help_names_all_kinds() -> None:
    assert SOURCES.endswith(f"kinds are {', '.join(KINDS)}")


def test_a_class_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = class_folder(tmp_path / "photos")
    (root / "bee" / "._000.png").write_bytes(b"\0\5\x16\7")  # of macOS
    (root / "notes.txt").write_text("no image")
    index = prepare(f"folder:{root}", tmp_path / "out", Labels(2), progress=False)
    assert (index.source, index.class_names) == ("folder:photos", CLASSES)
    assert (index.image_hwc, index.unlabeled.layout) == ((32, 32, 3), "packed")
    splits = check_splits(tmp_path / "out", index)
    assert index.labeled.label_histogram == (2, 2, 2)
    assert {split: len(rows) for split, rows in splits.items()} == {
        "labeled": 6,
        "unlabeled": COUNT - 7 - 3,
        "validation": 3,
        "test": 7,
    }
    images, _ = read(tmp_path / "out", "unlabeled")
    assert known_labels(tmp_path / "out").tolist() == [int(LABELS[n]) for n in numbers(images)]


def test_what_is_no_image_by_its_name_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = class_folder(tmp_path / "photos")
    (root / "bee" / "raw.heic").write_bytes(b"x")
    assert (
        main(
            [
                "prepare",
                f"--source=folder:{root}",
                f"--out={tmp_path / 'out'}",
                "--label_fraction=1",
            ]
        )
        == 0
    )
    output = capsys.readouterr()
    assert "1 file passed over" in output.err and "bee/raw.heic" in output.err
    assert "3 classes: 0 = ant, 1 = bee, 2 = cat" in output.err
    assert main(["prepare", f"--source={root}", f"--out={tmp_path / 'x'}"]) == 2
    assert f"for a folder of images: folder:{root}" in capsys.readouterr().err


def test_parts_of_a_folder(tmp_path: Path) -> None:
    for number, image in enumerate(PICTURES):
        part = "test" if number >= 30 else "val" if number >= 24 else "train"
        folder = tmp_path / "set" / part / CLASSES[LABELS[number]]
        if part == "train" and number >= 12:
            folder = tmp_path / "set" / "unlabeled"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name_of(number)).write_bytes(png(image))
    index = prepare(f"folder:{tmp_path / 'set'}", tmp_path / "out", Labels(3), progress=False)
    splits = check_splits(tmp_path / "out", index)
    assert splits["test"] == set(range(30, 36)) and splits["validation"] == set(range(24, 30))
    assert splits["unlabeled"] == set(range(24)) and len(splits["labeled"] - set(range(12))) == 0
    with pytest.raises(UserError, match="has validation images of its own"):
        prepare(f"folder:{tmp_path / 'set'}", tmp_path / "x", validation=3, progress=False)


def test_patterns_of_labeled_and_unlabeled_images(tmp_path: Path) -> None:
    class_folder(tmp_path / "all", unlabeled=9)
    pool = tmp_path / "pool" / "deep" / "er"
    pool.mkdir(parents=True)
    for path in sorted((tmp_path / "all").glob("*.png")):
        path.rename(pool / path.name)
    index = prepare(
        f"folder:{tmp_path}/all/*/*.png",
        tmp_path / "out",
        Labels(fraction=0.5),
        unlabeled=f"folder:{tmp_path}/pool/**/*.png",
        progress=False,
    )
    splits = check_splits(tmp_path / "out", index)
    assert set(range(COUNT - 9, COUNT)) <= splits["unlabeled"]
    images, _ = read(tmp_path / "out", "unlabeled")
    known = dict(zip(numbers(images), known_labels(tmp_path / "out").tolist(), strict=True))
    assert {known[number] for number in range(COUNT - 9, COUNT)} == {-1}


def write_csv(root: Path, labels: list[str]) -> Path:
    with open(root / "list.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "size", "label"])
        writer.writerows([f"{name_of(n)}", 32, label] for n, label in enumerate(labels))
    return root / "list.csv"


def write_jsonl(root: Path, labels: list[str]) -> Path:
    lines = [{"file_name": name_of(n), "label": label or None} for n, label in enumerate(labels)]
    (root / "list.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root / "list.jsonl"


def write_parquet(root: Path, labels: list[str]) -> Path:
    columns = {
        "image": [{"bytes": png(image), "path": name_of(n)} for n, image in enumerate(PICTURES)],
        "label": [label or None for label in labels],
    }
    (root / "data").mkdir()
    pq.write_table(pa.table(columns), root / "data" / "train-0.parquet", row_group_size=10)
    return root / "data"


def write_arrow(root: Path, labels: list[str]) -> Path:
    table = pa.table({"img": [png(image) for image in PICTURES], "class": labels})
    (root / "arrow").mkdir()
    with pa.ipc.new_stream(root / "arrow" / "data.arrow", table.schema) as writer:
        for batch in table.to_batches(max_chunksize=10):
            writer.write_batch(batch)
    return root / "arrow"


def write_tars(root: Path, labels: list[str]) -> str:
    for shard in range(2):
        with tarfile.open(root / f"{shard}.tar", "w") as tar:
            for number in range(shard * COUNT // 2, (shard + 1) * COUNT // 2):
                files = {"png": png(PICTURES[number]), "cls": labels[number].encode()}
                for extension, data in files.items():
                    info = tarfile.TarInfo(f"{number:03d}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return f"{root}/{{0..1}}.tar"


WRITERS: dict[str, Callable[[Path, list[str]], Path | str]] = {
    "csv": write_csv,
    "jsonl": write_jsonl,
    "parquet": write_parquet,
    "arrow": write_arrow,
    "tars": write_tars,
}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_partly_labeled_set_gives_the_same_splits_from_any_source(
    tmp_path: Path, kind: str
) -> None:
    labels = [CLASSES[LABELS[n]] if n < COUNT - 9 else "" for n in range(COUNT)]
    root = class_folder(tmp_path / "photos", unlabeled=9)
    expected = prepare(f"folder:{root}", tmp_path / "a", progress=False)
    flat = tmp_path / "flat"
    flat.mkdir()
    for number, image in enumerate(PICTURES):
        (flat / name_of(number)).write_bytes(png(image))
    spec = f"{kind}:{WRITERS[kind](flat, labels)}"
    index = prepare(spec, tmp_path / "b", progress=False)
    assert index.class_names == expected.class_names
    splits = check_splits(tmp_path / "b", index)
    assert splits == check_splits(tmp_path / "a", expected)
    # all that are labeled, where only some are
    assert splits["labeled"] == splits["unlabeled"] & set(range(COUNT - 9))


def test_columns_are_chosen_by_name(tmp_path: Path) -> None:
    table = pa.table({"a": [png(i) for i in PICTURES], "coarse": LABELS % 2, "fine": LABELS})
    pq.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"has the columns a, coarse, fine: .* --image_column"):
        load_source(f"parquet:{tmp_path}")
    with pytest.raises(UserError, match="--label_column"):
        load_source(f"parquet:{tmp_path}", Columns(image="a"))
    source = load_source(f"parquet:{tmp_path}", Columns("a", "fine"))
    assert source.train.labels.tolist() == LABELS.tolist()
    with pytest.raises(UserError, match="images are bytes"):
        load_source(f"parquet:{tmp_path}", Columns("coarse", "fine"))


def test_hugging_face_classes_and_parts(tmp_path: Path) -> None:
    features = {
        "img": {"_type": "Image"},
        "label": {"_type": "ClassLabel", "names": [*CLASSES, "dog"]},
    }
    noted = {"huggingface": json.dumps({"info": {"features": features}})}
    rows = [{"bytes": png(image), "path": None} for image in PICTURES]
    table = pa.table({"img": rows, "label": LABELS}).replace_schema_metadata(noted)
    pq.write_table(table.slice(0, 30), tmp_path / "train-00000-of-00001.parquet")
    pq.write_table(table.slice(30), tmp_path / "test-00000-of-00001.parquet")
    source = load_source(f"parquet:{tmp_path}")
    assert source.class_names == (*CLASSES, "dog")
    assert source.test is not None and len(source.test.labels) == 6
    by_hub = load_source(f"hub:{tmp_path}")
    assert (by_hub.class_names, by_hub.name) == (source.class_names, f"hub:{tmp_path.name}")
    assert by_hub.train.labels.tolist() == source.train.labels.tolist()
    assert items(by_hub.train) == items(source.train)


def items(part: Part) -> list[object]:
    assert isinstance(part.images, Encoded)
    return [item for chunk in part.images.chunks for item in chunk.read()]


def test_the_hub_without_a_dataset(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot load the dataset .*check its name"):
        load_source(f"hub:{tmp_path / 'absent'}")


def test_images_that_cannot_be_decoded_are_named_and_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = class_folder(tmp_path / "photos")
    broken = ["ant/000.png", "bee/004.png", "cat/035.png"]
    for name in broken:
        (root / name).write_bytes((root / name).read_bytes()[:60])
    line = [
        "prepare",
        f"--source=folder:{root}",
        f"--out={tmp_path / 'out'}",
        "--labels_per_class=2",
    ]
    assert main(line) == 0
    index = load_index(tmp_path / "out")
    splits = check_splits(tmp_path / "out", index)
    assert set.union(*splits.values()) == set(range(COUNT)) - {0, 4, 35}
    assert index.labeled.samples == 6
    assert (
        "3 images of 36 cannot be decoded and are left out: ant/000.png ("
        in capsys.readouterr().err
    )
    lines = (tmp_path / "out" / "skipped.tsv").read_text().splitlines()
    assert [line.split("\t")[:2] for line in lines] == [["train", name] for name in broken]
    for path in root.rglob("*.png"):
        path.write_bytes(b"x")
    with pytest.raises(UserError, match="none of 36 images can be read"):
        prepare(f"folder:{root}", tmp_path / "none", progress=False)
    with pytest.raises(UserError, match=r"none of the 36 train images.*can be decoded"):
        prepare(f"folder:{root}", tmp_path / "none", image_size=(16, 16), progress=False)


def test_sizes(tmp_path: Path) -> None:
    root = class_folder(tmp_path / "photos")
    Image.fromarray(picture(99, 48)).save(root / "ant" / "large.png")
    with pytest.raises(UserError, match=r"32 x 32 \(color\), another 48 x 48 .*--image_size N"):
        prepare(f"folder:{root}", tmp_path / "out", Labels(2), progress=False)
    spec, few = f"folder:{root}", Labels(2)
    index = prepare(spec, tmp_path / "a", few, image_size=(16, 24), progress=False)
    assert index.image_hwc == (16, 24, 3)
    index = prepare(
        spec, tmp_path / "b", few, image_size=(9, 9), gray=True, resize="exact", progress=False
    )
    assert index.image_hwc == (9, 9, 1)
    index = prepare(spec, tmp_path / "c", few, image_size=(72, 72), progress=False)
    assert index.unlabeled.layout == "per-sample"
    with pytest.raises(UserError, match="--gray needs --image_size"):
        prepare(spec, tmp_path / "d", gray=True, progress=False)


@pytest.mark.process
def test_arrays_are_resized_too(tmp_path: Path) -> None:
    """In two processes, since 5,000 images are no longer few."""
    line = ["prepare", "--source=digits", f"--out={tmp_path / 'out'}", "--image_size=14x20"]
    assert main([*line, "--jobs=2"]) == 0
    assert load_index(tmp_path / "out").image_hwc == (14, 20, 1)


def test_a_list_of_labeled_images(tmp_path: Path) -> None:
    root = class_folder(tmp_path / "photos", unlabeled=9)
    chosen = tmp_path / "labels.csv"
    chosen.write_text("ant/000.png\nbee/001.png\ncat/002.png\n035.png,cat\n")
    index = prepare(f"folder:{root}", tmp_path / "out", Labels(file=chosen), progress=False)
    splits = check_splits(tmp_path / "out", index)
    assert splits["labeled"] == {0, 1, 2, 35}
    for line, message in (
        ("dog.png", r"names the image 'dog.png'.*like '027.png'"),
        ("034.png", "'034.png' has no label of a known class: write NAME,LABEL .*ant, bee, cat"),
        ("034.png,dog", "'034.png' has no label of a known class"),
    ):
        chosen.write_text(f"ant/000.png\n{line}\n")
        with pytest.raises(UserError, match=message):
            prepare(f"folder:{root}", tmp_path / "x", Labels(file=chosen), progress=False)
    with pytest.raises(UserError, match="cannot read"):
        prepare(f"folder:{root}", tmp_path / "x", Labels(file=root), progress=False)


def test_other_sources_of_test_and_unlabeled_images(tmp_path: Path) -> None:
    root = class_folder(tmp_path / "photos")
    held = tmp_path / "held"
    held.mkdir()
    for name in ("bee", "cat"):
        (held / name).mkdir()
        for path in sorted((root / name).iterdir())[:3]:
            path.rename(held / name / path.name)
    source, labels = f"folder:{root}", Labels(2)
    out = tmp_path / "out"
    index = prepare(source, out, labels, test=f"folder:{held}", progress=False)
    assert index.test.label_histogram == (0, 3, 3)
    check_splits(out, index)
    pool = prepare(source, tmp_path / "b", labels, unlabeled=f"folder:{held}", progress=False)
    images, _ = read(tmp_path / "b", "unlabeled")
    known = [CLASSES[label] for label in known_labels(tmp_path / "b")]
    assert known == [CLASSES[LABELS[number]] for number in numbers(images)]
    assert pool.unlabeled.samples > index.unlabeled.samples - 6
    (held / "bee").rename(held / "wasp")
    with pytest.raises(UserError, match="has images of the class wasp, which folder:photos lacks"):
        prepare(source, tmp_path / "c", labels, test=f"folder:{held}", progress=False)


def test_number_classes() -> None:
    names, values = number_classes({"train": ["4", 4.0, [7], None, float("nan"), -1, "", "10"]})
    assert names == ("4", "7", "10")
    assert values["train"].tolist() == [0, 0, 1, -1, -1, -1, -1, 2]
    names, values = number_classes({"train": ["b", "a", "10"], "test": ["10"]})
    assert (names, values["test"].tolist()) == (("10", "a", "b"), [0])
    with pytest.raises(UserError, match="image 0 of the test part has the label 'c'"):
        number_classes({"train": ["a"], "test": ["c"]})
    with pytest.raises(UserError, match="no image has a label"):
        number_classes({"train": [None, ""]})


def test_a_zip_of_images_is_refused_with_the_fix(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "photos.zip", "w"):
        pass
    with pytest.raises(UserError, match="give a folder of images, or a pattern"):
        load_source(f"folder:{tmp_path / 'photos.zip'}")
