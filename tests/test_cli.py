"""The command line: every command's exit codes, equal entries, light imports, and the batch scripts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import sgan_dist
from sgan_dist.cli import main
from tests.commands import ON_CPU, TWO_RANKS, settings, summary, training, wait_for_step
from tests.ranks import REPOSITORY, environment, launch, run

HEAVY = ("torch", "numpy", "pydantic", "jsonargparse", "accelerate", "wandb")
COMMANDS = (
    "train", "plan", "prepare", "index", "evaluate", "report", "compare", "alert", "slurm",
)  # fmt: skip


def python(program: str, *arguments: str) -> str:
    """The output of a program in an interpreter of its own."""
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=REPOSITORY,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.process
def test_the_package_imports_nothing_heavy() -> None:
    loaded = f"import sys, sgan_dist; print([m for m in {HEAVY} if m in sys.modules])"
    assert python(loaded) == "[]\n"


@pytest.mark.process
@pytest.mark.parametrize("arguments", [("--help",), ("compare", "--help"), ("slurm", "--out=x y")])
def test_help_imports_nothing_heavy(arguments: tuple[str, ...]) -> None:
    program = f"""
import sys
from sgan_dist.cli import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    assert not end.code
print([m for m in {HEAVY} if m in sys.modules])
"""
    assert python(program, *arguments).endswith("[]\n")


def test_public_names_resolve() -> None:
    for name in sgan_dist.__all__:
        assert callable(getattr(sgan_dist, name)), name
        assert name in dir(sgan_dist)
    assert sgan_dist.evaluate.__name__ == "evaluate_run"
    with pytest.raises(AttributeError, match="has no attribute 'fit'"):
        _ = sgan_dist.fit


@pytest.mark.process
def test_help_names_the_commands_and_settings() -> None:
    code, output = run("sgan-dist", "--help")
    assert code == 0 and all(f"    {command} " in output for command in COMMANDS), output
    for command in COMMANDS:
        assert run("sgan-dist", command, "--help")[0] == 0
    for entry in (("sgan-dist", "train"), ("python", "launch/train.py")):
        code, output = run(*entry, "--help")
        assert code == 0 and "--batch.labeled" in output and "--machine.precision" in output
    assert run("sgan-dist", "--version") == (0, f"sgan_dist {sgan_dist.__version__}\n")


@pytest.mark.process
@pytest.mark.slow
def test_every_entry_trains_the_same(digits: Path, tmp_path: Path) -> None:
    entries = {
        "module": ("accelerate", "launch", "-m", "sgan_dist", "train"),
        "script": ("accelerate", "launch", "launch/train.py"),
        "python": ("python", "-m", "sgan_dist", "train"),
    }
    small = ("--train.steps=4", "--train.log_every=2", "--data.source=digits")
    hashes = set()
    for name, entry in entries.items():
        directory = tmp_path / name
        overrides = settings(digits, directory, *small)
        code, output = run(*entry, "--config", "digits", *overrides)
        assert code == 0 and f"summary     {directory}/summary.json" in output, output
        hashes.add(summary(directory)["weights_sha256"])
    assert len(hashes) == 1


def test_a_wrong_command_line_is_2(capsys: pytest.CaptureFixture[str]) -> None:
    for line in ([], ["trian"], ["index", "a.tar"], ["compare"], ["slurm"]):
        with pytest.raises(SystemExit) as end:
            main(line)
        assert end.value.code == 2 and "usage: sgan-dist" in capsys.readouterr().err, line


def test_an_error_of_the_user_is_2_and_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    absent, out = str(tmp_path / "absent"), str(tmp_path / "out")
    (tmp_path / "file").write_text("")
    splits = ["--labeled", absent, "--validation", absent, "--test", absent]
    for line in (
        ["plan", "--train.steps=-5"],
        ["plan", f"--data.root={absent}", "--data.source=null"],
        ["prepare", "--source=nothing", f"--out={out}"],
        ["index", absent, *splits, f"--out={out}"],
        ["evaluate", absent],
        ["report", absent],
        ["compare", absent],
        ["slurm", f"--out={tmp_path}/file/scripts"],
        ["slurm", f"--out={tmp_path}/with spaces"],
    ):
        assert main(line) == 2, line
        output = capsys.readouterr()
        assert output.out == "" and output.err.startswith("error: "), output
        assert output.err.count("\n") == 1 and "Traceback" not in output.err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.process
def test_the_error_of_all_ranks_is_printed_once(digits: Path, tmp_path: Path) -> None:
    bad = training(digits, tmp_path, "--model.discriminator=nothing")
    code, output = run(*TWO_RANKS, *bad, **ON_CPU)
    assert code != 0 and output.count("error: model.discriminator") == 1, output
    assert "sgan_dist/" not in output.split("error: model.discriminator")[0]  # no traceback before
    assert (tmp_path / "FAILED").exists()


@pytest.mark.process
def test_a_bug_keeps_its_traceback(digits: Path, tmp_path: Path) -> None:
    crash = ("--model.discriminator=tests.own_models:Crashes", "--model.discriminator_args={}")
    outcome = tmp_path / "outcome"
    directory = tmp_path / "run"
    code, output = run("python", *training(digits, directory, *crash), SGAN_OUTCOME=str(outcome))
    assert code == 1 and output.count("Traceback (most recent call last)") == 1, output
    assert "tests/own_models.py" in output and "RuntimeError: no such kernel" in output
    assert "error: " not in output.lower().replace("runtimeerror: ", "")
    # for a batch script it is as a kill: to be tried again
    assert not outcome.exists() and not (directory / "FAILED").exists()


@pytest.mark.process
@pytest.mark.parametrize(
    "entry",
    [
        ("python", "launch/train.py"),
        ("python", "-m", "sgan_dist", "train"),
        ("sgan-dist", "train"),
    ],
    ids=["script", "module", "command"],
)
def test_a_signal_during_the_heavy_imports_is_not_lost(
    entry: tuple[str, ...], digits: Path, tmp_path: Path
) -> None:
    process = launch(*entry, *settings(digits, tmp_path, "--train.steps=100000"))
    while not ignores_or_catches(process.pid, signal.SIGTERM):
        assert process.poll() is None
        time.sleep(0.001)
    libraries = Path(f"/proc/{process.pid}/maps").read_text()
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert "libtorch" not in libraries
    assert process.returncode == 143, output
    assert "stopped after 0 of 100000 steps by SIGTERM" in output


def ignores_or_catches(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal, as the kernel has it."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught, 16) >> (number - 1) & 1)


@pytest.mark.process
def test_a_second_signal_ends_at_once(digits: Path, tmp_path: Path) -> None:
    slow = ("--model.discriminator=tests.own_models:TakesItsTime", "--model.discriminator_args={}")
    process = launch("python", *training(digits, tmp_path, *slow, "--train.log_every=1"))
    wait_for_step(process, tmp_path, 10)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode in (-signal.SIGTERM, 143)  # 143: the kernel has merged them


@pytest.mark.process
def test_ctrl_c_interrupts_other_commands(tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare = ("prepare", "--source=digits", f"--out={out}", "--samples_per_shard=1")
    process = launch("python", "-m", "sgan_dist", *prepare)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not any(p.name != "out" for p in tmp_path.iterdir()):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "no partial dataset was left" in output, output
    assert "Traceback" not in output and not out.exists()


@pytest.mark.process
def test_an_unreachable_server_is_75(tmp_path: Path) -> None:
    url = "http://127.0.0.1:9/dataset"  # the discard port: nothing listens there
    outcome = tmp_path / "outcome"
    line = (f"--data.root={url}", "--remote.tries=1", f"--run_dir={tmp_path / 'run'}")
    for command in ("train", "plan"):
        code, output = run(
            "sgan-dist", command, *line, SGAN_OUTCOME=str(outcome), no_proxy="127.0.0.1"
        )
        assert code == 75 and output.count("error: ") == 1, output
    assert outcome.read_text() == "try again\n" and not (tmp_path / "run").exists()


def test_results_go_to_stdout_and_the_rest_to_stderr(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *settings(digits, tmp_path / "run")]) == 0
    output = capsys.readouterr()
    assert "3500 images" in output.out and output.err == ""
    assert main(["alert", str(tmp_path), "a reason"]) == 0
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.splitlines() == [
        f"ALERT: {tmp_path}: a reason",
        "not sent to W&B: it is offline or disabled for this run",
    ]


def test_slurm_writes_scripts_that_name_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["slurm", "--out", "batch/scripts"]) == 0
    names = ["train.sbatch", "sweep.sbatch", "sweep.yaml"]
    assert capsys.readouterr().out.splitlines() == [f"batch/scripts/{name}" for name in names]
    for name in names:
        text = (tmp_path / "batch" / "scripts" / name).read_text()
        template = (REPOSITORY / "launch" / name).read_text()
        assert "launch/" not in text
        assert text.replace("batch/scripts/", "launch/") == template
    sweep = (tmp_path / "batch/scripts/sweep.sbatch").read_text()
    assert "exec bash batch/scripts/train.sbatch" in sweep
    # what they call needs no clone
    train = (tmp_path / "batch/scripts/train.sbatch").read_text()
    assert "-m sgan_dist train" in train and "train.py" not in train


@pytest.mark.process
def test_a_written_sweep_starts_the_written_training(tmp_path: Path) -> None:
    assert run("sgan-dist", "slurm", f"--out={tmp_path}/scripts")[0] == 0
    (tmp_path / "scripts" / "train.sbatch").write_text('echo "$@"\n')
    done = subprocess.run(
        ["bash", "scripts/sweep.sbatch", "mnist", "--optim.lr=1e-3"],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "SLURM_ARRAY_TASK_ID": "1", "LABELS": "2", "SEEDS": "0 1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "--run_dir=runs/mnist-sweep/labels-2-seed-1" in done.stdout
