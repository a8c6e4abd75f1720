"""report.html: of a run that is done, one that still runs, a supervised-only one, and of none."""

from __future__ import annotations

import json
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from sgan_dist import charts
from sgan_dist.config import DataConfig, load
from sgan_dist.data.index import load_index
from sgan_dist.data.stream import open_storage
from sgan_dist.errors import UserError
from sgan_dist.evaluate import MISTAKES, evaluate, examine
from sgan_dist.export import load_classifier
from sgan_dist.report import main, make_report
from sgan_dist.trainer import fit
from tests.conftest import small_config
from tests.ranks import run_ranks

SECTIONS = [
    "Alarms",
    "Starts",
    "Curves",
    "Samples over time",
    "Confusion",
    "Most confident mistakes",
]
SECTIONS += ["Calibration", "Figures", "Config"]
OFTEN = ["--train.evaluate_every=5", "--train.sample_every=2", "--checkpoint.every=10"]


def train(rank: int, root: Path, run: Path, overrides: list[str]) -> int:
    return fit(small_config(root, run, *overrides))


@pytest.fixture(scope="module")
def done(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with its supervised baseline."""
    run = tmp_path_factory.mktemp("report") / "run"
    run_ranks(1, train, digits, run, [*OFTEN, "--train.baseline_steps=10"])
    return run


@pytest.fixture
def finished(done: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(done, tmp_path / "run"))


@pytest.fixture
def running(finished: Path) -> Path:
    """What a running run has: no results yet."""
    for name in ("DONE", "summary.json", "classifier.safetensors"):
        (finished / name).unlink()
    return finished


class Page(HTMLParser):
    """The page's text; fails where tags don't match."""

    VOID = frozenset({"meta", "img"})

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.text = ""
        self.headings: list[str] = []
        self.links: list[str] = []
        self.open: list[str] = []
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data
        if self.open and self.open[-1] == "h2":
            self.headings.append(data.strip())


def test_a_finished_run_is_shown_whole(finished: Path) -> None:
    path = make_report(finished)
    page = Page(path)
    summary = json.loads((finished / "summary.json").read_text())
    assert path == finished / "report.html"
    assert page.headings == SECTIONS
    assert "the test split, 1,000 images, after step 20" in page.text
    assert "validation split" not in page.text
    assert f"test error{100 * summary['test_error']:.2f} %" in page.text
    supervised = f"{100 * summary['supervised_test_error']:.2f} %"
    assert f"test error, supervised only{supervised}" in page.text
    assert summary["weights_sha256"] in page.text
    assert "half_life: 50000.0" in page.text
    assert "No alarms." in page.text
    assert re.search(r"<td>0</td><td>\d{4}-\d\d-\d\d [^<]*</td><td>1</td><td>cpu</td>", page.source)
    steps = re.findall(r"step (\d+)</figcaption>", page.source)
    assert steps == ["2", "6", "10", "12", "16", "20"]
    assert len(re.findall(r" taken for \d, [\d.]+ %</figcaption>", page.source)) == MISTAKES
    assert page.source.count("<svg") >= 8


def test_the_page_stands_alone_and_is_small(finished: Path) -> None:
    page = Page(make_report(finished))
    assert page.links and all(link.startswith("data:image/") for link in page.links)
    assert not re.search(r"https?://|url\(|@import|<script|<link", page.source)
    assert len(page.source) < 500_000
    assert [path.name for path in finished.glob(".report*")] == []


def test_findings_agree_with_the_evaluation(finished: Path, digits: Path) -> None:
    index = load_index(digits)
    network, about = load_classifier(finished / "classifier.safetensors")
    storage = open_storage(DataConfig(root=str(digits)))
    found = examine(network, index, storage, "test", about["form"])
    judged = found.evaluation()
    cpu = torch.device("cpu")
    expected = evaluate(network, index, storage, "test", about["form"], cpu)
    assert judged.confusion == expected.confusion
    assert judged.error == expected.error
    assert judged.nll == pytest.approx(expected.nll, rel=1e-9)
    assert judged.calibration_error == pytest.approx(expected.calibration_error)
    assert sum(map(sum, judged.confusion)) == index.test.samples == 1000
    assert sum(images for images, _, _ in judged.bins) == 1000
    sure = [mistake.confidence for mistake in found.mistakes]
    assert sure == sorted(sure, reverse=True) and len(sure) == MISTAKES
    assert all(mistake.label != mistake.guess for mistake in found.mistakes)


def test_a_running_run_is_shown_on_the_validation_split(running: Path, digits: Path) -> None:
    page = Page(make_report(running))
    assert page.headings == SECTIONS
    assert "Running or stopped" in page.text
    assert "the validation split, 500 images, after step 20" in page.text
    assert "test split" not in page.text and "test error" not in page.text
    last = json.loads((running / "metrics.jsonl").read_text().splitlines()[-1])
    error = f"{100 * last['validation_error']:.2f} %"
    assert f"validation error, step 20{error}" in page.text


def test_a_half_written_line_and_picture_are_passed_over(running: Path) -> None:
    with open(running / "metrics.jsonl", "a") as file:
        file.write('{"step": 24, "d/superv')
    picture = running / "samples" / "step-00000020.png"
    picture.write_bytes(picture.read_bytes()[:500])
    page = Page(make_report(running))
    assert "steps20 of 20" in page.text
    assert "step-00000020.png can't be read" in page.text


def test_alarms_and_new_losses_are_shown(running: Path) -> None:
    with open(running / "metrics.jsonl", "a") as file:
        line = {"step": 24, "alarm": "G <collapsed>", "d/consistency": 0.5, "d/fake": float("nan")}
        line |= {"d/force/fake": 0.0, "d/force/real": 2.0}
        file.write(json.dumps(line) + "\n")
    page = Page(make_report(running))
    assert "24G <collapsed>" in page.text
    assert "consistency 0.5" in page.text
    assert "Discriminator's force, log scale" in page.text


def test_without_a_checkpoint_there_are_curves_and_config(running: Path) -> None:
    shutil.rmtree(running / "checkpoints")
    page = Page(make_report(running))
    assert "Not evaluated: there is no checkpoint yet." in page.text
    assert "Calibration" not in page.headings
    assert page.source.count("<svg") >= 6
    for path in [*running.glob("samples/*"), *running.rglob("metrics.jsonl")]:
        path.unlink()
    page = Page(make_report(running))
    assert "It has not logged anything yet." in page.text
    assert "No samples yet." in page.text
    assert page.source.count("<svg") == 0


def test_a_supervised_only_run_has_no_samples(done: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(done / "supervised", tmp_path / "run"))
    page = Page(make_report(run))
    assert "A supervised-only run has no generator." in page.text
    assert "Nothing logged for: generator's losses." in page.text
    assert "the test split, 1,000 images, after step 10" in page.text


def test_a_failed_run_tells_why_unless_it_went_on(running: Path) -> None:
    (running / "FAILED").write_text("the disk is full\n")
    os.utime(running / "metrics.jsonl", (1, 1))
    os.utime(running / "supervised" / "metrics.jsonl", (1, 1))
    assert "the disk is full" in Page(make_report(running)).text
    later = (running / "FAILED").stat().st_mtime + 1
    os.utime(running / "metrics.jsonl", (later, later))
    assert "the disk is full" not in Page(make_report(running)).text


def test_names_are_escaped(running: Path) -> None:
    config = running / "config.yaml"
    config.write_text(config.read_text().replace("name: small", "name: <b>R&D</b>"))
    page = Page(make_report(running))
    assert load(config).name == "<b>R&D</b>"
    assert "<b>R&D" in page.text and "<b>R&D" not in page.source


def test_what_can_not_be_reported_is_said(
    finished: Path, windowed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=r"not a run directory: it holds no config\.yaml"):
        make_report(tmp_path)
    assert main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert main([str(finished), f"--data={windowed}"]) == 2
    assert "is not the dataset that" in capsys.readouterr().err
    assert main([str(finished)]) == 0
    assert capsys.readouterr().out == f"{finished / 'report.html'}\n"


def test_a_dataset_that_is_gone_is_left_out(finished: Path) -> None:
    config = finished / "config.yaml"
    config.write_text(re.sub(r"root: .*", "root: /nowhere", config.read_text()))
    page = Page(make_report(finished))
    assert "Not evaluated: no dataset at /nowhere" in page.text
    assert "test error" in page.text


def test_charts_take_single_points_zeros_and_long_runs() -> None:
    single = charts.line_chart("one", [charts.Series("x", [(5, 0.0)])], 5, log=True)
    assert "log scale" not in single and single.count("<circle") == 1
    zero = charts.line_chart("two", [charts.Series("x", [(1, 0.0), (2, 10.0)])], 2, log=True)
    assert "log scale" in zero and "nan" not in zero
    values = [(step, 9.0 if step == 7777 else 1.0) for step in range(10_000)]
    long = charts.line_chart("three", [charts.Series("x", values)], 10_000)
    (path,) = re.findall(r'points="([^"]*)"', long)
    heights = {place.split(",")[1] for place in path.split()}
    assert len(path) < 20_000 and len(heights) == 2  # the spike stays
