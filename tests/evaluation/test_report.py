"""report.html: of a run that is done, one that still runs, a supervised-only one, and of none."""

from __future__ import annotations

import json
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from sgan_dist.cli import main
from sgan_dist.config import load
from sgan_dist.errors import UserError
from sgan_dist.evaluation.metrics import MISTAKES
from sgan_dist.evaluation.plots import Point, inline_svg, plot_lines
from sgan_dist.evaluation.report import make_report
from sgan_dist.run.trainer import train
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


def train_rank(rank: int, root: Path, run: Path, overrides: list[str]) -> None:
    train(small_config(root, run, *overrides))


@pytest.fixture(scope="module")
def done(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("report") / "run"
    run_ranks(1, train_rank, digits, run, OFTEN)
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
    """The page's text; fails where tags do not match."""

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
    assert "step-00000020.png cannot be read" in page.text


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


@pytest.mark.process
def test_a_supervised_only_run_has_no_samples(digits: Path, tmp_path: Path) -> None:
    overrides = [*OFTEN, "--train.supervised_only=true", "--train.steps=10"]
    run_ranks(1, train_rank, digits, tmp_path, overrides)
    page = Page(tmp_path / "report.html")
    assert "A supervised-only run has no generator." in page.text
    assert "Nothing logged for: generator's losses." in page.text
    assert "the test split, 1,000 images, after step 10" in page.text


def test_a_failed_run_says_why_unless_it_continued(running: Path) -> None:
    (running / "FAILED").write_text("the disk is full\n")
    os.utime(running / "metrics.jsonl", (1, 1))
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


def test_what_cannot_be_reported_is_said(
    finished: Path, windowed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=r"not a run directory: it holds no config\.yaml"):
        make_report(tmp_path)
    assert main(["report", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert main(["report", str(finished), f"--data={windowed}"]) == 2
    assert "is not the dataset that" in capsys.readouterr().err
    assert main(["report", str(finished)]) == 0
    assert capsys.readouterr().out == f"{finished / 'report.html'}\n"


def test_a_dataset_that_is_gone_is_left_out(finished: Path) -> None:
    config = finished / "config.yaml"
    config.write_text(re.sub(r"root: .*", "root: /nowhere", config.read_text()))
    page = Page(make_report(finished))
    assert "Not evaluated: no dataset at /nowhere" in page.text
    assert "test error" in page.text


def test_lines_take_single_points_zeros_and_long_runs() -> None:
    single = plot_lines({"x": [Point(5, 0.0, text="x: 0 at step 5")]}, "step", log=True)
    assert single.axes[0].get_yscale() == "linear"
    assert inline_svg(single, "one").count("<title>x: 0 at step 5</title>") == 1
    zero = plot_lines({"x": [Point(1, 0.0), Point(2, 10.0)]}, "step", log=True)
    assert zero.axes[0].get_yscale() == "log" and "nan" not in inline_svg(zero, "two")
    values = [Point(step, 9.0 if step == 7777 else 1.0) for step in range(10_000)]
    long = inline_svg(plot_lines({"x": values}, "step"), "three")
    path = max(re.findall(r'<path d="([^"]*)"', long), key=len)
    heights = {place.split()[1] for place in re.findall(r"[ML] ([\d. ]+)", path)}
    assert len(path) < 20_000 and len(heights) == 2  # the spike stays


def test_the_same_run_gives_the_same_page(finished: Path) -> None:
    pages = [make_report(finished).read_text() for _ in range(2)]
    first, second = (re.sub("<footer>.*</footer>", "", page) for page in pages)
    assert first == second and "<footer>" not in first
