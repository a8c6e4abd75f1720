"""Runs that a batch system ends, and runs that hang: what they leave, and how they are resumed."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from sgan_dist import checkpoint
from tests.commands import ON_CPU, TWO_RANKS, starts, summary, training, wait_for_step
from tests.ranks import REPOSITORY, launch, run

pytestmark = pytest.mark.process

HANGS = (
    "--model.discriminator=tests.own_models:HangsAtTheFirstStart",
    "--model.discriminator_args={}",
)


def test_stacks_of_all_ranks_are_shown_and_a_hang_ends(digits: Path, tmp_path: Path) -> None:
    arguments = training(digits, tmp_path, *HANGS, "--machine.step_timeout=5")
    code, output = run(*TWO_RANKS, *arguments, **ON_CPU)
    assert code != 0
    for rank in (0, 1):
        assert len(re.findall(f"rank {rank} hangs: 5 s without a step since step", output)) == 1
    assert "in wait_for_nothing" in output  # where rank 1 is
    assert "in synchronize" in output or "all_reduce" in output  # and rank 0, which waits for it
    assert not (tmp_path / "FAILED").exists()


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_gpu_without_memory_left_is_one_sentence(
    ranks: int, digits: Path, tmp_path: Path
) -> None:
    own = ("--model.discriminator=tests.own_models:OutOfMemory", "--model.discriminator_args={}")
    arguments = training(digits, tmp_path, *own, "--train.steps=100")
    code, output = run(*(TWO_RANKS if ranks == 2 else ("python",)), *arguments, **ON_CPU)
    sentence = f"error: rank {ranks - 1} has used up the memory of its GPU \\(CUDA out of"
    assert code != 0 and len(re.findall(sentence, output)) == 1, output
    assert "batch.accumulation" in output and "More text" not in output
    assert "used up the memory" in (tmp_path / "FAILED").read_text()
    assert ranks == 2 or (code == 2 and "Traceback" not in output)


@pytest.mark.slow
def test_a_suspended_rank_ends_the_run_too(digits: Path, tmp_path: Path) -> None:
    arguments = training(digits, tmp_path, "--machine.step_timeout=4", "--train.steps=100000")
    process = launch(*TWO_RANKS, *arguments, **ON_CPU, TORCH_ELASTIC_SHUTDOWN_TIMEOUT="1")
    wait_for_step(process, tmp_path, 20)
    workers = [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if child.environ().get("RANK") == "1" and "launch/train.py" in child.cmdline()
    ]
    workers[0].send_signal(signal.SIGSTOP)
    output, _ = process.communicate(timeout=90)
    assert process.returncode != 0 and "rank 0 hangs" in output and "rank 1 hangs" not in output
    assert not workers[0].is_running()


@pytest.mark.slow
def test_a_run_ends_before_its_job_does_and_is_resumed(digits: Path, tmp_path: Path) -> None:
    arguments = training(digits, tmp_path, "--checkpoint.every=100000", "--optim.decay=0")
    ends = time.time() + 50
    code, output = run("python", *arguments, "--train.steps=100000", SLURM_JOB_END_TIME=str(ends))
    assert code == 75 and time.time() < ends, output
    path, _ = checkpoint.latest(tmp_path)
    assert path is not None
    step = checkpoint.read_meta(path)["step"]
    assert step > 0 and f"stopped after {step} of" in output
    # 10 steps of another job, without a time limit
    code, output = run("python", *arguments, f"--train.steps={step + 10}")
    assert code == 0 and f"resuming after step {step}" in output, output
    assert [start["step"] for start in starts(tmp_path)] == [0, step]
    assert summary(tmp_path)["restarts"] == 1 and summary(tmp_path)["step"] == step + 10


def test_slow_saves_begin_early() -> None:
    program = """
from sgan_dist.run import stopping
for save_seconds in (0, 20, 60):
    stopping.set_save_time(save_seconds)
    print(stopping.stop_requested())
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={"SLURM_JOB_END_TIME": str(time.time() + 130)},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "None\nNone\nthe job's time limit\n", done.stderr


@pytest.mark.slow
def test_a_batch_scripts_file_stops_a_run_without_alarm(digits: Path, tmp_path: Path) -> None:
    notice, outcome = tmp_path / "notice", tmp_path / "outcome"
    files: dict[str, Any] = {"SGAN_PREEMPTED": str(notice), "SGAN_OUTCOME": str(outcome)}
    arguments = training(digits, tmp_path / "run")
    process = launch("accelerate", "launch", *arguments, **files)
    wait_for_step(process, tmp_path / "run", 20)
    notice.touch()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "by the batch system; the same command resumes" in output
    assert outcome.read_text() == "preempted\n" and not (tmp_path / "run" / "DONE").exists()
    notice.unlink()
    code, output = run("accelerate", "launch", *arguments, **files)
    assert code == 0 and "resuming after step" in output
    assert outcome.read_text() == "done\n" and (tmp_path / "run" / "DONE").exists()
    # a wrong start leaves a run that is done as it is, and the batch script reads why
    code, output = run("accelerate", "launch", *arguments, "--optim.lr=1e-9", **files)
    assert code != 0 and outcome.read_text().startswith("failed: ")
    assert "optim.lr was 0.002 and is now 1e-09" in outcome.read_text()
    assert (tmp_path / "run" / "DONE").exists() and not (tmp_path / "run" / "FAILED").exists()


def test_stop_counts_before_the_start_and_before_other_reasons(
    digits: Path, tmp_path: Path
) -> None:
    directory, outcome = tmp_path / "run", tmp_path / "outcome"
    directory.mkdir()
    (directory / "STOP").touch()
    variables: dict[str, Any] = {
        "SGAN_OUTCOME": str(outcome),
        "SLURM_JOB_END_TIME": str(time.time()),
    }
    code, output = run("python", *training(digits, directory), **variables)
    assert code == 0 and "stopped after 0 of 150 steps by a STOP file" in output
    assert outcome.read_text() == "stopped\n" and not (directory / "STOP").exists()
    code, output = run("python", *training(digits, directory), **variables)
    assert code == 0 and "by the job's time limit" in output
    assert outcome.read_text() == "preempted\n"


def test_a_slow_step_is_reported_and_survived_and_a_hang_is_still_found() -> None:
    program = """
import time
from sgan_dist.run.watchdog import Watchdog
def slow(): time.sleep(3)
def hangs(): time.sleep(60)
try:
    with Watchdog(1) as watchdog:
        watchdog.step_done(1)
        raise ValueError
except ValueError:
    time.sleep(2)
with Watchdog(1) as watchdog:
    watchdog.step_done(2)
    slow()
    watchdog.step_done(3)
time.sleep(2)
print("the loops have ended", flush=True)
with Watchdog(1) as watchdog:
    watchdog.step_done(4)
    hangs()
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGALRM and done.stdout == "the loops have ended\n"
    assert re.findall(r"since step (\d)", done.stderr) == ["2", "4"]
    assert done.stderr.count("in slow") == 1 and "in hangs" in done.stderr
