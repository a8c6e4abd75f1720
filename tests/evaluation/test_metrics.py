"""The classifier's file and its predictions, and the metrics that are counted with it."""

from __future__ import annotations

import io
import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from webdataset.writer import TarWriter

import sgan_dist
from sgan_dist.data.index import load_index
from sgan_dist.data.prepare.foreign import index_shards
from sgan_dist.data.stream import open_storage, read_split
from sgan_dist.errors import UserError
from sgan_dist.evaluation.classifier import Classifier, load_classifier, save_classifier
from sgan_dist.evaluation.metrics import MISTAKES, Counts, count_predictions, evaluate, evaluate_run
from sgan_dist.gan.networks import DiscriminatorSpec
from sgan_dist.gan.pixels import PixelScaling, images_to_float
from sgan_dist.run.trainer import train
from tests.conftest import small_config
from tests.data.datasets import rewrite_shard
from tests.ranks import environment, run_ranks

NAMES = tuple(str(n) for n in range(10))


def train_rank(rank: int, root: Path, run: Path) -> None:
    train(small_config(root, run))


@pytest.fixture(scope="module")
def run(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("metrics") / "run"
    run_ranks(1, train_rank, digits, run)
    return run


@pytest.fixture
def classifier() -> Classifier:
    torch.manual_seed(0)
    spec = DiscriminatorSpec("tutorial", {}, (1, 28, 28), 11)
    return Classifier(spec.build().eval(), spec, NAMES, "explicit", PixelScaling(255.0, 0.0))


@pytest.fixture
def images() -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(0).integers(0, 256, (5, 28, 28, 1), np.uint8)


def metadata(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        return dict(json.loads(file.metadata()["sgan_dist"]))


def test_counts_agree_with_the_evaluation(run: Path, digits: Path) -> None:
    index = load_index(digits)
    classifier = load_classifier(run / "classifier.safetensors")
    storage = open_storage(small_config(digits, run))
    counts, again = count_predictions([classifier, classifier], index, storage, "test")
    assert (again.nll, again.confusion.tolist()) == (counts.nll, counts.confusion.tolist())
    metrics = counts.metrics(index.class_names)
    expected = evaluate(classifier, index, storage, "test")
    assert metrics.confusion == expected.confusion
    assert metrics.error == expected.error
    assert metrics.nll == pytest.approx(expected.nll, rel=1e-9)
    assert metrics.calibration_error == pytest.approx(expected.calibration_error)
    assert sum(map(sum, metrics.confusion)) == index.test.samples == 1000
    assert sum(images for images, _, _ in metrics.bins) == 1000
    confidences = [mistake.confidence for mistake in counts.mistakes]
    assert confidences == sorted(confidences, reverse=True) and len(confidences) == MISTAKES
    assert all(mistake.label != mistake.guess for mistake in counts.mistakes)


def test_predictions_give_the_error_of_the_summary(run: Path, digits: Path) -> None:
    classifier = sgan_dist.load_classifier(str(run / "classifier.safetensors"))
    assert classifier.image_chw == (1, 28, 28) and classifier.class_names == NAMES
    wrong = images_seen = 0
    with open_storage(small_config(digits, run)) as storage:
        for images, labels, _ in read_split(storage, load_index(digits), "test", 0, 1, 300):
            probabilities = classifier.predict(images)
            assert probabilities.dtype == torch.float32 and probabilities.shape == (len(images), 10)
            torch.testing.assert_close(probabilities.sum(1), torch.ones(len(images)))
            wrong += int((probabilities.argmax(1).numpy() != labels).sum())
            images_seen += len(images)
    summary = json.loads((run / "summary.json").read_text())
    assert images_seen == 1000 and wrong / 1000 == pytest.approx(summary["test_error"])
    assert sgan_dist.evaluate(run).error == summary["test_error"]


@pytest.mark.process
def test_a_split_without_a_good_image_is_one_sentence(
    classifier: Classifier, tmp_path: Path
) -> None:
    buffer = io.BytesIO()
    Image.new("L", (28, 28)).save(buffer, "PNG")
    png = buffer.getvalue()
    for name in ("good", "test"):
        with TarWriter(str(tmp_path / f"{name}.tar"), encoder=False) as writer:
            for label in range(10):
                writer.write({"__key__": f"{label}", "png": png, "cls": b"%d" % label})
    good, test = [str(tmp_path / "good.tar")], [str(tmp_path / "test.tar")]
    root = tmp_path / "index"
    index = index_shards(good, good, good, test, root, jobs=1, progress=False)
    cut = {f"{n}.png": png[:-20] for n in range(10)} | {f"{n}.cls": b"%d" % n for n in range(10)}
    index = rewrite_shard(root, index, "test", 0, cut)  # as 0.1.0 indexed it
    with open_storage(small_config(tmp_path / "index", tmp_path)) as storage:
        assert evaluate(classifier, index, storage, "validation").images == 10
        with pytest.raises(UserError, match="all images of the test split are damaged"):
            evaluate(classifier, index, storage, "test")


def test_another_dataset_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"no dataset at {tmp_path}"):
        evaluate_run(run, data=str(tmp_path))


def test_the_file_keeps_all_that_a_prediction_needs(
    classifier: Classifier, images: np.ndarray[Any, Any], tmp_path: Path
) -> None:
    path = tmp_path / "classifier.safetensors"
    save_classifier(path, classifier)
    loaded = load_classifier(path)
    assert metadata(path) == {
        "discriminator": "tutorial",
        "discriminator_args": {},
        "image_chw": [1, 28, 28],
        "outputs": 11,
        "form": "explicit",
        "class_names": list(NAMES),
        "scaling": {"divisor": 255.0, "offset": 0.0},
    }
    assert loaded.scaling == classifier.scaling and not loaded.network.training
    assert torch.equal(loaded.predict(images), classifier.predict(images))
    assert torch.equal(loaded.predict(torch.from_numpy(images)), classifier.predict(images))
    logits = classifier.network(
        torch.from_numpy(images / np.float32(255)).permute(0, 3, 1, 2)
    ).logits
    torch.testing.assert_close(loaded.predict(images), logits[:, :10].softmax(1))


def test_colleagues_can_read_the_file(classifier: Classifier, tmp_path: Path) -> None:
    path = tmp_path / "classifier.safetensors"
    before = os.umask(0o022)
    try:
        save_classifier(path, classifier)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_older_files_load_with_the_scaling_of_then(
    classifier: Classifier, images: np.ndarray[Any, Any], tmp_path: Path
) -> None:
    path = tmp_path / "classifier.safetensors"
    save_classifier(path, classifier)
    about = metadata(path) | {"discriminator": "book", "image_shape": [1, 28, 28]}
    del about["scaling"], about["image_chw"]
    save_file(load_file(path), path, metadata={"sgan_dist": json.dumps(about)})
    loaded = load_classifier(path)
    assert loaded.spec == classifier.spec and loaded.scaling == PixelScaling()
    logits = classifier.network(
        images_to_float(torch.from_numpy(images), torch.device("cpu"), torch.float32)
    ).logits
    assert torch.equal(loaded.predict(images), logits[:, :10].log_softmax(1).exp())


def test_images_of_another_kind_are_refused(
    classifier: Classifier, images: np.ndarray[Any, Any]
) -> None:
    for wrong in (images / 255, images[..., 0], images.transpose(0, 3, 1, 2)):
        with pytest.raises(UserError, match=r"takes torch\.uint8 \(n, 28, 28, 1\)"):
            classifier.predict(wrong)


def test_what_is_no_classifier_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "classifier.safetensors"
    with pytest.raises(UserError, match="the run is not finished, or this is not a run"):
        load_classifier(path)
    path.write_bytes(b"nothing")
    with pytest.raises(UserError, match="is not a classifier of sgan_dist"):
        load_classifier(path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="is not a classifier of sgan_dist"):
        load_classifier(path)


@pytest.mark.process
def test_training_and_evaluation_load_no_plotting() -> None:
    code = (
        "import sys; import sgan_dist.run.trainer, sgan_dist.evaluation.metrics;"
        " print(sorted({'matplotlib', 'pandas', 'jinja2'} & sys.modules.keys()))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True
    )
    assert result.stdout == "[]\n"


def test_many_classes_and_classes_without_images() -> None:
    confusion = np.zeros((1000, 1000))
    confusion[3, 3], confusion[3, 4], confusion[7, 7] = 3, 1, 2
    counts = Counts(confusion, np.zeros((15, 3)), 0.0, [])
    metrics = counts.metrics(tuple(map(str, range(1000))))
    assert metrics.per_class_error()[3:8] == [0.25, None, None, None, 0.0]
    assert metrics.to_json()["per_class_error"]["4"] is None
    lines = metrics.table().splitlines()
    assert "of 1000 classes those with the largest errors:" in lines
    assert lines[5].split() == ["3", "25.00%", "of", "4"] and len(lines) == 55
    assert lines[7].split() == ["0", "n/a", "of", "0"]
