"""What people do to a run: shells with leftovers, closed terminals, pipes, suspension, home folders."""

from __future__ import annotations

import os
import pty
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from sgan_dist.errors import UserError
from sgan_dist.parallel import launcher
from tests.commands import ON_CPU, TWO_RANKS, starts, summary, training, wait_for_step
from tests.ranks import REPOSITORY, environment, free_port, launch, run

SLOW = (
    "--model.discriminator=tests.own_models:TakesItsTime",
    "--model.discriminator_args={}",
    "--train.log_every=10",
)


@contextmanager
def shell(line: str, **more: str | None) -> Iterator[subprocess.Popen[str]]:
    """A command line of bash in the repository, with all its processes ended afterwards."""
    process = launch("/bin/bash", "-c", line, **more)
    try:
        yield process
    finally:
        with_group(process, signal.SIGKILL)
        process.communicate(timeout=30)


def with_group(process: subprocess.Popen[str], number: signal.Signals) -> None:
    """Signals a command and what it has started, if any of that is left."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def python(*arguments: str) -> str:
    return shlex.join([sys.executable, *arguments])


def wait_for(path: Path, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} was not written"
        time.sleep(0.1)


@pytest.mark.parametrize("slurm", [pytest.param(False, marks=pytest.mark.slow), True])
def test_leftover_variables_are_named_and_ctrl_c_ends_the_wait(
    slurm: bool, digits: Path, tmp_path: Path
) -> None:
    port = str(free_port())
    variables: dict[str, Any] = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    if slurm:  # a shell of `srun --ntasks=2 --pty bash`
        variables |= {
            "SLURM_JOB_ID": "7",
            "SLURM_STEP_ID": "0",
            "SLURM_PROCID": "0",
            "SLURM_LOCALID": "0",
            "SLURM_STEP_NUM_TASKS": "2",
            "SLURM_STEP_NODELIST": "node1",
        }
        expected = ("SLURM_PROCID and SLURM_STEP_NUM_TASKS are set (srun)", "unset SLURM_PROCID")
    else:
        variables |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
        expected = ("RANK and WORLD_SIZE are set", "unset RANK LOCAL_RANK WORLD_SIZE MASTER_ADDR")
    process = launch("python", *training(digits, tmp_path), **variables)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert f"waits for the others of 2 processes, at 127.0.0.1:{port}" in line
        assert all(text in line for text in expected)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == -signal.SIGINT
    finally:
        process.kill()
        process.communicate(timeout=30)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "but not LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": "2"}, "has WORLD_SIZE, but not RANK"),
        (dict.fromkeys(launcher.RANK_VARIABLES, "1"), "RANK is 1 and WORLD_SIZE is 1"),
        (dict.fromkeys(launcher.RANK_VARIABLES, "x"), "LOCAL_RANK is x"),
        (dict.fromkeys(launcher.RANK_VARIABLES, "1") | {"MASTER_PORT": "x"}, "MASTER_PORT is x"),
        (dict.fromkeys(launcher.RANK_VARIABLES, "1") | {"RANK": "-1"}, "RANK is -1"),
    ],
)
def test_partial_variables_are_refused(variables: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        launcher.check_variables(variables)
    launcher.check_variables({"WORLD_SIZE": "1", "MASTER_PORT": "29500"})


def test_incomplete_variables_are_named_on_any_rank() -> None:
    code, output = run("sgan-dist", "plan", RANK="1", WORLD_SIZE="2")
    assert code == 2 and "but not LOCAL_RANK, MASTER_ADDR, MASTER_PORT" in output, output


@pytest.mark.slow
def test_a_variable_exported_in_a_shell_is_no_launcher(digits: Path, tmp_path: Path) -> None:
    """The shell ends, and the run in the background continues."""
    command = python(*training(digits, tmp_path, *SLOW, "--train.steps=20"))
    line = f"export ACCELERATE_MIXED_PRECISION=no; {command} > {tmp_path}/log 2>&1 & sleep 1"
    with shell(line) as process:
        assert process.wait(30) == 0
        wait_for(tmp_path / "DONE")
    assert summary(tmp_path)["step"] == 20


@pytest.mark.parametrize(
    "number", [signal.SIGHUP, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)]
)
def test_a_closed_terminal_and_a_batch_systems_warning_stop_a_run(
    number: signal.Signals, digits: Path, tmp_path: Path
) -> None:
    options = (*SLOW, "--train.steps=1000")
    process = launch("python", *training(digits, tmp_path, *options))
    wait_for_step(process, tmp_path, 10)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, output
    assert f"by {number.name}; the same command resumes the run" in output
    assert (tmp_path / "latest").exists()


@pytest.mark.parametrize(("ignored", "code"), [(True, 0), (False, 129)], ids=["nohup", "plain"])
def test_a_terminal_closes(ignored: bool, code: int, digits: Path, tmp_path: Path) -> None:
    """It sends HUP, and what is written to it fails from then on."""
    command = python(*training(digits, tmp_path, *SLOW, "--train.steps=30"))
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(REPOSITORY)
        trap = "trap '' HUP; " if ignored else ""
        os.execvpe("bash", ["bash", "-c", f"{trap}exec {command}"], environment())
    wait_for(tmp_path / "metrics.jsonl")
    while not (tmp_path / "metrics.jsonl").read_text():
        time.sleep(0.1)
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == code
    assert (tmp_path / "DONE").exists() == ignored and (tmp_path / "latest").exists()


@pytest.mark.slow
def test_nohup_keeps_a_run(digits: Path, tmp_path: Path) -> None:
    command = python(*training(digits, tmp_path, *SLOW, "--train.steps=30"))
    with shell(f"exec nohup {command} > {tmp_path}/log 2>&1") as process:
        wait_for_step(process, tmp_path, 10)
        process.send_signal(signal.SIGHUP)
        assert process.wait(120) == 0
    assert summary(tmp_path)["step"] == 30


@pytest.mark.parametrize(
    "redirection", ["2>&1 | head -n 1", pytest.param(">&- 2>&-", marks=pytest.mark.slow)]
)
def test_a_run_outlives_the_readers_of_its_output(
    redirection: str, digits: Path, tmp_path: Path
) -> None:
    command = python(*training(digits, tmp_path, "--train.steps=50"))
    with shell(f"{command} {redirection}; echo ${{PIPESTATUS[0]}}") as process:
        output, _ = process.communicate(timeout=120)
    assert output.splitlines()[-1] == "0"
    assert (tmp_path / "DONE").exists() and summary(tmp_path)["step"] == 50


@pytest.mark.slow
def test_a_suspended_run_goes_on(digits: Path, tmp_path: Path) -> None:
    options = (*SLOW, "--train.steps=60", "--machine.step_timeout=3")
    process = launch(*TWO_RANKS, *training(digits, tmp_path, *options), **ON_CPU)
    wait_for_step(process, tmp_path, 10)
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        member.suspend()
    time.sleep(20)  # longer than a hang would live
    for member in family:
        member.resume()
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "hangs" not in output, output
    assert len(starts(tmp_path)) == 1 and summary(tmp_path)["step"] == 60


def test_the_home_folder_is_found(tmp_path: Path) -> None:
    """In options, where no shell expands it; the dataset is made and read there."""
    train = ("train", "--config=~/own.yaml", "--train.steps=2")
    home: dict[str, Any] = {"HOME": str(tmp_path)}
    (tmp_path / "own.yaml").write_text(
        "name: own\ndata: {root: ~/data, source: digits}\nrun_dir: ~/runs/own\n"
    )
    code, output = run("sgan-dist", *train, **home)
    assert code == 0, output
    assert summary(tmp_path / "runs" / "own")["step"] == 2
    assert (tmp_path / "data" / "index.json").exists() and not (REPOSITORY / "~").exists()
    code, output = run("sgan-dist", "evaluate", "~/runs/own", **home)
    assert code == 0 and "test split" in output
