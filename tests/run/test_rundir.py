"""The run directory: one process at a time, DONE and FAILED, and where a refused command would run."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sgan_dist.config import load, parse
from sgan_dist.errors import TransientError, UserError
from sgan_dist.run import rundir
from tests.ranks import REPOSITORY

HOLD = """
import sys, time
from sgan_dist.config import parse
from sgan_dist.run import rundir
with rundir.claim(parse([f"--run_dir={sys.argv[1]}"])):
    print("claimed", flush=True)
    time.sleep(60)
"""


@pytest.mark.process
def test_a_claim_ends_with_its_process(tmp_path: Path) -> None:
    config = parse([f"--run_dir={tmp_path}"])
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], cwd=REPOSITORY, stdout=subprocess.PIPE
    )
    assert holder.stdout is not None and holder.stdout.readline() == b"claimed\n"
    assert rundir.in_use(tmp_path)
    with pytest.raises(TransientError, match="another process is training in"):
        rundir.claim(config).__enter__()
    rundir.mark_failed(tmp_path, "an error of the second process")
    assert not (tmp_path / "FAILED").exists()
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    assert not rundir.in_use(tmp_path)
    rundir.mark_failed(tmp_path, "an error")
    assert (tmp_path / "FAILED").read_text() == "an error\n"
    with rundir.claim(config):
        assert rundir.in_use(tmp_path) and not (tmp_path / "FAILED").exists()
    assert not rundir.in_use(tmp_path)


def test_looking_at_a_lock_creates_nothing(tmp_path: Path) -> None:
    assert not rundir.in_use(tmp_path) and list(tmp_path.iterdir()) == []
    assert not rundir.in_use(tmp_path / "absent") and not (tmp_path / "absent").exists()


def test_a_claim_writes_a_config_that_works_in_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = parse(["--run_dir=run", "--data.root=data/digits"])
    with rundir.claim(config):
        assert load(Path("run/config.yaml")).data.root == str(tmp_path / "data" / "digits")


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    config = parse([f"--run_dir={tmp_path}/file/run"])
    with pytest.raises(UserError, match="cannot write to the run directory"):
        rundir.claim(config).__enter__()


def test_a_longer_run_is_not_finished(tmp_path: Path) -> None:
    def config(steps: int):
        return parse([f"--run_dir={tmp_path}", f"--train.steps={steps}"])

    assert rundir.finished(config(10)) is None
    rundir.mark_done(tmp_path, {"step": 10})
    assert rundir.finished(config(10)) == rundir.finished(config(5)) == {"step": 10}
    assert rundir.finished(config(20)) is None and (tmp_path / "DONE").exists()
    with rundir.claim(config(20)):
        assert not (tmp_path / "DONE").exists()


def test_the_run_directory_of_a_refused_command(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("name: from_file\n")
    refused = "--optim.speed=1"
    for line, expected in (
        ([refused], "runs/digits"),
        ([f"--config={recipe}", refused], "runs/from_file"),
        (["--config", "mnist", refused], "runs/mnist"),
        ([f"--config={recipe}", "--name=other", refused], "runs/other"),
        ([f"--config={recipe}", "--name=other", "--run_dir", "elsewhere", refused], "elsewhere"),
        ([f"--config={tmp_path}/absent.yaml"], None),
        (["--run_dir"], None),
    ):
        directory = rundir.run_directory(line, "digits")
        assert directory == (None if expected is None else Path(expected)), line
    recipe.write_bytes(b"name: \xff\n")
    assert rundir.run_directory([f"--config={recipe}"]) is None
    recipe.write_text("[1, 2]")
    assert rundir.run_directory([f"--config={recipe}"]) is None


def test_starts_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert rundir.record_start(tmp_path, 0, {"world_size": 2}) == 0
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-2]")
    assert rundir.record_start(tmp_path, 20, {"world_size": 1}) == 1
    lines = (tmp_path / "starts.jsonl").read_text().splitlines()
    assert '"job"' not in lines[0] and '"job": "7", "nodes": "n[1-2]"' in lines[1]
