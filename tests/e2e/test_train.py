"""The command line as users run it: start, finish, stop, kill, resume, and errors."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import random
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from sgan_dist.export import load_classifier
from tests.ranks import REPOSITORY, environment, launch, run

ONE_PROCESS = ("accelerate", "launch")
TWO_RANKS = ("accelerate", "launch", "--multi_gpu", "--num_processes", "2")


def command(root: Path, directory: Path, *overrides: str) -> list[str]:
    """A small run on a prepared dataset."""
    return [
        "launch/train.py",
        f"--data.root={root}",
        "--data.source=null",
        f"--run_dir={directory}",
        "--name=small",
        "--data.labeled_batch=8",
        "--data.unlabeled_batch=16",
        "--train.fake_batch=8",
        '--model.discriminator_args={"width": 4}',
        '--model.generator_args={"width": 4}',
        "--train.steps=150",
        "--train.baseline_steps=0",
        "--train.log_every=10",
        "--train.evaluate_every=0",
        "--train.sample_every=100",
        "--checkpoint.every=20",
        *overrides,
    ]


def summary(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "summary.json").read_text())  # type: ignore[no-any-return]


def metrics(directory: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]


def kill_all(process: subprocess.Popen[str], number: int = signal.SIGKILL) -> str:
    """Signals a command and all its descendants; returns what it had said."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        member.send_signal(number)
    return process.communicate(timeout=60)[0]


def wait_for_step(process: subprocess.Popen[str], directory: Path, step: int) -> None:
    """Waits until metrics.jsonl has reached `step`."""
    path = directory / "metrics.jsonl"
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        lines = path.read_text().splitlines() if path.exists() else []
        if len(lines) * 10 >= step:
            return
        if process.poll() is not None:
            raise AssertionError(f"ended before step {step}:\n{process.communicate()[0]}")
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached:\n{kill_all(process)}")


