"""launch/sweep.sbatch as a job array, and the table of what it trained."""

from __future__ import annotations

import json
import re
import statistics
import time
from pathlib import Path

import yaml

from tests.e2e.test_train import summary
from tests.ranks import REPOSITORY, run
from tests.slurm.cluster import Cluster
from tests.slurm.training import LONG, ONE_NODE, submit


def test_an_array_trains_a_grid_that_makes_a_table(
    cluster: Cluster, config: Path, tmp_path: Path
) -> None:
    (tmp_path / "launch").symlink_to(REPOSITORY / "launch")  # its runs/ and data/ are not ours
    settings = yaml.safe_load(config.read_text())
    settings["data"] = {"source": "digits", "labeled_batch": 8, "unlabeled_batch": 16}
    settings["train"]["steps"] = 200
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(settings))
    number = submit(
        cluster,
        *ONE_NODE,
        "--array=0-3",
        "small.yaml",
        script="launch/sweep.sbatch",
        cwd=tmp_path,
        LABELS="2 10",
        SEEDS="3 4",
    )
    runs = tmp_path / "runs" / "small-sweep"
    # the last task's own id is that of the array: a requeue of it must leave the others alone
    last = runs / "labels-10-seed-4"
    deadline = time.monotonic() + LONG
    while not (last / "latest").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    cluster.run("scancel", "--batch", "--signal=USR1", f"{number}_3")
    for task in range(4):
        found = cluster.wait_for(f"{number}_{task}", "COMPLETED", timeout=LONG)
        assert found["Restarts"] == str(int(task == 3))
    starts = [json.loads(line) for line in (last / "starts.jsonl").read_text().splitlines()]
    assert len(starts) == 2 and 20 <= starts[1]["step"] < 200
    for labels in (2, 10):
        for seed in (3, 4):
            found = summary(runs / f"labels-{labels}-seed-{seed}")
            assert (found["labels"], found["seed"], found["label_seed"]) == (
                10 * labels,
                seed,
                seed,
            )
    code, output = run("python", "launch/collect.py", str(runs))
    assert code == 0, output
    rows = [line.split("|")[1:-1] for line in output.splitlines() if re.match(r"\| \d", line)]
    assert len(rows) == 2
    for row, labels in zip(rows, (2, 10), strict=True):
        errors = [summary(runs / f"labels-{labels}-seed-{seed}")["test_error"] for seed in (3, 4)]
        mean, std = 100 * statistics.fmean(errors), 100 * statistics.stdev(errors)
        shown = [cell.strip() for cell in row]
        assert shown[:4] == [str(10 * labels), "2", f"{mean:.2f} ± {std:.2f} %", "200"]
