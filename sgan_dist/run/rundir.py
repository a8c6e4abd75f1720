"""The run directory: its lock, DONE, FAILED, summary.json, and the versions behind a result."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import os
import platform
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from filelock import Timeout

from sgan_dist import __version__
from sgan_dist.config import Config, find_config, load, save
from sgan_dist.data.remote.urls import is_remote, redact_url
from sgan_dist.errors import TransientError, UserError, plural
from sgan_dist.files import locked, write_whole
from sgan_dist.parallel.engine import Backend
from sgan_dist.parallel.launcher import Precision

log = logging.getLogger(__name__)
LOCK = ".lock"


def run_directory(argv: Sequence[str], default: str | None = None) -> Path | None:
    """Returns the run directory of a command line that `parse` refuses; None if it names none."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", action="append")
    parser.add_argument("--run_dir")
    parser.add_argument("--name")
    try:
        options, _ = parser.parse_known_args(argv)
        settings: dict[str, Any] = {}
        for name in options.config or ([] if default is None else [default]):
            settings |= yaml.safe_load(find_config(name).read_text())
        settings |= {key: value for key, value in vars(options).items() if value is not None}
        return Path(settings.get("run_dir") or f"runs/{settings['name']}").expanduser()
    except (argparse.ArgumentError, OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
        return None  # the error of `parse` says what is wrong


def resumed_precision(config: Config) -> Precision | None:
    """Returns the precision of the run that `config` continues; None if it begins one."""
    if not (config.directory / "latest").exists():
        return None
    resumed = load(config.directory / "config.yaml").machine.precision
    return None if resumed == "auto" else resumed


@contextlib.contextmanager
def claim(config: Config) -> Iterator[None]:
    """Creates the run directory with its config.yaml, removes DONE and FAILED, and holds its lock.

    Raises:
        UserError: it cannot be written.
        TransientError: another process trains in it.
    """
    run, data = config.directory, config.data
    if not is_remote(data.root):  # evaluation may run in another folder
        data = dataclasses.replace(data, root=str(Path(data.root).absolute()))
    with contextlib.ExitStack() as stack:
        try:
            run.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(run / LOCK, timeout=0))
            path = run / "config.yaml"
            if data.root != redact_url(data.root):  # it holds the signed URL of the dataset
                path.touch(mode=0o600)
            save(dataclasses.replace(config, data=data), path)
            for mark in ("DONE", "FAILED"):
                (run / mark).unlink(missing_ok=True)
        except Timeout as error:
            raise TransientError(
                f"another process is training in {run}: wait for it, or give another --run_dir"
            ) from error
        except OSError as error:
            problem = f"cannot write to the run directory {run} ({error.strerror})"
            raise UserError(f"{problem}: give another --run_dir") from error
        yield


def in_use(run: Path) -> bool:
    """Returns whether a process trains in a run directory."""
    if not (run / LOCK).exists():
        return False
    try:
        with locked(run / LOCK, timeout=0):
            return False
    except Timeout:
        return True


def finished(config: Config) -> dict[str, Any] | None:
    """Returns the summary of a run that is done; None if steps are left to train."""
    run = config.directory
    if not (run / "DONE").exists():
        return None
    summary: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return summary if summary["step"] >= config.train.steps else None


def record_start(run: Path, step: int, environment: dict[str, Any]) -> int:
    """Adds a line to starts.jsonl; returns how often the run was started before.

    `environment` is what this start runs on.
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


def mark_done(run: Path, summary: dict[str, Any]) -> None:
    """Writes summary.json, then DONE."""
    write_whole(run / "summary.json", json.dumps(summary, indent=1) + "\n")
    (run / "DONE").write_text(f"{summary['step']} steps\n")


def mark_failed(run: Path, reason: str, by_a_rank: bool = False) -> None:
    """Writes FAILED with the reason, unless the run is done or another process trains it.

    `by_a_rank`: this is a rank of the run itself, whose rank 0 holds the lock.
    """
    try:
        if (run / "DONE").exists() or (not by_a_rank and in_use(run)):
            return
        run.mkdir(parents=True, exist_ok=True)
        (run / "FAILED").write_text(reason + "\n")
    except OSError as error:
        log.warning(f"cannot write {run / 'FAILED'}: {error.strerror}")


def write_sample_ids(run: Path, step: int, ids: list[tuple[list[int], list[int]]]) -> None:
    """Writes the sample ids of a batch with a non-finite loss, rank by rank, to a JSON file."""
    path = run / f"nonfinite-step-{step:08d}.json"
    ranks = [{"labeled": labeled, "unlabeled": unlabeled} for labeled, unlabeled in ids]
    path.write_text(json.dumps({"step": step, "ranks": ranks}) + "\n")


def environment(backend: Backend) -> dict[str, Any]:
    """Returns what the last bits of a result depend on, other than the config."""
    facts: dict[str, Any] = {
        "world_size": backend.world_size,
        "device": backend.device.type,
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
    }
    if backend.device.type == "cuda":
        facts |= {
            "gpu": torch.cuda.get_device_name(backend.device),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
            "nccl": list(torch.cuda.nccl.version()),  # type: ignore[no-untyped-call]
        }
    return facts


def versions() -> dict[str, str]:
    """Returns the versions of Python, of this package, and of those that it is built on."""
    packages = ("torch", "accelerate", "webdataset", "numpy")
    own = {"python": platform.python_version(), "sgan_dist": __version__}
    return own | {name: version(name) for name in packages}


def results(run: Path, summary: dict[str, Any]) -> str:
    """Returns the table at the end of a run: its test error, and its files."""
    names = "classifier.safetensors", "samples", "metrics.jsonl", "summary.json", "report.html"
    files = [f"{path.stem:<10}  {path}" for path in (run / name for name in names) if path.exists()]
    error = f"  {summary['trained_on']:<22}  {summary['test_error']:7.2%}"
    lines = ["", "test error", error]
    if skipped := summary.get("skipped_images"):
        lines.append(
            f"  {plural(skipped, 'damaged training image')} skipped: metrics.jsonl has when"
        )
    return "\n".join([*lines, "", *files])
