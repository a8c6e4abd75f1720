"""launch/sweep.sbatch up to launch/train.sbatch: points of a grid, and runs of a W&B sweep."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from sgan_dist.config import load
from sgan_dist.evaluation.compare import compare
from tests.ranks import REPOSITORY, environment
from tests.wandb_server import WandbServer

pytestmark = pytest.mark.process

# In place of SLURM's; tests/slurm has the real one.
SRUN = '#!/bin/bash\nwhile [[ $1 = --* ]]; do shift; done\nexec "$@"\n'
TRAIN = 'echo "$@" >> starts\nexec python -m sgan_dist train --config "$@"\n'


class SweepServer(WandbServer):
    """Hands out one run of the sweep in launch/sweep.yaml."""

    def __init__(self) -> None:
        self.runs = [{"seed": 3, "data.labels_per_class": 2, "loss.fake": 0.25}]
        self.starts: list[tuple[str, int]] = []  # sweep, and labels a class by the run's config
        super().__init__()

    def graphql(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        if "SweepWithRuns" in query:
            config = (REPOSITORY / "launch" / "sweep.yaml").read_text()
            return {"project": {"sweep": {"config": config, "runs": {"edges": []}}}}
        if "CreateAgent" in query:
            assert variables["sweep"] == "s1"
            return {"createAgent": {"agent": {"id": "agent"}}}
        if "Heartbeat" in query:
            commands: list[dict[str, Any]] = [{"type": "exit"}]
            if self.runs:
                args = {key: {"value": value} for key, value in self.runs.pop().items()}
                commands = [{"type": "run", "run_id": "handed1", "program": "", "args": args}]
            return {"agentHeartbeat": {"agent": {"id": "a"}, "commands": json.dumps(commands)}}
        if "UpsertBucket" in query and variables["displayName"]:
            config = json.loads(variables["config"])
            self.starts.append((variables["sweep"], config["data.labels_per_class"]["value"]))
        return super().graphql(query, variables)


@pytest.fixture
def server() -> Iterator[SweepServer]:
    server = SweepServer()
    yield server
    server.close()


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project's folder with the script in it, a launch/train.sbatch without SLURM, and an srun."""
    for folder in ("launch", "bin"):
        (tmp_path / folder).mkdir()
    (tmp_path / "launch" / "sweep.sbatch").symlink_to(REPOSITORY / "launch" / "sweep.sbatch")
    (tmp_path / "launch" / "train.sbatch").write_text(TRAIN)
    (tmp_path / "bin" / "srun").write_text(SRUN)
    (tmp_path / "bin" / "srun").chmod(0o755)
    return tmp_path


def submit(project: Path, task: int | None, *arguments: str, **more: str) -> tuple[int, str]:
    """Exit code and output of an array task."""
    programs = f"{project / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    more |= {"PATH": programs, "VIRTUAL_ENV": sys.prefix, "SLURM_ARRAY_JOB_ID": "7"}
    if task is not None:
        more["SLURM_ARRAY_TASK_ID"] = str(task)
    done = subprocess.run(
        ["bash", "launch/sweep.sbatch", *arguments],
        cwd=project,
        env=environment(**more),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=180,
    )
    return done.returncode, done.stdout


def small(project: Path) -> str:
    """A config file of a run of a few steps that prepares its dataset."""
    settings = {
        "name": "digits",
        "data": {"source": "digits"},
        "batch": {"labeled": 8, "unlabeled": 16, "fake": 8},
        "model": {"discriminator_args": {"width": 4}, "generator_args": {"width": 4}},
        "train": {"steps": 20, "log_every": 10},
    }
    (project / "digits.yaml").write_text(yaml.safe_dump(settings))
    return "digits.yaml"


def sweeping(project: Path, server: SweepServer) -> dict[str, str]:
    """What a user of a W&B sweep has in the environment."""
    online = {"WANDB_MODE": "online", "WANDB_BASE_URL": server.url, "WANDB_API_KEY": "0" * 40}
    return online | {"WANDB_SWEEP": "me/sgan_dist/s1", "HOME": str(project)}


def starts(project: Path) -> list[str]:
    """The command lines that launch/train.sbatch was given."""
    return (project / "starts").read_text().splitlines()


