"""Tables over runs: what is a row, what is left out and why, and the files of a table."""

from __future__ import annotations

import csv
import dataclasses
import shutil
import statistics
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from sgan_dist.cli import main
from sgan_dist.config import parse, save
from sgan_dist.evaluation.compare import compare
from sgan_dist.run.rundir import mark_done, mark_failed

SVG = "{http://www.w3.org/2000/svg}"
GAN, ALONE = "semi-supervised GAN", "labeled images alone"


def make(run: Path, *overrides: str, error: float = 0.02, **more: Any) -> Path:
    """A finished run as `train` leaves it, without the training; a `more` of None is left out."""
    config = parse([f"--run_dir={run}", f"--name={run.name}", "--data.source=mnist", *overrides])
    data = dataclasses.replace(config.data, root=str(Path(config.data.root).absolute()))
    run.mkdir(parents=True)
    save(dataclasses.replace(config, data=data), run / "config.yaml")
    summary: dict[str, Any] = {
        "trained_on": ALONE if config.train.supervised_only else GAN,
        "test_error": error,
        "step": config.train.steps,
        "wall_seconds": 100.0,
        "labels": 10 * config.data.labels_per_class,
        "weights_sha256": str(run),
        **more,
    }
    mark_done(run, {key: value for key, value in summary.items() if value is not None})
    return run


def sweep(place: Path, *overrides: str, base: float = 0.1, step: float = 0.01) -> Path:
    """Two label counts, three seeds, another draw with each."""
    for labels in (2, 10):
        for seed in range(3):
            make(
                place / f"labels-{labels}-seed-{seed}",
                f"--data.labels_per_class={labels}",
                f"--data.root=data/mnist-{labels}-{seed}",
                f"--data.label_seed={seed}",
                f"--seed={seed}",
                *overrides,
                error=(base + step * seed) / labels,
            )
    return place


def rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert all(len(line) == len(cells[0]) for line in cells)
    return [line for line in cells if line[0] != "---"]


def test_seeds_and_draws_are_pooled_and_labels_are_not(tmp_path: Path) -> None:
    text = compare([sweep(tmp_path / "sweep")], [], None)
    head, few, many = rows(text)
    assert head == ["labels", "runs", "test error", "steps", "mean time"]
    std = 100 * statistics.stdev([0.05, 0.055, 0.06])
    assert few == ["20", "3", f"5.50 ± {std:.2f} %", "1,000", "1 min 40 s"]
    assert many[:3] == ["100", "3", "1.10 ± 0.10 %"]
    assert "Left out" not in text and "Rows pool" not in text
    assert text.endswith(f"{tmp_path}/sweep/results.csv\n{tmp_path}/sweep/results.svg")


def test_a_supervised_baseline_is_another_row(tmp_path: Path) -> None:
    sweep(tmp_path / "gan", "--loss.fake=0.1", "--loss.consistency=1", "--loss.threshold=0.9")
    sweep(tmp_path / "alone", "--train.supervised_only=true", base=0.5, step=0.0)
    head, *lines = rows(compare([tmp_path], [], None))
    assert head[:4] == ["labels", "trained_on", "runs", "test error"]  # no loss that one lacks
    assert lines[0][:4] == ["20", ALONE, "3", "25.00 ± 0.00 %"]
    assert [line[:3] for line in lines[1:]] == [
        ["20", GAN, "3"],
        ["100", ALONE, "3"],
        ["100", GAN, "3"],
    ]


def test_the_two_runs_of_make_train_fit_a_terminal(tmp_path: Path) -> None:
    for name, error in (("digits", 0.0186), ("digits_supervised", 0.0825)):
        make(tmp_path / name, f"--config={name}", error=error)
    text = compare([tmp_path / "digits", tmp_path / "digits_supervised"], [], None)
    assert text.split("\n\n")[0].splitlines() == [
        "| trained_on           | train.steps | runs | test error | mean time  |",
        "| ---                  | ---         | ---  | ---        | ---        |",
        "| labeled images alone | 600         | 1    | 8.25 %     | 1 min 40 s |",
        "| semi-supervised GAN  | 1,500       | 1    | 1.86 %     | 1 min 40 s |",
    ]


