"""A sweep as a job array, by the scripts of `sgan-dist slurm`, in a folder that holds no clone."""

from __future__ import annotations

import re
import statistics
import time
from pathlib import Path

from tests.commands import starts, summary
from tests.ranks import run
from tests.slurm.cluster import Cluster
from tests.slurm.training import LONG, ONE_NODE, submit

SMALL = (
    "--batch.labeled=8",
    "--batch.unlabeled=16",
    "--batch.fake=8",
    '--model.discriminator_args={"width":4}',
    '--model.generator_args={"width":4}',
    "--loss.consistency=0",
    "--train.steps=200",
    "--train.log_every=5",
    "--train.evaluate_every=0",
    "--train.sample_every=0",
    "--checkpoint.every=20",
    "--tracking.wandb=false",
)


def test_an_array_trains_a_grid_that_makes_a_table(cluster: Cluster, tmp_path: Path) -> None:
    code, output = run("sgan-dist", "slurm", f"--out={tmp_path}/scripts")
    assert code == 0, output
    number = submit(
        cluster,
        *ONE_NODE,
        "--array=0-3",
        "digits",
        *SMALL,
        script="scripts/sweep.sbatch",
        cwd=tmp_path,
        LABELS="2 10",
        SEEDS="3 4",
    )
    runs = tmp_path / "runs" / "digits-sweep"
    # the last task's own id is that of the array: a requeue of it must leave the others alone
    last = runs / "labels-10-seed-4"
    deadline = time.monotonic() + LONG
    while not (last / "latest").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    cluster.run("scancel", "--batch", "--signal=USR1", f"{number}_3")
    for task in range(4):
        job = cluster.wait_for(f"{number}_{task}", "COMPLETED", timeout=LONG)
        assert job["Restarts"] == str(int(task == 3))
    assert len(starts(last)) == 2 and 20 <= starts(last)[1]["step"] < 200
    for labels in (2, 10):
        for seed in (3, 4):
            content = summary(runs / f"labels-{labels}-seed-{seed}")
            assert (content["labels"], content["seed"]) == (10 * labels, seed)
            assert content["label_seed"] == seed
    assert not (tmp_path / "launch").exists() and not (tmp_path / "sgan_dist").exists()
    code, output = run("sgan-dist", "compare", str(runs))
    assert code == 0, output
    rows = [line.split("|")[1:-1] for line in output.splitlines() if re.match(r"\| \d", line)]
    assert len(rows) == 2
    for row, labels in zip(rows, (2, 10), strict=True):
        errors = [summary(runs / f"labels-{labels}-seed-{seed}")["test_error"] for seed in (3, 4)]
        mean, std = 100 * statistics.fmean(errors), 100 * statistics.stdev(errors)
        cells = [cell.strip() for cell in row]
        assert cells[:4] == [str(10 * labels), "2", f"{mean:.2f} ± {std:.2f} %", "200"]
