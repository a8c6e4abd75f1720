"""The examples, run as their docstrings say, for a few steps on the embedded digits."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from sgan_dist.data.prepare.sources import load_source
from tests.ranks import REPOSITORY, run

pytestmark = pytest.mark.process

SHORT = (
    "--data.source=null",
    "--batch.labeled=8",
    "--batch.unlabeled=16",
    "--batch.fake=8",
    "--train.evaluate_every=0",
    "--tracking.wandb=false",
)


@pytest.fixture(scope="module")
def trained(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The run directory and the output of examples/api.py."""
    directory = tmp_path_factory.mktemp("examples") / "api"
    settings = (f"--data.root={digits}", f"--run_dir={directory}", "--train.steps=30", *SHORT)
    code, output = run("python", "examples/api.py", *settings)
    assert code == 0, output
    return directory, output


def test_api_trains_and_evaluates(trained: tuple[Path, str]) -> None:
    directory, output = trained
    error = json.loads((directory / "summary.json").read_text())["test_error"]
    assert f"test error after 30 steps: {error:.2%}" in output
    assert "calibration error: " in output


def test_api_prints_a_wrong_setting_as_one_sentence() -> None:
    code, output = run("python", "examples/api.py", "--train.steps=-3")
    assert code == 1 and output.startswith("error: train.steps"), output


def test_use_classifier_names_the_class_of_each_file(
    trained: tuple[Path, str], tmp_path: Path
) -> None:
    small, large = tmp_path / "small.png", tmp_path / "large.png"
    digit = Image.fromarray(load_source("digits").train.array[0, :, :, 0])
    digit.save(small)
    digit.convert("RGB").resize((100, 100)).save(large)
    classifier = trained[0] / "classifier.safetensors"
    code, output = run(
        "python", "examples/use_classifier.py", str(classifier), str(small), str(large)
    )
    assert code == 0, output
    assert re.fullmatch(rf"{small}: \d \(\d+\.\d%\)\n{large}: \d \(\d+\.\d%\)\n", output), output


def test_use_classifier_says_what_is_missing(tmp_path: Path) -> None:
    code, output = run("python", "examples/use_classifier.py", str(tmp_path / "none"), "x.png")
    assert code == 1 and output.startswith("error: ") and "Traceback" not in output, output


def test_own_images_become_tars_and_a_classifier(tmp_path: Path) -> None:
    source = load_source("digits")
    folder = tmp_path / "photos"
    for number, (image, label) in enumerate(
        zip(source.train.array[::10], source.train.labels[::10], strict=True)
    ):
        part = "unlabeled" if number % 3 else f"digit-{label}"
        (folder / part).mkdir(parents=True, exist_ok=True)
        file = folder / part / f"{number}.{'png' if number % 2 else 'JPG'}"
        Image.fromarray(image[..., 0]).resize((40, 36)).save(file)
    settings = (f"--run_dir={tmp_path / 'run'}", "--train.steps=20", *SHORT[1:])
    command = ("python", "examples/own_images.py", str(folder), *settings)
    code, output = run(*command)
    assert code == 0, output
    assert "digit-0" in output and "error " in output
    assert json.loads((tmp_path / "run/summary.json").read_text())["step"] == 20
    again = run(*command)  # the tars are the same, and the run is done
    assert again[0] == 0 and output.endswith(again[1]), again


def test_own_network_trains(digits: Path, tmp_path: Path) -> None:
    code, output = run(
        "python", "-m", "sgan_dist", "train", "--config", "digits", f"--data.root={digits}",
        f"--run_dir={tmp_path / 'own'}", "--train.steps=20", *SHORT,
        "--model.discriminator=own_network:ResidualDiscriminator",
        "--model.generator=own_network:ResizeGenerator", '--model.generator_args={"width": 16}',
        PYTHONPATH=f"{REPOSITORY / 'examples'}:{REPOSITORY}",
    )  # fmt: skip
    assert code == 0, output
    assert json.loads((tmp_path / "own/summary.json").read_text())["step"] == 20


@pytest.mark.parametrize("weight", [1, 0])
def test_minimal_loop_learns_from_the_labels(weight: int) -> None:
    code, output = run("python", "examples/minimal_loop.py", "--steps=100", f"--weight={weight}")
    assert code == 0, output
    match = re.fullmatch(r"step 100: test error (\d+\.\d)%\n", output)
    assert match and float(match[1]) < 50, output