def test_the_csv_has_a_line_a_run(tmp_path: Path) -> None:
    sweep(tmp_path / "sweep")
    make(tmp_path / "sweep" / "other", "--loss.fake=0.1")
    compare([tmp_path], [], tmp_path / "out")
    with open(tmp_path / "out" / "results.csv") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 7
    assert list(lines[0])[:5] == ["run_dir", "loss.fake", "seed", "label_seed", "labels"]
    (line,) = (line for line in lines if line["run_dir"].endswith("labels-2-seed-1"))
    assert line["seed"] == line["label_seed"] == "1" and line["labels"] == "20"
    assert float(line["test_error"]) == pytest.approx(0.055)
    assert line["step"] == "1000" and line["weights_sha256"].endswith("labels-2-seed-1")
    assert lines[-1]["loss.fake"] == "0.1"


def test_settings_that_vary_are_columns(tmp_path: Path) -> None:
    for fake in ("0.5", "0.1", "10"):
        make(tmp_path / fake, f"--loss.fake={fake}", "--train.log_every=7")
    make(tmp_path / "wide", "--loss.fake=0.1", '--model.generator_args={"width": 8}')
    head, *lines = rows(compare([tmp_path], [], None))
    assert head[:3] == ["loss.fake", "model.generator_args.width", "runs"]
    assert [line[:2] for line in lines] == [
        ["0.1", "8"],
        ["0.1", "null"],
        ["0.5", "null"],
        ["10.0", "null"],
    ]


def test_other_lengths_and_datasets_are_other_rows(tmp_path: Path) -> None:
    make(tmp_path / "long", "--train.steps=2000")
    make(tmp_path / "digits", "--data.source=digits", "--data.root=data/a")
    make(tmp_path / "mine", "--data.source=null", "--data.root=data/b")
    make(tmp_path / "same", "--data.source=null", "--data.root=data/b", "--seed=1")
    head, *lines = rows(compare([tmp_path], [], None))
    assert head[:3] == ["data.source", "train.steps", "runs"]
    assert [line[2] for line in lines] == ["2", "1", "1"]


def test_by_names_the_columns_and_what_is_pooled_is_said(tmp_path: Path) -> None:
    for steps in (10, 20):
        make(tmp_path / f"{steps}", f"--train.steps={steps}", "--seed=3")
    text = compare([tmp_path], ["seed"], None)
    head, line = rows(text)
    assert head[:2] == ["seed", "runs"]
    assert line[:2] == ["3", "2"] and "10 to 20" in line
    assert "Rows pool runs that differ in train.steps." in text


def test_what_is_not_finished_is_left_out_by_name(tmp_path: Path) -> None:
    sweep(tmp_path)
    done = tmp_path / "labels-2-seed-0"
    shutil.copytree(done, tmp_path / "z-copy")
    for name in ("going", "refused", "old", "torn"):
        shutil.copytree(done, tmp_path / name)
    (tmp_path / "going" / "DONE").unlink()
    (tmp_path / "refused" / "DONE").unlink()
    mark_failed(tmp_path / "refused", "the disk is full")
    mark_failed(tmp_path / "never-had-a-config", "no such setting")
    (tmp_path / "old" / "config.yaml").write_text("no_such_setting: 1\n")
    (tmp_path / "torn" / "summary.json").write_text("{")
    text = compare([tmp_path], [], None)
    assert [line[1] for line in rows(text)[1:]] == ["3", "3"]
    assert "Left out, 6 of 12 runs:" in text
    assert f"- {tmp_path}/going: unfinished" in text
    assert f"- {tmp_path}/refused: failed: the disk is full" in text
    assert f"- {tmp_path}/never-had-a-config: failed: no such setting" in text
    assert f"- {tmp_path}/old: there is no setting no_such_setting" in text
    assert f"- {tmp_path}/torn: its summary.json cannot be read" in text
    assert f"- {tmp_path}/z-copy: the same weights as {done}, which is counted" in text


