"""The results tables, by small real runs: what is trained, kept, resumed, and trained again."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.results import BEGIN, END, ROWS, main, publish, read_rows
from tests.ranks import REPOSITORY

SMALL: dict[str, Any] = {
    "data": {"source": "digits"},
    "batch": {"labeled": 12, "unlabeled": 12, "fake": 12},
    "model": {
        "discriminator_args": {"width": 4},
        "generator_args": {"width": 4, "latent_size": 8},
    },
    "train": {
        "steps": 6,
        "log_every": 2,
        "evaluate_every": 0,
        "sample_every": 0,
    },
    "tracking": {"wandb": False},
}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project's folder with a page of results and a small config."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "results.md").write_text(f"# Results\n\n{BEGIN}\n{END}\n\nThe end.\n")
    data = {**SMALL["data"], "root": str(tmp_path / "data" / "small")}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump({**SMALL, "data": data}))
    return tmp_path


def write_rows(**rows: list[str]) -> None:
    """Writes rows.yaml: rows of one draw by their overrides, all points of one curve."""
    more: dict[str, Any] = {"table": "Small", "config": "small.yaml", "draws": 1, "curve": "small"}
    text = {
        name: {**more, "what": f"<{name}>", "overrides": values} for name, values in rows.items()
    }
    Path("rows.yaml").write_text(yaml.safe_dump(text, sort_keys=False))


def results(*arguments: str) -> int:
    return main(["--rows=rows.yaml", *arguments])


def lines() -> list[dict[str, str]]:
    with open("docs/results.csv") as file:
        return list(csv.DictReader(file))


def cells() -> list[list[str]]:
    text = Path("docs/results.md").read_text()
    assert text.startswith(f"# Results\n\n{BEGIN}\n\n### Small\n\n| what |")
    assert text.endswith(f"\n\n{END}\n\nThe end.\n") and text.count(BEGIN) == 1
    return [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| <")]


def starts(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "starts.jsonl").read_text().splitlines()]


def csv_lines(name: str, errors: list[float], labels: int) -> list[list[Any]]:
    """Lines of docs/results.csv for draws of a row in rows.yaml."""
    row = read_rows(Path("rows.yaml"))[name]
    where = [1, 1, "cpu", "a CPU, 2 cores", "2026-01-01", ""]
    rest = ["0" * 12, "3:0.5 6:0.25"]
    return [
        [name, draw, labels, error, error / 2, 6, 60.0, *where, row.settings(draw), *rest]
        for draw, error in enumerate(errors)
    ]


HEAD = (
    "row,draw,labels,test_error,validation_error,steps,wall_seconds,world_size,threads,device,"
    "machine,date,commit,settings,weights_sha256,learning\n"
)


@pytest.mark.process
def test_rows_are_trained_once_and_kept(project: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_rows(a=["--data.labels_per_class=2"], b=["--data.labels_per_class=9999"])
    assert results("--dry_run") == 0
    assert "2 runs to train" in capfd.readouterr().out
    assert not Path("docs/results.csv").exists() and not Path("runs").exists()

    assert results("b", "a") == 1  # b cannot be trained, and does not stop a
    errors = capfd.readouterr().err
    assert (
        "error: b, draw 0 is not finished" in errors
        and "fewer than 9999 labels per class" in errors
    )
    (line,) = lines()
    (run,) = Path("runs/results/a").iterdir()
    summary = json.loads((run / "summary.json").read_text())
    assert float(line["test_error"]) == summary["test_error"]
    assert (line["row"], line["draw"], line["labels"], line["steps"]) == ("a", "0", "20", "6")
    assert (line["world_size"], line["threads"], line["device"]) == ("1", "1", "cpu")
    assert line["machine"].endswith("cores") or line["machine"].endswith("core")
    error = f"{100 * summary['test_error']:.2f} %"
    trained, missing = cells()
    assert trained[:3] == ["<a>", "1", error] and trained[4] == "6"
    assert trained[-1] == "`python benchmarks/results.py a`"
    assert missing[:3] == ["<b>", "0 of 1", "not run yet"]
    assert f"small, 20 labels: {error}, 1 run" in Path("docs/label_efficiency.svg").read_text()

    # Nothing is left to do, here or on a machine that has only the line.
    shutil.rmtree("runs")
    page = Path("docs/results.md").read_text()
    Path("docs/results.md").write_text(f"# Results\n\n{BEGIN}\n{END}\n\nThe end.\n")
    assert results("a") == 0
    assert "0 runs to train" in capfd.readouterr().out and not Path("runs").exists()
    assert Path("docs/results.md").read_text() == page


@pytest.mark.process
def test_a_changed_row_is_trained_again_and_resumes_where_it_was_stopped(project: Path) -> None:
    write_rows(long=["--train.steps=60"])
    with open("docs/results.csv", "w") as file:
        file.write(HEAD)
        csv.writer(file).writerows(csv_lines("long", [0.5], 100))
    write_rows(long=["--train.steps=120", "--checkpoint.every=10", "--train.supervised_only=true"])
    script = [sys.executable, str(REPOSITORY / "benchmarks" / "results.py"), "--rows=rows.yaml"]
    with subprocess.Popen(script) as process:
        while not list(project.glob("runs/results/long/*/checkpoints/step-*")):
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 130
    (run,) = Path("runs/results/long").iterdir()
    assert not (run / "DONE").exists() and [line["test_error"] for line in lines()] == ["0.5"]
    assert cells()[0][1:3] == ["0 of 1", "not run yet"]  # the line is of other settings now
    assert results() == 0
    first, second = starts(run)
    assert first == 0 and 10 <= second < 120
    (line,) = lines()
    assert line["steps"] == "120" and line["test_error"] != "0.5"
    assert cells()[0][1] == "1"


def test_draws_are_pooled_and_drawn_over_labels(
    project: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_rows(many=["--data.labels_per_class=10"], few=["--data.labels_per_class=2"])
    with open("docs/results.csv", "w") as file:
        file.write(HEAD)
        writer = csv.writer(file)
        writer.writerows(csv_lines("few", [0.9], 20))  # as after a merge: the later line counts
        writer.writerows(csv_lines("many", [0.01, 0.03], 100) + csv_lines("few", [0.2], 20))
        writer.writerow(["gone", *csv_lines("few", [0.2], 20)[0][1:]])
    assert results() == 0
    many, few = cells()
    assert many[1:6] == ["2", "2.00 ± 1.41 %", "1.00 ± 0.71 %", "6", "1 min 0 s"]
    assert few[1:4] == ["1", "20.00 %", "10.00 %"]
    drawn = Path("docs/label_efficiency.svg").read_text()
    assert drawn.index("20 labels: 20.00 %, 1 run") < drawn.index("100 labels: 2.00 ± 1.41 %")
    assert (
        "![Test error by number of labels](label_efficiency.svg)"
        in Path("docs/results.md").read_text()
    )
    assert not list(Path("docs").glob("learning*"))  # only for rows that are no points of a curve
    capfd.readouterr()
    assert results("--draws=3", "--dry_run", "many", "many") == 0
    output = capfd.readouterr().out
    assert "1 run to train" in output and "many, draw 2: accelerate launch" in output
    assert (
        f"--data.root={project}/data/small-labels-10-draw-2 --seed=2 --data.label_seed=2" in output
    )


def test_learning_curves_are_means_over_draws(project: Path) -> None:
    write_rows(a=[], b=["--train.steps=9"])
    fields = yaml.safe_load(Path("rows.yaml").read_text())
    for row in fields.values():
        del row["curve"]
    Path("rows.yaml").write_text(yaml.safe_dump(fields))
    with open("docs/results.csv", "w") as file:
        file.write(HEAD)
        writer = csv.writer(file)
        one, two = csv_lines("a", [0.2, 0.2], 100)
        writer.writerows([one, [*two[:-1], "3:0.3 6:0.15"]])
        writer.writerow(
            [*csv_lines("b", [0.2], 100)[0][:-1], ""]
        )  # trained before they were recorded
    assert results("a") == 0
    drawn = Path("docs/learning_small.svg").read_text()
    assert "a, step 3: 40.00 ± 14.14 %, 2 runs" in drawn
    assert "a, step 6: 20.00 ± 7.07 %, 2 runs" in drawn and "b, step" not in drawn
    assert (
        "![Validation error by step: Small](learning_small.svg)"
        in Path("docs/results.md").read_text()
    )


def test_what_cannot_be_done_is_said(project: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_rows(a=[])

    def refused(*arguments: str) -> str:
        assert results(*arguments) == 2
        captured = capfd.readouterr()
        assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
        return captured.err

    assert "there is no row b: give some of a" in refused("a", "b")
    Path("docs/results.csv").write_text(HEAD + "<<<<<<< HEAD\n")
    assert "docs/results.csv cannot be read up to line 2" in refused()
    Path("docs/results.csv").unlink()
    for text in ("# Results\n", f"{END}\n{BEGIN}\n"):
        Path("docs/results.md").write_text(text)
        assert f"docs/results.md has no {BEGIN} with {END} after it" in refused()
    Path("docs/results.md").unlink()
    assert "run this from the project's folder" in refused()
    write_rows(a=["--no.such=1"])
    assert "row a: there is no setting no.such" in refused()
    Path("rows.yaml").write_text("a: {what: only}\n")
    assert "cannot read the rows in rows.yaml" in refused()


def test_the_listed_rows_can_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    rows = read_rows(ROWS)
    assert {row.table for row in rows.values()} == {
        "MNIST, 100 labels",
        "Fashion-MNIST, 1,000 labels",
        "MNIST by number of labels",
    }
    points = [row for row in rows.values() if row.curve is not None]
    assert len(points) == 11 and {row.config.train.steps for row in points} == {5000}
    for row in points:
        assert row.name.split("_")[1] == str(10 * row.config.data.labels_per_class)
    hashes = {row.settings(draw) for row in rows.values() for draw in range(row.draws)}
    assert len(hashes) == sum(row.draws for row in rows.values())


def test_the_page_is_what_the_program_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(REPOSITORY / "docs", tmp_path / "docs")
    (tmp_path / "configs").symlink_to(REPOSITORY / "configs")
    monkeypatch.chdir(tmp_path)
    assert publish(read_rows(ROWS))
    for file in [tmp_path / "docs" / "results.md", *(tmp_path / "docs").glob("l*.svg")]:
        assert file.read_text() == (REPOSITORY / "docs" / file.name).read_text()