def test_the_grid_has_a_run_a_point_with_labels_slowest(project: Path) -> None:
    (project / "launch" / "train.sbatch").write_text('echo "$@" >> starts\n')
    grid = {"LABELS": "2 5 10", "SEEDS": "0 1"}
    for task in range(6):
        code, output = submit(project, task, "configs/mnist.yaml", "--optim.lr=1e-3", **grid)
        assert code == 0, output
    points = [(labels, seed) for labels in (2, 5, 10) for seed in (0, 1)]
    assert starts(project) == [
        f"configs/mnist.yaml --name=mnist-labels-{labels}-seed-{seed}"
        f" --run_dir=runs/mnist-sweep/labels-{labels}-seed-{seed}"
        f" --data.root=data/mnist-labels-{labels}-draw-{seed}"
        f" --seed={seed} --data.label_seed={seed} --data.labels_per_class={labels} --optim.lr=1e-3"
        for labels, seed in points
    ]
    assert submit(project, 0, "configs/mnist.yaml", SWEEP_NAME="short", **grid)[0] == 0
    assert "--run_dir=runs/short-sweep/labels-2-seed-0" in starts(project)[-1]


def test_both_scripts_ask_slurm_for_the_same() -> None:
    def options(name: str) -> set[str]:
        lines = (REPOSITORY / "launch" / name).read_text().splitlines()
        words = {line.split()[1] for line in lines if line.startswith("#SBATCH ")}
        return {word for word in words if not word.startswith(("--job-name=", "--output="))}

    assert options("sweep.sbatch") == options("train.sbatch")


def test_a_point_of_the_grid_trains(project: Path) -> None:
    code, output = submit(project, 1, small(project), LABELS="2", SEEDS="4 5")
    assert code == 0, output
    run = project / "runs" / "digits-sweep" / "labels-2-seed-5"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["labels"] == 20
    assert summary["seed"] == summary["label_seed"] == 5
    assert (project / "data" / "digits-labels-2-draw-5" / "index.json").exists()
    table = re.sub(" +", " ", compare([project / "runs"], ["labels", "seed"], None))
    assert f"| 20 | 5 | 1 | {100 * summary['test_error']:.2f} % | 20 |" in table


def test_what_cannot_be_swept_is_one_sentence(project: Path) -> None:
    grid = {"LABELS": "2 5", "SEEDS": "0 1"}
    wrong: list[tuple[int | None, list[str], dict[str, str], str]] = [
        (4, ["x.yaml"], grid, "the sweep has 4 points, and no number 4: give --array=0-3"),
        (0, ["x.yaml"], {"LABELS": "2"}, "nothing to sweep: give LABELS"),
        (0, [], grid, "usage: sbatch"),
        (None, ["x.yaml"], grid, "not a job array: give sbatch --array=FIRST-LAST"),
    ]
    for task, arguments, variables, message in wrong:
        code, output = submit(project, task, *arguments, **variables)
        assert code == 2 and message in output and output.count("\n") == 1, output
    (project / "launch" / "train.sbatch").unlink()
    assert submit(project, 0, "x.yaml", **grid)[0] == 2
    assert not (project / "starts").exists()


def test_a_wandb_sweep_hands_out_a_run_that_a_requeue_resumes(
    project: Path, server: SweepServer
) -> None:
    online, config = sweeping(project, server), small(project)
    code, output = submit(project, 1, config, **online)
    assert code == 0, output
    run = project / "runs" / "digits-sweep" / "handed1"
    settings = load(run / "config.yaml")
    assert (settings.seed, settings.data.labels_per_class, settings.loss.fake) == (3, 2, 0.25)
    assert settings.name == "digits-handed1" and (run / "DONE").exists()
    assert (run / "wandb_id").read_text() == "handed1"

    code, output = submit(project, 1, config, "--train.steps=40", "--optim.decay=0.33", **online)
    assert code == 0 and "wandb agent" not in output, output
    assert starts(project)[0] + " --train.steps=40 --optim.decay=0.33" == starts(project)[1]
    assert json.loads((run / "summary.json").read_text())["step"] == 40
    assert set(server.run_ids) == {"handed1"} and server.starts == [("s1", 2)] * 2
    assert [line["_step"] for line in server.history if "d/fake" in line] == [10, 20, 30, 40]
    points = "".join(path.read_text() for path in run.parent.glob(".points/7-*"))
    assert "handed1" in points and "API_KEY" not in points

    code, output = submit(project, 2, config, **online)
    assert code == 0 and "the sweep me/sgan_dist/s1 has no run left" in output, output


@pytest.mark.slow
def test_a_wandb_that_hands_out_nothing_is_reported(project: Path, server: SweepServer) -> None:
    server.broken = True
    code, output = submit(project, 1, "configs/mnist.yaml", **sweeping(project, server))
    assert code == 2 and "W&B handed out no run of me/sgan_dist/s1" in output, output
    assert not (project / "starts").exists()
