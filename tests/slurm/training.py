"""Training jobs on the test cluster: how they are submitted and watched, and what they leave."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import psutil
import yaml

from tests.commands import metrics, starts, summary
from tests.ranks import REPOSITORY
from tests.slurm.cluster import PATH, Cluster

STEPS = 300
TWO_NODES = ("--nodes=2",)
ONE_NODE = ("--nodes=1", "--nodelist=n1")  # tests kill only n2
LONG = 180  # seconds for a start, or a requeue and a start, on a busy machine


def write_config(path: Path, root: Path) -> Path:
    """The config file of a run of a few seconds, on a prepared dataset."""
    settings = {
        "name": "small",
        "data": {"root": str(root)},
        "batch": {"labeled": 8, "unlabeled": 16, "fake": 8},
        "model": {"discriminator_args": {"width": 4}, "generator_args": {"width": 4}},
        "train": {
            "steps": STEPS,
            "log_every": 5,
            "evaluate_every": 0,
            "sample_every": 0,
        },
        "machine": {"step_timeout": 30},
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
    **variables: Any,
) -> int:
    """`sbatch` as a user calls it, with the environment activated; returns the job's id.

    `args` are options of sbatch, then the config, the first without a dash, then options of the script.
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
        **variables: Any,
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
        """The step that each start of the run resumed from."""
        return [start["step"] for start in self.start_lines]

    @property
    def start_lines(self) -> list[dict[str, Any]]:
        return starts(self.run)

    def wait_for_step(self, step: int) -> None:
        """Waits until metrics.jsonl has reached `step`."""
        path, deadline = self.run / "metrics.jsonl", time.monotonic() + LONG
        while not path.exists() or len(path.read_text().splitlines()) * 5 < step:
            job = self.cluster.job(self.number)
            if job["JobState"] not in ("PENDING", "CONFIGURING", "RUNNING"):
                raise AssertionError(f"{job['JobState']} before step {step}:\n{self.log}")
            if time.monotonic() > deadline:
                raise AssertionError(f"step {step} was not reached:\n{self.log}")
            time.sleep(0.02)

    def finish(self, state: str = "COMPLETED") -> int:
        """Waits until the job has ended in `state`; returns how often SLURM restarted it."""
        return int(self.cluster.wait_for(self.number, state, timeout=LONG)["Restarts"])

    def processes(self, node: str, *words: str) -> list[psutil.Process]:
        """The processes of this job on a node whose command line has all these words."""
        processes = []
        for process in self.cluster.node_processes(node):
            try:
                of_this_job = process.environ().get("SLURM_JOB_ID") == str(self.number)
                if of_this_job and set(words) <= {Path(w).name for w in process.cmdline()}:
                    processes.append(process)
            except psutil.Error:  # it has ended, or is one of the kernel
                continue
        return processes

    def check_interrupted(self) -> int:
        """Checks that the run was restarted once, in the middle; returns the step."""
        assert len(self.starts) == 2 and self.starts[0] == 0, self.log
        assert 0 < self.starts[1] < STEPS
        assert f"resuming after step {self.starts[1]}\n" in self.log
        return self.starts[1]


def check_same(run: Path, straight: Path) -> None:
    """A run's weights and metrics are those of another, to the last bit."""
    assert metrics(run) == metrics(straight)
    assert summary(run)["weights_sha256"] == summary(straight)["weights_sha256"]
