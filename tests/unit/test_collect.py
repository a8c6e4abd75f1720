"""Tables over runs: which are one row, what is left out and why, the files beside the table."""

from __future__ import annotations

import csv
import dataclasses
import shutil
import statistics
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from sgan_dist.collect import collect, main
from sgan_dist.config import check, parse, save
from sgan_dist.rundir import mark_done, mark_failed

SVG = "{http://www.w3.org/2000/svg}"


def make(
    run: Path, *overrides: str, error: float = 0.02, alone: float | None = None, **more: Any
) -> Path:
    """A finished run as `fit` leaves it, without the training; a `more` of None is taken out."""
    config, _ = parse([f"--run_dir={run}", f"--name={run.name}", "--data.source=mnist", *overrides])
    config = check(config)
    data = dataclasses.replace(config.data, root=str(Path(config.data.root).absolute()))
    run.mkdir(parents=True)
    save(dataclasses.replace(config, data=data), run / "config.yaml")
    summary: dict[str, Any] = {
        "trained_on": "semi-supervised GAN",
        "test_error": error,
        "step": config.train.steps,
        "wall_seconds": 100.0,
        "labels": 10 * config.data.labels_per_class,
        "weights_sha256": str(run),
        **more,
    }
    if alone is not None:
        summary["supervised_test_error"] = alone
    mark_done(run, {key: value for key, value in summary.items() if value is not None})
    return run


def sweep(place: Path) -> Path:
    """Two label counts, three seeds, another draw with each."""
    for labels in (2, 10):
        for seed in range(3):
            make(
                place / f"labels-{labels}-seed-{seed}",
                f"--data.labels_per_class={labels}",
                f"--data.root=data/mnist-{labels}-{seed}",
                f"--data.label_seed={seed}",
                f"--seed={seed}",
                error=(0.1 + 0.01 * seed) / labels,
                alone=0.5 / labels,
            )
    return place


def rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert all(len(line) == len(cells[0]) for line in cells)
    return [line for line in cells if line[0] != "---"]


def test_seeds_and_draws_are_pooled_and_labels_are_not(tmp_path: Path) -> None:
    said = collect([sweep(tmp_path / "sweep")], [], None)
    head, few, many = rows(said)
    assert head[:4] == ["labels", "runs", "test error", "test error, labeled images alone"]
    assert head[4:] == ["steps", "mean time"]
    std = 100 * statistics.stdev([0.05, 0.055, 0.06])
    assert few == ["20", "3", f"5.50 ± {std:.2f} %", "25.00 ± 0.00 %", "1,000", "1 min 40 s"]
    assert many[:3] == ["100", "3", "1.10 ± 0.10 %"]
    assert "Left out" not in said and "Rows pool" not in said
    assert said.endswith(f"{tmp_path}/sweep/results.csv\n{tmp_path}/sweep/results.svg")


def test_the_csv_has_a_line_a_run(tmp_path: Path) -> None:
    sweep(tmp_path / "sweep")
    make(tmp_path / "sweep" / "other", "--loss.fake=0.1")
    collect([tmp_path], [], tmp_path / "out")
    with open(tmp_path / "out" / "results.csv") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 7
    assert list(lines[0])[:5] == ["run_dir", "loss.fake", "seed", "label_seed", "labels"]
    (line,) = (line for line in lines if line["run_dir"].endswith("labels-2-seed-1"))
    assert line["seed"] == line["label_seed"] == "1" and line["labels"] == "20"
    assert float(line["test_error"]) == pytest.approx(0.055)
    assert float(line["supervised_test_error"]) == 0.25
    assert line["step"] == "1000" and line["weights_sha256"].endswith("labels-2-seed-1")
    assert lines[-1]["supervised_test_error"] == "" and lines[-1]["loss.fake"] == "0.1"


def test_settings_that_vary_are_columns(tmp_path: Path) -> None:
    for fake in ("0.5", "0.1", "10"):
        make(tmp_path / fake, f"--loss.fake={fake}", "--train.log_every=7")
    make(tmp_path / "wide", "--loss.fake=0.1", '--model.generator_args={"width": 8}')
    head, *lines = rows(collect([tmp_path], [], None))
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
    head, *lines = rows(collect([tmp_path], [], None))
    assert head[:3] == ["data.source", "train.steps", "runs"]
    assert [line[2] for line in lines] == ["2", "1", "1"]


