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

import psutil
import pytest

from sgan_dist.evaluation.classifier import load_classifier
from tests.commands import (
    ON_CPU,
    ONE_PROCESS,
    TWO_RANKS,
    kill_all,
    metrics,
    settings,
    summary,
    training,
    wait_for_step,
)
from tests.ranks import REPOSITORY, environment, launch, run

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def straight(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of an uninterrupted run by `accelerate launch`."""
    directory = tmp_path_factory.mktemp("runs") / "straight"
    code, output = run("accelerate", "launch", *training(digits, directory))
    assert code == 0, output
    assert "semi-supervised GAN" in output
    return directory


def test_a_finished_run_has_everything(straight: Path) -> None:
    content = summary(straight)
    assert content["step"] == 150 and content["images_seen"] == 150 * 24
    assert content["world_size"] == 1 and content["trained_on"] == "semi-supervised GAN"
    assert 0 < content["test_error"] < 0.9
    assert len(content["weights_sha256"]) == len(content["data_fingerprint"]) == 64
    assert content["versions"]["torch"] and content["wall_seconds"] > 0
    assert (straight / "DONE").exists() and not (straight / "FAILED").exists()
    assert {p.name for p in (straight / "samples").iterdir()} == {
        "step-00000100.png",
        "step-00000150.png",
    }
    assert [line["step"] for line in metrics(straight) if "d/fake" in line] == list(
        range(10, 151, 10)
    )
    classifier = load_classifier(straight / "classifier.safetensors")
    assert classifier.class_names == tuple(str(n) for n in range(10))


def test_the_supervised_baseline_is_a_run_of_its_own(digits: Path, tmp_path: Path) -> None:
    alone = settings(digits, tmp_path, "--train.supervised_only=true", "--train.steps=30")
    code, output = run("python", "-m", "sgan_dist", "train", *alone)
    assert code == 0 and "labeled images alone" in output, output
    content = summary(tmp_path)
    assert content["trained_on"] == "labeled images alone" and content["images_seen"] == 30 * 8
    assert 0 < content["test_error"] < 0.95
    assert not (tmp_path / "supervised").exists() and not (tmp_path / "samples").exists()


def test_a_second_start_says_that_it_is_done(straight: Path, digits: Path) -> None:
    before = summary(straight)
    code, output = run("python", *training(digits, straight))
    assert code == 0 and "is done" in output and "rm -r" in output
    assert summary(straight) == before


def test_evaluate_gives_the_same_error(straight: Path, digits: Path) -> None:
    evaluate = ("python", "-m", "sgan_dist", "evaluate", str(straight))
    code, output = run(*evaluate, "--split", "test", "--json")
    assert code == 0, output
    figures = json.loads(output)
    assert figures["error"] == pytest.approx(summary(straight)["test_error"])
    assert figures["images"] == sum(map(sum, figures["confusion"])) == 1000
    code, output = run(*evaluate, "--split", "validation")
    assert code == 0 and "500" in output and "calibration error" in output


@pytest.mark.parametrize("moment", range(3))
def test_kill_at_a_random_moment_and_resume(
    moment: int, straight: Path, digits: Path, tmp_path: Path
) -> None:
    process = launch("python", *training(digits, tmp_path, "--train.steps=150"))
    wait_for_step(process, tmp_path, random.choice(range(10, 140, 10)))
    time.sleep(random.random() * 0.1)
    kill_all(process)
    assert not (tmp_path / "DONE").exists()
    code, output = run("python", *training(digits, tmp_path))
    assert code == 0, output
    assert summary(tmp_path)["weights_sha256"] == summary(straight)["weights_sha256"]
    assert metrics(tmp_path) == metrics(straight)


def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(
    straight: Path, digits: Path, tmp_path: Path
) -> None:
    every = "--checkpoint.every=1"
    process = launch("python", *training(digits, tmp_path, every, "--train.steps=150"))
    wait_for_step(process, tmp_path, 20)
    checkpoints, trainer = tmp_path / "checkpoints", psutil.Process(process.pid)
    while process.poll() is None:
        trainer.suspend()  # else the write could end between this look and the kill
        while trainer.status() != psutil.STATUS_STOPPED:
            time.sleep(0.001)
        if list(checkpoints.glob(".partial-*/state.pt")):
            break
        trainer.resume()
        time.sleep(0.005)
    kill_all(process)
    assert list(checkpoints.glob(".partial-*"))
    code, output = run("python", *training(digits, tmp_path))
    assert code == 0 and "resuming after step" in output, output
    assert not list(checkpoints.glob(".partial-*"))
    assert summary(tmp_path)["weights_sha256"] == summary(straight)["weights_sha256"]
    assert metrics(tmp_path) == metrics(straight)


def test_a_checkpoint_that_cannot_be_written_ends_the_run(digits: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file is in the way")
    code, output = run("python", *training(digits, tmp_path, "--checkpoint.every=10"))
    assert code == 75 and output.count("error: cannot write checkpoint") == 1, output
    assert "step  30/" not in output  # it is known at the next save


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_ends(
    number: signal.Signals, expected: int, straight: Path, digits: Path, tmp_path: Path
) -> None:
    process = launch("python", *training(digits, tmp_path, "--checkpoint.every=1000"))
    wait_for_step(process, tmp_path, 30)
    process.send_signal(number)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == expected, output
    assert f"of 150 steps by {number.name}; the same command resumes the run" in output
    code, output = run("python", *training(digits, tmp_path))
    assert code == 0 and "resuming after step" in output
    assert summary(tmp_path)["weights_sha256"] == summary(straight)["weights_sha256"]


def test_the_bar_fits_a_terminal(digits: Path, tmp_path: Path) -> None:
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    arguments = training(digits, tmp_path, "--train.steps=30", "--train.evaluate_every=10")
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=REPOSITORY,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=terminal,
        text=True,
    )
    os.close(terminal)
    screen = b""
    with contextlib.suppress(OSError):  # the other side of a terminal is gone: an error on Linux
        while piece := os.read(controller, 4096):
            screen += piece
    results, _ = process.communicate()
    assert process.returncode == 0 and "semi-supervised GAN" in results
    bars = [line for line in re.split(r"[\r\n]", screen.decode()) if line.startswith("30/30")]
    assert bars and len(bars[-1].rstrip()) <= 80
    assert "eta" in bars[-1]
    # the lines of a log file are printed above the bar
    for part in ("images/s", "data wait", "supervised", "unlabeled", "fake", "generator", "error"):
        assert part in screen.decode()


def test_a_stop_file_saves_and_ends(digits: Path, tmp_path: Path) -> None:
    process = launch("python", *training(digits, tmp_path, "--train.steps=100000"))
    wait_for_step(process, tmp_path, 10)
    (tmp_path / "STOP").touch()
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 0 and "of 100000 steps by a STOP file" in output
    assert not (tmp_path / "STOP").exists() and not (tmp_path / "DONE").exists()
    assert (tmp_path / "latest").exists()


def test_two_ranks_by_the_documented_command(digits: Path, tmp_path: Path) -> None:
    arguments = training(digits, tmp_path, "--machine.world_size=2", "--train.steps=60")
    process = launch(*TWO_RANKS, *arguments, **ON_CPU)
    wait_for_step(process, tmp_path, 30)
    kill_all(process)
    code, output = run(*TWO_RANKS, *arguments, **ON_CPU)
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
    arguments = training(digits, tmp_path, "--train.steps=100000")
    process = launch(*launcher, *arguments, **(ON_CPU if launcher is TWO_RANKS else {}))
    wait_for_step(process, tmp_path, 10)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    process.communicate(timeout=60)
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert alive == []
    assert (tmp_path / "latest").exists()  # it saved before it went


def test_the_silent_single_process_of_accelerate_is_refused(digits: Path, tmp_path: Path) -> None:
    two = ("accelerate", "launch", "--cpu", "--num_processes", "2")
    code, output = run(*two, *training(digits, tmp_path))
    assert code != 0 and output.count("error: ") == 1
    assert "started a single one" in output and "--multi_gpu --num_processes" in output
    assert "--multi_gpu" in (tmp_path / "FAILED").read_text()


def test_another_world_than_asked_for_is_refused(digits: Path, tmp_path: Path) -> None:
    code, output = run("python", *training(digits, tmp_path, "--machine.world_size=2"))
    assert code == 2 and "machine.world_size" in output and "the launcher started 1" in output


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--optim.speed=1", "there is no setting optim.speed"),
        ("--data.root=nowhere", "prepare one with `sgan-dist prepare --source"),
        ("--train.steps=-5", "train.steps is -5"),
        ("--model.discriminator=nothing", "take one of"),
        ("--model.discriminator_args.depth=3", "model.discriminator_args do not fit DCGAN"),
        ("--data.label_seed=4", "data.label_seed 0, and the config asks for 4"),
        ("--data.source=idx:elsewhere", "data.source digits, and the config asks for"),
    ],
)
def test_errors_are_one_sentence(override: str, message: str, digits: Path, tmp_path: Path) -> None:
    source = ["--data.source=digits"] if "label_seed" in override else []
    code, output = run("python", *training(digits, tmp_path, *source, override))
    assert code == 2 and output.count("error: ") == 1 and message in output, output
    assert "Traceback" not in output
    assert message in (tmp_path / "FAILED").read_text() and not (tmp_path / "DONE").exists()


def test_a_place_that_can_not_be_written_is_explained(digits: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, output = run("python", *training(digits, tmp_path / "file" / "run"))
    assert code == 2 and "cannot write to the run directory" in output and "--run_dir" in output
    assert "Traceback" not in output


def test_another_configuration_is_refused_in_the_same_directory(
    straight: Path, digits: Path
) -> None:
    code, output = run("python", *training(digits, straight, "--seed=5"))
    assert code == 2 and "seed was 0 and is now 5" in output
    assert not (straight / "FAILED").exists()


def test_a_run_directory_has_one_run_at_a_time(digits: Path, tmp_path: Path) -> None:
    first = launch("python", *training(digits, tmp_path, "--train.steps=100000"))
    wait_for_step(first, tmp_path, 10)
    code, output = run("python", *training(digits, tmp_path))
    assert code == 75 and "another process is training" in output
    assert first.poll() is None and not (tmp_path / "FAILED").exists()
    # nor does an error of the second mark the first as failed
    assert run("python", *training(digits, tmp_path, "--train.steps=-5"))[0] == 2
    assert first.poll() is None and not (tmp_path / "FAILED").exists()
    kill_all(first)


def test_plan_says_what_would_run(digits: Path, tmp_path: Path) -> None:
    plan = ("python", "-m", "sgan_dist", "plan")
    code, output = run(*plan, *settings(digits, tmp_path / "none"))
    assert code == 0 and "3500 images" in output and "full order" in output, output
    assert not (tmp_path / "none").exists()
    code, output = run(*plan, f"--data.root={tmp_path}/absent", "--data.source=digits")
    assert code == 0 and "a run first prepares digits" in output
    assert not (tmp_path / "absent").exists()
    bad = settings(digits, tmp_path / "none", "--model.discriminator=nothing")
    code, output = run(*plan, *bad)
    assert code == 2 and "take one of" in output and not (tmp_path / "none").exists()


def test_a_full_disk_is_explained_and_the_last_checkpoint_kept(
    digits: Path, tmp_path: Path
) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1500k", "none", str(small)])
    if os.geteuid() != 0 or mounted.returncode != 0:
        pytest.skip("only root can mount a small disk")
    try:
        arguments = training(digits, small / "run", "--train.steps=100", "--checkpoint.keep=100")
        code, output = run("python", *arguments)
        assert code == 75 and "free some space" in output, output
        assert not (small / "run" / "FAILED").exists()  # a batch system is to try again
        checkpoints = sorted((small / "run" / "checkpoints").glob("step-*"))
        assert checkpoints
        for path in checkpoints[1:]:
            subprocess.run(["rm", "-r", str(path)], check=True)
        # with room again, the same command continues
        code, output = run("python", *arguments[:-1], "--checkpoint.keep=1", "--train.steps=60")
        assert code == 0 and "resuming after step" in output, output
    finally:
        subprocess.run(["umount", str(small)], check=True)
