"""Training commands for tests, as users type them: a small run, its processes, and what it leaves."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil

ONE_PROCESS = ("accelerate", "launch")
TWO_RANKS = ("accelerate", "launch", "--multi_gpu", "--num_processes", "2")
ON_CPU: dict[str, Any] = {"ACCELERATE_USE_CPU": "true"}


def settings(root: Path, directory: Path, *overrides: str) -> list[str]:
    """The settings of a run of a few seconds on a prepared dataset, with a line every 10 steps."""
    return [
        f"--data.root={root}",
        "--data.source=null",
        f"--run_dir={directory}",
        "--name=small",
        "--batch.labeled=8",
        "--batch.unlabeled=16",
        "--batch.fake=8",
        '--model.discriminator_args={"width": 4}',
        '--model.generator_args={"width": 4}',
        "--train.steps=150",
        "--train.log_every=10",
        "--train.evaluate_every=0",
        "--train.sample_every=100",
        "--checkpoint.every=20",
        *overrides,
    ]


def training(root: Path, directory: Path, *overrides: str) -> list[str]:
    """`launch/train.py` with the settings of a small run; a launcher goes before it."""
    return ["launch/train.py", *settings(root, directory, *overrides)]


def summary(directory: Path) -> dict[str, Any]:
    """summary.json of a finished run."""
    return json.loads((directory / "summary.json").read_text())


def metrics(directory: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without times, by which equal runs differ."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]


def starts(directory: Path) -> list[dict[str, Any]]:
    """The lines of starts.jsonl."""
    return [json.loads(line) for line in (directory / "starts.jsonl").read_text().splitlines()]


def wait_for_step(process: subprocess.Popen[str], directory: Path, step: int) -> None:
    """Waits until metrics.jsonl has reached `step`, which must be a multiple of 10."""
    path = directory / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        lines = path.read_text().splitlines() if path.exists() else []
        if len(lines) * 10 >= step:
            return
        if process.poll() is not None:
            raise AssertionError(f"ended before step {step}:\n{process.communicate()[0]}")
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached:\n{kill_all(process)}")


def kill_all(process: subprocess.Popen[str], number: int = signal.SIGKILL) -> str:
    """Signals a command and all its descendants; returns its output."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        member.send_signal(number)
    return process.communicate(timeout=60)[0]