def test_by_names_the_columns_and_what_is_pooled_is_said(tmp_path: Path) -> None:
    for steps in (10, 20):
        make(tmp_path / f"{steps}", f"--train.steps={steps}", "--seed=3")
    said = collect([tmp_path], ["seed"], None)
    head, line = rows(said)
    assert head[:2] == ["seed", "runs"]
    assert line[:2] == ["3", "2"] and "10 to 20" in line
    assert "Rows pool runs that differ in train.steps." in said


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
    said = collect([tmp_path], [], None)
    assert [line[1] for line in rows(said)[1:]] == ["3", "3"]
    assert "Left out, 6 of 12 runs:" in said
    assert f"- {tmp_path}/going: unfinished" in said
    assert f"- {tmp_path}/refused: failed: the disk is full" in said
    assert f"- {tmp_path}/never-had-a-config: failed: no such setting" in said
    assert f"- {tmp_path}/old: bad configuration:" in said
    assert f"- {tmp_path}/torn: its summary.json can't be read" in said
    assert f"- {tmp_path}/z-copy: the same weights as {done}, which is counted" in said


def test_what_lies_in_a_run_is_no_run(tmp_path: Path) -> None:
    run = make(tmp_path / "run", alone=0.1)
    make(run / "supervised")
    make(run / "wandb" / "run-1" / "files")
    (tmp_path / "link").symlink_to(run)
    said = collect([tmp_path, run, tmp_path / "link"], [], None)
    assert rows(said)[1][:3] == ["1", "2.00 %", "10.00 %"]
    assert "Left out" not in said
    assert rows(collect([run / "supervised"], [], None))[1][0] == "1"  # by its own name it is


def test_older_runs_do_not_tell_their_labels(tmp_path: Path) -> None:
    make(tmp_path / "a", "--data.labels_per_class=2", labels=None)
    make(tmp_path / "b", "--data.labels_per_class=3", labels=None)
    make(tmp_path / "c", "--data.labels_per_class=4")
    head, *lines = rows(collect([tmp_path], [], None))
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
    make(tmp_path / "unknown", labels=None)
    make(tmp_path / "single", "--data.labels_per_class=5", error=0.0)
    collect([tmp_path], ["labels"], None)
    texts, points = drawing(tmp_path / "results.svg")
    assert {"20", "50", "100", "labeled images", "semi-supervised GAN"} <= set(texts)
    assert "semi-supervised GAN, 20 labels: 5.50 ± 0.50 %, 3 runs" in points
    assert "semi-supervised GAN, 50 labels: 0.00 %, 1 run" in points
    assert "labeled images alone, 100 labels: 5.00 ± 0.00 %, 3 runs" in points
    assert len(points) == 5 and not any("?" in point for point in points)


def test_without_other_labels_there_is_a_dot_a_row(tmp_path: Path) -> None:
    for fake in ("0.1", "0.5"):
        for seed in range(2):
            overrides = [f"--loss.fake={fake}", f"--seed={seed}"]
            make(tmp_path / f"{fake}-{seed}", *overrides, error=0.02 * (seed + 0.1))
    collect([tmp_path], [], None)
    texts, points = drawing(tmp_path / "results.svg")
    assert {"1: loss.fake 0.1", "2: loss.fake 0.5", "row of the table"} <= set(texts)
    assert points == [f"{i}: loss.fake {f}: 1.20 ± 1.41 %, 2 runs" for i, f in ((1, 0.1), (2, 0.5))]
    collect([make(tmp_path / "one", "--name=<R&D>", error=0.0)], ["name"], tmp_path / "one")
    assert "1: name <R&D>" in drawing(tmp_path / "one" / "results.svg")[0]


def test_what_can_not_be_collected_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    mark_failed(tmp_path / "failed", "why")
    said = {
        (str(tmp_path / "empty"),): "holds no run",
        (str(run), str(tmp_path / "nowhere")): "nowhere is not a folder",
        (str(tmp_path / "failed"),): f"no run is finished, wait or mend them: {tmp_path}/failed",
        (str(run), "--by", "lr"): "no run has a setting lr",
        (str(run), "--out", "/proc/nowhere"): "give another --out",
    }
    for arguments, error in said.items():
        assert main(arguments) == 2
        captured = capsys.readouterr()
        assert error in captured.err and captured.err.count("\n") == 1 and not captured.out
    assert main([str(run)]) == 0
    assert capsys.readouterr().out.startswith("| runs | test error |")