@pytest.fixture(scope="module")
def straight(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run by `accelerate launch`, with its supervised baseline."""
    directory = tmp_path_factory.mktemp("runs") / "straight"
    code, output = run(
        "accelerate", "launch", *command(digits, directory, "--train.baseline_steps=30")
    )
    assert code == 0, output
    assert "semi-supervised GAN" in output and "labeled images alone" in output
    return directory


def test_a_finished_run_has_everything(straight: Path) -> None:
    found = summary(straight)
    assert found["step"] == 150 and found["images_seen"] == 150 * 24 and found["world_size"] == 1
    assert 0 < found["test_error"] < 0.9 and 0 < found["supervised_test_error"] < 0.95
    assert len(found["weights_sha256"]) == len(found["data_fingerprint"]) == 64
    assert found["versions"]["torch"] and found["wall_seconds"] > 0
    assert (straight / "DONE").exists() and not (straight / "FAILED").exists()
    assert {p.name for p in (straight / "samples").iterdir()} == {
        "step-00000100.png",
        "step-00000150.png",
    }
    assert [line["step"] for line in metrics(straight) if "d/fake" in line] == list(
        range(10, 151, 10)
    )
    _, about = load_classifier(straight / "classifier.safetensors")
    assert about["class_names"] == [str(n) for n in range(10)]


def test_a_second_start_says_that_it_is_done(straight: Path, digits: Path) -> None:
    before = summary(straight)
    code, output = run("python", *command(digits, straight, "--train.baseline_steps=30"))
    assert code == 0 and "is done" in output and "rm -r" in output
    assert summary(straight) == before


def test_evaluate_finds_the_same_error(straight: Path, digits: Path) -> None:
    code, output = run("python", "launch/evaluate.py", str(straight), "--split", "test", "--json")
    assert code == 0, output
    found = json.loads(output)
    assert found["error"] == pytest.approx(summary(straight)["test_error"])
    assert found["images"] == sum(map(sum, found["confusion"])) == 1000
    code, output = run("python", "launch/evaluate.py", str(straight), "--split", "validation")
    assert code == 0 and "500" in output and "calibration error" in output


@pytest.mark.parametrize("moment", range(3))
def test_kill_at_a_random_moment_and_resume(
    moment: int, straight: Path, digits: Path, tmp_path: Path
) -> None:
    process = launch("python", *command(digits, tmp_path, "--train.steps=150"))
    wait_for_step(process, tmp_path, random.choice(range(10, 140, 10)))
    time.sleep(random.random() * 0.1)
    kill_all(process)
    assert not (tmp_path / "DONE").exists()
    code, output = run("python", *command(digits, tmp_path))
    assert code == 0, output
    assert summary(tmp_path)["weights_sha256"] == summary(straight)["weights_sha256"]
    assert metrics(tmp_path) == metrics(straight)


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_ends(
    number: signal.Signals, expected: int, straight: Path, digits: Path, tmp_path: Path
) -> None:
    process = launch("python", *command(digits, tmp_path, "--checkpoint.every=1000"))
    wait_for_step(process, tmp_path, 30)
    process.send_signal(number)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == expected and "same command goes on" in output
    code, output = run("python", *command(digits, tmp_path))
    assert code == 0 and "resuming after step" in output
    assert summary(tmp_path)["weights_sha256"] == summary(straight)["weights_sha256"]


@pytest.mark.slow
def test_a_kill_in_the_baseline_costs_the_baseline_alone(digits: Path, tmp_path: Path) -> None:
    arguments = command(digits, tmp_path, "--train.steps=20", "--train.baseline_steps=200")
    process = launch("python", *arguments)
    wait_for_step(process, tmp_path / "supervised", 50)
    kill_all(process)
    before = metrics(tmp_path)
    code, output = run("python", *arguments)
    assert code == 0 and output.count("resuming after step") == 2, output
    assert metrics(tmp_path) == before and summary(tmp_path)["supervised_test_error"] < 0.95


def test_the_bar_fits_a_terminal(digits: Path, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    arguments = command(digits, tmp_path, "--train.steps=30", "--train.evaluate_every=10")
    python = Path(sys.executable)
    process = subprocess.Popen(
        [python, *arguments], cwd=REPOSITORY, env=environment(), stderr=theirs, text=True
    )
    os.close(theirs)
    seen = b""
    with contextlib.suppress(OSError):  # the other side of a terminal is gone: an error on Linux
        while piece := os.read(ours, 4096):
            seen += piece
    assert process.wait() == 0
    bars = [line for line in re.split(r"[\r\n]", seen.decode()) if line.startswith("30/30")]
    assert bars and len(bars[-1].rstrip()) <= 80
    for part in ("eta", "/s", "wait", "sup", "unl", "fake", "con", "gen"):
        assert part in bars[-1]


def test_a_stop_file_saves_and_ends(digits: Path, tmp_path: Path) -> None:
    process = launch("python", *command(digits, tmp_path, "--train.steps=100000"))
    wait_for_step(process, tmp_path, 10)
    (tmp_path / "STOP").touch()
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 0 and "stopped after" in output
    assert not (tmp_path / "STOP").exists() and (tmp_path / "latest").exists()


def test_two_ranks_by_the_documented_command(digits: Path, tmp_path: Path) -> None:
    two = {"ACCELERATE_USE_CPU": "true"}
    arguments = command(digits, tmp_path, "--train.world_size=2", "--train.steps=60")
    process = launch(*TWO_RANKS, *arguments, **two)
    wait_for_step(process, tmp_path, 30)
    kill_all(process)
    code, output = run(*TWO_RANKS, *arguments, **two)
    assert code == 0 and "2 processes on 1 node" in output and "resuming after step" in output, (
        output
    )
    assert summary(tmp_path)["world_size"] == 2


@pytest.mark.parametrize(
    ("launcher", "number"),
    [
        (ONE_PROCESS, signal.SIGKILL),
        (TWO_RANKS, signal.SIGTERM),
        pytest.param(ONE_PROCESS, signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(TWO_RANKS, signal.SIGKILL, marks=pytest.mark.slow),
    ],
)
def test_a_launcher_that_ends_leaves_no_worker_behind(
    launcher: tuple[str, ...], number: signal.Signals, digits: Path, tmp_path: Path
) -> None:
    arguments = command(digits, tmp_path, "--train.steps=100000")
    cpu = {"ACCELERATE_USE_CPU": "true"} if launcher is TWO_RANKS else {}
    process = launch(*launcher, *arguments, **cpu)
    wait_for_step(process, tmp_path, 10)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    process.communicate(timeout=60)
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert alive == []
    assert (tmp_path / "latest").exists()  # it saved before it went


def test_the_silent_single_process_of_accelerate_is_refused(digits: Path, tmp_path: Path) -> None:
    code, output = run(
        "accelerate", "launch", "--cpu", "--num_processes", "2", *command(digits, tmp_path)
    )
    assert code != 0 and output.count("error: ") == 1
    assert "started a single one" in output and "--multi_gpu --num_processes" in output
    assert "--multi_gpu" in (tmp_path / "FAILED").read_text()


def test_another_world_than_asked_for_is_refused(digits: Path, tmp_path: Path) -> None:
    code, output = run("python", *command(digits, tmp_path, "--train.world_size=2"))
    assert code == 2 and "asks for 2 processes, and the launcher started 1" in output


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("--optim.speed=1", "unrecognized arguments: --optim.speed=1"),
        ("--data.root=nowhere", "prepare_shards.py"),
        ("--train.steps=-5", "train.steps is -5"),
        ("--model.discriminator=nothing", "take one of"),
        ("--model.discriminator_args.depth=3", "do not fit"),
        ("--data.label_seed=4", "data.label_seed 0, and the config asks for 4"),
        ("--data.source=idx:elsewhere", "data.source digits, and the config asks for"),
    ],
)
def test_errors_are_one_sentence(override: str, says: str, digits: Path, tmp_path: Path) -> None:
    source = ["--data.source=digits"] if "label_seed" in override else []
    code, output = run("python", *command(digits, tmp_path, *source, override))
    assert code == 2 and output.count("error: ") == 1 and says in output, output
    assert "Traceback" not in output
    assert says in (tmp_path / "FAILED").read_text() and not (tmp_path / "DONE").exists()


def test_a_place_that_can_not_be_written_is_explained(digits: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, output = run("python", *command(digits, tmp_path / "file" / "run"))
    assert code == 2 and "can't write to the run directory" in output and "--run_dir" in output
    assert "Traceback" not in output


def test_another_configuration_is_refused_in_the_same_directory(
    straight: Path, digits: Path
) -> None:
    code, output = run("python", *command(digits, straight, "--seed=5"))
    assert code == 2 and "seed was 0 and is now 5" in output
    assert not (straight / "FAILED").exists()


def test_a_run_directory_has_one_run_at_a_time(digits: Path, tmp_path: Path) -> None:
    first = launch("python", *command(digits, tmp_path, "--train.steps=100000"))
    wait_for_step(first, tmp_path, 10)
    code, output = run("python", *command(digits, tmp_path))
    assert code == 75 and "another process is training" in output
    assert first.poll() is None and not (tmp_path / "FAILED").exists()
    kill_all(first)


def test_dry_run_says_what_would_run(digits: Path, tmp_path: Path) -> None:
    code, output = run("python", *command(digits, tmp_path / "none", "--dry_run"))
    assert code == 0 and "3500 images" in output and "full order" in output
    assert not (tmp_path / "none").exists()
    absent = (f"--data.root={tmp_path}/absent", "--data.source=digits", "--dry_run")
    code, output = run("python", "launch/train.py", *absent)
    assert code == 0 and "a run first prepares digits" in output
    assert not (tmp_path / "absent").exists()
    bad = command(digits, tmp_path / "none", "--dry_run", "--model.discriminator=nothing")
    assert run("python", *bad)[0] == 2


def test_a_full_disk_is_explained_and_the_last_checkpoint_kept(
    digits: Path, tmp_path: Path
) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1500k", "none", str(small)])
    if os.geteuid() != 0 or mounted.returncode != 0:
        pytest.skip("only root can mount a small disk")
    try:
        arguments = command(digits, small / "run", "--train.steps=100", "--checkpoint.keep=100")
        code, output = run("python", *arguments)
        assert code == 75 and "free some space" in output, output
        assert not (small / "run" / "FAILED").exists()  # a batch system is to try again
        kept = sorted((small / "run" / "checkpoints").glob("step-*"))
        assert kept
        for path in kept[1:]:
            subprocess.run(["rm", "-r", str(path)], check=True)
        # with room again, the same command goes on
        code, output = run("python", *arguments[:-1], "--checkpoint.keep=1", "--train.steps=60")
        assert code == 0 and "resuming after step" in output, output
    finally:
        subprocess.run(["umount", str(small)], check=True)