def test_what_lies_in_a_run_is_no_run(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    make(run / "inner")
    make(run / "wandb" / "run-1" / "files")
    (tmp_path / "link").symlink_to(run)
    text = compare([tmp_path, run, tmp_path / "link"], [], None)
    assert rows(text)[1][:3] == ["1", "2.00 %", "1,000"]
    assert "Left out" not in text
    assert rows(compare([run / "inner"], [], None))[1][0] == "1"  # by its own name it is


def test_older_runs_do_not_have_their_labels(tmp_path: Path) -> None:
    make(tmp_path / "a", "--data.labels_per_class=2", labels=None)
    make(tmp_path / "b", "--data.labels_per_class=3", labels=None)
    make(tmp_path / "c", "--data.labels_per_class=4")
    head, *lines = rows(compare([tmp_path], [], None))
    assert head[:2] == ["labels", "data.labels_per_class"]
    assert [line[:2] for line in lines] == [["40", "4"], ["?", "2"], ["?", "3"]]


def drawing(path: Path) -> tuple[list[str], list[str]]:
    """The texts and the tooltips of an SVG file."""
    root = ElementTree.parse(path).getroot()
    assert root.tag == f"{SVG}svg" and "nan" not in path.read_text()
    texts = [element.text or "" for element in root.iter(f"{SVG}text")]
    return texts, [element.text or "" for element in root.iter(f"{SVG}title")]


def test_errors_are_drawn_over_labels(tmp_path: Path) -> None:
    sweep(tmp_path)
    sweep(tmp_path / "alone", "--train.supervised_only=true", base=0.5, step=0.0)
    make(tmp_path / "unknown", labels=None)
    make(tmp_path / "single", "--data.labels_per_class=5", error=0.0)
    compare([tmp_path], ["labels", "trained_on"], None)
    texts, points = drawing(tmp_path / "results.svg")
    assert {"20", "50", "100", "labeled images", GAN, ALONE} <= set(texts)
    assert "semi-supervised GAN, 20 labels: 5.50 ± 0.50 %, 3 runs" in points
    assert "semi-supervised GAN, 50 labels: 0.00 %, 1 run" in points
    assert "labeled images alone, 100 labels: 5.00 ± 0.00 %, 3 runs" in points
    assert len(points) == 5 and not any("?" in point for point in points)


def test_without_other_labels_there_is_a_dot_a_row(tmp_path: Path) -> None:
    for fake in ("0.1", "0.5"):
        for seed in range(2):
            overrides = [f"--loss.fake={fake}", f"--seed={seed}"]
            make(tmp_path / f"{fake}-{seed}", *overrides, error=0.02 * (seed + 0.1))
    compare([tmp_path], [], None)
    texts, points = drawing(tmp_path / "results.svg")
    assert {"1: loss.fake 0.1", "2: loss.fake 0.5", "row of the table"} <= set(texts)
    assert points == [f"{i}: loss.fake {f}: 1.20 ± 1.41 %, 2 runs" for i, f in ((1, 0.1), (2, 0.5))]
    compare([make(tmp_path / "one", "--name=<R&D>", error=0.0)], ["name"], tmp_path / "one")
    assert "1: name <R&D>" in drawing(tmp_path / "one" / "results.svg")[0]


def test_what_cannot_be_compared_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    mark_failed(tmp_path / "failed", "why")
    errors = {
        (str(tmp_path / "empty"),): "holds no run",
        (str(run), str(tmp_path / "nowhere")): "nowhere is not a folder",
        (str(tmp_path / "failed"),): f"no run is finished: {tmp_path}/failed",
        (str(run), "--by", "lr"): "no run has a setting lr",
        (str(run), "--out", "/proc/nowhere"): "give another --out",
    }
    for arguments, error in errors.items():
        assert main(["compare", *arguments]) == 2
        captured = capsys.readouterr()
        assert error in captured.err and captured.err.count("\n") == 1 and not captured.out
    assert main(["compare", str(run)]) == 0
    assert capsys.readouterr().out.startswith("| runs | test error |")
