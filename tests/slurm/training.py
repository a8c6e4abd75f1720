"""Training jobs on the test cluster: how they are submitted, watched, and what they leave."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import yaml

from tests.e2e.test_train import metrics, summary
from tests.ranks import REPOSITORY
from tests.slurm.cluster import PATH, Cluster

STEPS = 300
TWO_NODES = ("--nodes=2",)
ONE_NODE = ("--nodes=1", "--nodelist=n1")  # tests take only n2 away
LONG = 180  # seconds that a start, or a requeue and a start, may take on a busy machine


def write_config(path: Path, root: Path) -> Path:
    """The config file of a run of a few seconds, on a prepared dataset."""
    settings = {
        "name": "small",
        "data": {"root": str(root), "labeled_batch": 8, "unlabeled_batch": 16},
        "model": {"discriminator_args": {"width": 4}, "generator_args": {"width": 4}},
        "train": {
            "steps": STEPS,
            "fake_batch": 8,
            "log_every": 5,
            "evaluate_every": 0,
            "sample_every": 0,
            "timeout": 30,
        },
        "checkpoint": {"every": 20},
        "tracking": {"wandb": False},
    }
    path.write_text(yaml.safe_dump(settings))
    return path


def submit(
    cluster: Cluster,
    *args: str,
    script: str = "launch/train.sbatch",
    cwd: Path = REPOSITORY,
    **variables: str,
) -> int:
    """`sbatch` as a user calls it, with the environment activated; `args`: options, then SCRIPT's.

    Options of sbatch are those before the first argument without dashes, the config.
    """
    config = next(i for i, arg in enumerate(args) if not arg.startswith("-"))
    log = f"--output={cluster.jobs}/%x-%j.log"
    small = {"PROCESSES": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    active = {"VIRTUAL_ENV": sys.prefix, "PATH": f"{Path(sys.executable).parent}:{PATH}"}
    return cluster.submit(
        "--cpus-per-task=1",
        log,
        *args[:config],
        script,
        *args[config:],
        cwd=cwd,
        variables={**small, **active, **variables},
    )


class Training:
    """A job of launch/train.sbatch, and the run directory that it trains in."""

    def __init__(
        self,
        cluster: Cluster,
        config: Path,
        run: Path,
        *overrides: str,
        options: tuple[str, ...] = TWO_NODES,
        **variables: str,
    ) -> None:
        self.cluster, self.run = cluster, run
        self.number = submit(
            cluster, *options, str(config), f"--run_dir={run}", *overrides, **variables
        )

    @property
    def log(self) -> str:
        return self.cluster.log(self.number)

    @property
    def starts(self) -> list[int]:
        """The steps that the run went on from, start by start."""
        return [start["step"] for start in self.start_lines]

    @property
    def start_lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.run / "starts.jsonl").read_text().splitlines()]

    def wait_for_step(self, step: int) -> None:
        """Waits until metrics.jsonl has come to `step`."""
        path, deadline = self.run / "metrics.jsonl", time.monotonic() + LONG
        while not path.exists() or len(path.read_text().splitlines()) * 5 < step:
            job = self.cluster.job(self.number)
            if job["JobState"] not in ("PENDING", "CONFIGURING", "RUNNING"):
                raise AssertionError(f"{job['JobState']} before step {step}:\n{self.log}")
            if time.monotonic() > deadline:
                raise AssertionError(f"step {step} was not reached:\n{self.log}")
            time.sleep(0.02)

    def finish(self, state: str = "COMPLETED") -> int:
        """Waits until the job has come to its end; returns how often SLURM had restarted it."""
        return int(self.cluster.wait_for(self.number, state, timeout=LONG)["Restarts"])

    def processes(self, node: str, *words: str) -> list[psutil.Process]:
        """This job's processes of a node whose command line has all these words."""
        found = []
        for process in self.cluster.node_processes(node):
            try:
                ours = process.environ().get("SLURM_JOB_ID") == str(self.number)
                if ours and set(words) <= {Path(w).name for w in process.cmdline()}:
                    found.append(process)
            except psutil.Error:  # gone, or a kernel's
                continue
        return found

    def check_interrupted(self) -> int:
        """The step of the only restart of the run, which was in the middle."""
        assert len(self.starts) == 2 and self.starts[0] == 0, self.log
        assert 0 < self.starts[1] < STEPS
        assert f"resuming after step {self.starts[1]}\n" in self.log
        return self.starts[1]


def check_same(run: Path, straight: Path) -> None:
    """A run's weights and metrics are those of another, to the last bit."""
    assert metrics(run) == metrics(straight)
    assert summary(run)["weights_sha256"] == summary(straight)["weights_sha256"]
