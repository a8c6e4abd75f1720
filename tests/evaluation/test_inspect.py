"""What a dataset holds, as text and as a page; and the labels that training never sees."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from sgan_dist.cli import main
from sgan_dist.data import known_labels
from sgan_dist.data.index import load_index
from sgan_dist.errors import UserError
from sgan_dist.evaluation.inspect import inspect
from sgan_dist.run.trainer import train
from tests.conftest import small_config


def test_counts_and_classes(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = shutil.copytree(digits, tmp_path / "digits")
    (root / "skipped.tsv").write_text("train\tcat/a <b>.jpg\tcut off\n" * 30)
    assert main(["prepare", "--inspect", str(root)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["labeled:", "100", "images", "in", "1", "shard"]
    assert ["3", "10", "350", "50", "100"] in [line.split() for line in lines]
    assert "30 images could not be decoded:" in lines and "  cat/a <b>.jpg: cut off" in lines
    page = (root / "inspect.html").read_text()
    assert page.count("<img ") == 10 + 1 and "cat/a &lt;b&gt;.jpg" in page
    assert load_index(root).fingerprint[:12] in page


def test_what_is_no_dataset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", "--inspect", str(tmp_path)]) == 2
    assert main(["prepare", "--source=digits"]) == 2
    assert "give --source and --out, or --inspect" in capsys.readouterr().err


def test_known_labels_of_another_dataset(digits: Path, tmp_path: Path) -> None:
    root = shutil.copytree(digits, tmp_path / "digits")
    for wrong in (np.zeros(3, np.int64), np.zeros(3500)):
        known_labels.write_known_labels(root, wrong)  # type: ignore[arg-type]
        with pytest.raises(UserError, match="is not of this dataset"):
            inspect(root)
    (root / known_labels.NAME).write_bytes(b"")
    with pytest.raises(UserError, match="prepare the dataset again"):
        inspect(root)
    (root / known_labels.NAME).unlink()
    assert "350" not in inspect(root)


@pytest.mark.process
def test_training_is_the_same_without_the_known_labels(digits: Path, tmp_path: Path) -> None:
    root = shutil.copytree(digits, tmp_path / "digits")
    weights = []
    for name in ("with", "without"):
        options = ("--train.steps=4", "--loss.consistency=1", "--loss.prior=labeled")
        summary = train(small_config(root, tmp_path / name, *options))
        weights.append(summary["weights_sha256"])
        (root / known_labels.NAME).unlink(missing_ok=True)
    assert weights[0] == weights[1]
