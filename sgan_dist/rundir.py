"""The run directory's marks: DONE, FAILED, summary.json, and what a run was made with."""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import json
import os
import platform
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

import torch
import yaml

from sgan_dist.config import Config, save
from sgan_dist.data.remote import is_remote
from sgan_dist.errors import Outage, UserError
from sgan_dist.players import Backend

_locks: list[TextIO] = []  # open files: closing one would give its lock up


def run_directory(argv: Sequence[str], default: Path | None = None) -> Path | None:
    """Where a command line that `parse` refuses would have run, as far as it can be told."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", action="append", type=Path)
    parser.add_argument("--run_dir")
    parser.add_argument("--name")
    try:
        given, _ = parser.parse_known_args(argv)
        named: dict[str, Any] = {}
        for path in given.config or ([] if default is None else [default]):
            named |= yaml.safe_load(path.read_text())
        named |= {key: value for key, value in vars(given).items() if value is not None}
        return Path(named.get("run_dir") or f"runs/{named['name']}")
    except (argparse.ArgumentError, OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
        return None  # what is wrong is being told already


def claim(config: Config) -> None:
    """Makes the run directory, with the config in it, and locks it for as long as this process lives.

    Raises:
        UserError: it can't be written.
        Outage: another process trains in it.
    """
    run = config.directory
    try:
        run.mkdir(parents=True, exist_ok=True)
        lock = open(run / ".lock", "w")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _locks.append(lock)
        # The dataset's absolute path: the run may be looked at from another folder.
        root = (
            config.data.root if is_remote(config.data.root) else Path(config.data.root).absolute()
        )
        data = dataclasses.replace(config.data, root=str(root))
        save(dataclasses.replace(config, data=data), run / "config.yaml")
        (run / "FAILED").unlink(missing_ok=True)
    except BlockingIOError as error:
        raise Outage(
            f"another process is training in {run}: wait for it, or give another --run_dir"
        ) from error
    except OSError as error:
        raise UserError(
            f"can't write to the run directory {run} ({error.strerror}): give another --run_dir"
        ) from error


def note_start(run: Path, step: int, environment: dict[str, Any]) -> int:
    """Adds a line to starts.jsonl; returns how often the run was started before.

    `environment` is what this start runs on, for who reads the file.
    """
    path = run / "starts.jsonl"
    before = len(path.read_text().splitlines()) if path.exists() else 0
    line = {"step": step, "time": time.strftime("%Y-%m-%d %H:%M:%S %z"), **environment}
    job = os.environ.get("SLURM_JOB_ID")
    if job is not None:
        line |= {"job": job, "nodes": os.environ.get("SLURM_JOB_NODELIST")}
    with open(path, "a") as file:
        file.write(json.dumps(line) + "\n")
    return before


def mark_failed(run: Path, reason: str) -> None:
    """Leaves FAILED with the reason, unless the directory is of a run that is done or goes on."""
    try:
        if (run / "DONE").exists() or in_use(run):
            return
        run.mkdir(parents=True, exist_ok=True)
        (run / "FAILED").write_text(reason + "\n")
    except OSError as error:
        print(f"can't leave {run / 'FAILED'}: {error.strerror}")


def in_use(run: Path) -> bool:
    """Whether another process trains in a run directory."""
    if _locks or not (run / ".lock").exists():
        return False
    with open(run / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def mark_done(run: Path, summary: dict[str, Any]) -> None:
    """Writes summary.json, then DONE."""
    partial = run / ".summary.partial"
    partial.write_text(json.dumps(summary, indent=1) + "\n")
    partial.replace(run / "summary.json")
    (run / "DONE").write_text(f"{summary['step']} steps\n")


def finished(config: Config) -> dict[str, Any] | None:
    """The summary of a run that is done; None where steps are left to make."""
    run = config.directory
    if not (run / "DONE").exists():
        return None
    summary: dict[str, Any] = json.loads((run / "summary.json").read_text())
    baseline_missing = config.train.baseline_steps and "supervised_test_error" not in summary
    if summary["step"] < config.train.steps or baseline_missing:
        (run / "DONE").unlink()
        return None
    return summary


def environment(backend: Backend) -> dict[str, Any]:
    """What the bits of a result depend on besides the config."""
    return {
        "world_size": backend.world_size,
        "device": backend.device.type,
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
    }


def versions() -> dict[str, str]:
    """Versions of this package and of what it stands on."""
    packages = ("sgan_dist", "torch", "accelerate", "webdataset", "numpy")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def write_sample_ids(run: Path, step: int, ids: list[tuple[list[int], list[int]]]) -> None:
    """Leaves the sample ids of the batch that broke, rank by rank, for who wants to look at it."""
    path = run / f"nonfinite-step-{step:08d}.json"
    ranks = [{"labeled": labeled, "unlabeled": unlabeled} for labeled, unlabeled in ids]
    path.write_text(json.dumps({"step": step, "ranks": ranks}) + "\n")


def results(run: Path, summary: dict[str, Any]) -> str:
    """The closing table."""
    lines = ["", "test error"]
    lines.append(f"  {summary['trained_on']:<22}  {summary['test_error']:7.2%}")
    if "supervised_test_error" in summary:
        lines.append(f"  {'labeled images alone':<22}  {summary['supervised_test_error']:7.2%}")
    left = {
        "classifier": "classifier.safetensors",
        "samples": "samples",
        "metrics": "metrics.jsonl",
        "summary": "summary.json",
        "report": "report.html",
    }
    lines += ["", *(f"{k:<10}  {run / v}" for k, v in left.items() if (run / v).exists())]
    return "\n".join(lines)
