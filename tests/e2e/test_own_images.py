"""From people's images to a classifier, by the commands of the documentation."""

from __future__ import annotations

import io
import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sgan_dist.cli import main
from sgan_dist.data.index import load_index
from tests.data.prepare.idx import REAL, needs_real

pytestmark = [pytest.mark.process, pytest.mark.timeout(300)]

SHORT = (
    "--train.steps=6",
    "--train.evaluate_every=3",
    "--train.sample_every=0",
    "--checkpoint.every=6",
    "--tracking.wandb=false",
    "--batch.labeled=8",
    "--batch.unlabeled=16",
    "--batch.fake=8",
)


def photographs() -> dict[str, Image.Image]:
    """The two photographs that scikit-learn ships."""
    spec = find_spec("sklearn")
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent / "datasets" / "images"
    return {name: Image.open(folder / f"{name}.jpg").convert("RGB") for name in ("china", "flower")}


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write_photos(root: Path) -> None:
    """Crops of two photographs as people have them, some of them broken."""
    rng = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    for name, photo in photographs().items():
        files: dict[str, bytes] = {}
        for number in range(40):
            left, top, width, height = rng.integers([0, 0, 60, 60], [300, 200, 300, 200]).tolist()
            crop = photo.crop((left, top, left + width, top + height))
            files[f"{number:02d}.jpg"] = encoded(crop, "JPEG", quality=90)
        crop = photo.crop((100, 100, 300, 250))
        files |= {
            "gray.JPG": encoded(crop.convert("L"), "JPEG"),
            "cmyk.jpeg": encoded(crop.convert("CMYK"), "JPEG"),
            "phone.jpg": encoded(crop, "JPEG", exif=exif),
            "alpha.png": encoded(crop.convert("RGBA"), "PNG"),
            "palette.gif": encoded(crop, "GIF"),
            "scan.tiff": encoded(crop, "TIFF"),
            "new.avif": encoded(crop, "AVIF"),
            "old.bmp": encoded(crop, "BMP"),
            "huge.jpg": encoded(photo.resize((11_000, 8_000)), "JPEG"),
            "cut.jpg": files["00.jpg"][:-300],
            "empty.png": b"",
            "page.jpg": b"<html>not found</html>",
            "raw.heic": b"heic",
            "._gray.JPG": b"\0\5\x16\7",
        }
        for file, data in files.items():
            labeled = int(file[:2]) < 20 if file[:2].isdigit() else True
            folder = root / (name if labeled else f"unlabeled/{name}")
            folder.mkdir(parents=True, exist_ok=True)
            (folder / file).write_bytes(data)


def test_a_folder_of_photographs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_photos(tmp_path / "photos")
    data, run = tmp_path / "data", tmp_path / "run"
    prepare = [
        "prepare",
        f"--source=folder:{tmp_path / 'photos'}",
        "--image_size=32",
        f"--out={data}",
    ]
    assert main(prepare) == 0
    said = capsys.readouterr().err
    assert "2 files passed over" in said and "raw.heic" in said
    assert "6 images of 104 cannot be decoded and are left out" in said
    index = load_index(data)
    assert index.class_names == ("china", "flower") and index.image_hwc == (32, 32, 3)
    # 29 of each class are labeled and good: a fifth for the test; a tenth of all 64 for validation
    assert (index.test.samples, index.validation.samples) == (11, 6)
    assert index.labeled.samples == 58 - 17 and index.unlabeled.samples == 98 - 17
    assert main(["prepare", "--inspect", str(data)]) == 0
    assert "6 images could not be decoded:" in capsys.readouterr().out
    train = ["train", "--config=digits", f"--data.root={data}", "--data.source=null"]
    assert main([*train, f"--run_dir={run}", *SHORT]) == 0
    assert main(["evaluate", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["images"] == 11


@needs_real
@pytest.mark.slow
def test_cifar10_from_parquet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of JPEG copies, so that figures on it are a little worse than on the original."""
    data, run = tmp_path / "data", tmp_path / "run"
    source = f"--source=parquet:{REAL / 'cifar10'}"
    assert main(["prepare", source, "--labels_per_class=400", f"--out={data}"]) == 0
    index = load_index(data)
    assert index.class_names[0] == "airplane" and index.image_hwc == (32, 32, 3)
    assert index.labeled.label_histogram == (400,) * 10
    assert (index.test.samples, index.unlabeled.samples + index.validation.samples) == (
        10_000,
        50_000,
    )
    train = ["train", "--config=digits", f"--data.root={data}", "--data.source=null"]
    assert main([*train, f"--run_dir={run}", *SHORT]) == 0
    assert main(["evaluate", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["images"] == 10_000
