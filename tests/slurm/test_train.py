"""launch/train.sbatch on two nodes: how runs end, and how they are requeued until they are done."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.commands import metrics, summary
from tests.ranks import REPOSITORY
from tests.slurm.cluster import PATH, Cluster
from tests.slurm.training import LONG, ONE_NODE, STEPS, Training, check_same, submit
from tests.wandb_server import WandbServer

OWN = "--model.discriminator=tests.own_models:"


@pytest.fixture
def server() -> Iterator[WandbServer]:
    server = WandbServer()
    yield server
    server.close()


@pytest.fixture(scope="module")
def crashing(cluster: Cluster, config: Path, tmp_path_factory: pytest.TempPathFactory) -> Training:
    """A job that crashes at every start. Submitted ahead, as it waits for requeues."""
    crash = (f"{OWN}Crashes", "--model.discriminator_args={}")
    run = tmp_path_factory.mktemp("runs") / "crashing"
    return Training(cluster, config, run, *crash, options=ONE_NODE)


@pytest.fixture(scope="module")
def limited(cluster: Cluster, config: Path, tmp_path_factory: pytest.TempPathFactory) -> Training:
    """A run longer than its job's time limit. Submitted ahead, as it mostly sleeps."""
    slow = (f"{OWN}TakesItsTime", "--model.discriminator_args={}", "--train.steps=130")
    # A signal without effect in place of that of the script: the run itself looks at the clock.
    options = (*ONE_NODE, "--time=1", "--signal=B:URG@1")
    run = tmp_path_factory.mktemp("runs") / "limited"
    return Training(cluster, config, run, *slow, options=options)


def test_a_run_on_two_nodes(straight: Training) -> None:
    job, content = straight.cluster.job(straight.number), summary(straight.run)
    assert (job["Restarts"], job["ExitCode"], job["NodeList"]) == ("0", "0:0", "n[1-2]")
    assert content["world_size"] == 2 and content["step"] == STEPS and content["restarts"] == 0
    assert "2 processes on 2 nodes" in straight.log
    assert [line["step"] for line in metrics(straight.run)] == list(range(5, STEPS + 1, 5))
    (start,) = straight.start_lines
    assert start["step"] == 0 and start["job"] == str(straight.number)
    assert start["nodes"] == "n[1-2]"


def test_an_early_signal_requeues_and_one_wandb_run_has_all(
    cluster: Cluster, config: Path, straight: Training, tmp_path: Path, server: WandbServer
) -> None:
    online: dict[str, Any] = {
        "WANDB_MODE": "online",
        "WANDB_BASE_URL": server.url,
        "WANDB_API_KEY": "0" * 40,
    }
    run = Training(cluster, config, tmp_path / "run", "--tracking.wandb=true", **online)
    run.wait_for_step(50)
    cluster.run("scancel", "--batch", "--signal=USR1", str(run.number))
    assert run.finish() == 1
    step = run.check_interrupted()
    assert f"stopped after {step} of {STEPS} steps by the batch system" in run.log
    assert f"is requeued from checkpoints/step-{step:08d}" in run.log
    assert "Traceback" not in run.log and "ChildFailedError" not in run.log
    check_same(run.run, straight.run)
    assert summary(run.run)["restarts"] == 1
    assert set(server.run_ids) == {(run.run / "wandb_id").read_text()}
    logged = [line["_step"] for line in server.history if "d/supervised" in line]
    assert logged == list(range(5, STEPS + 1, 5))


def test_a_stop_file_ends_the_job_and_the_next_resumes(
    cluster: Cluster, config: Path, straight: Training, tmp_path: Path
) -> None:
    first = Training(cluster, config, tmp_path)
    first.wait_for_step(50)
    (tmp_path / "STOP").touch()
    assert first.finish() == 0
    assert cluster.job(first.number)["ExitCode"] == "0:0"
    assert (
        "to resume the run, submit the same command again" in first.log
        and not (tmp_path / "DONE").exists()
    )
    second = Training(cluster, config, tmp_path)
    assert second.finish() == 0
    step = second.check_interrupted()
    assert f"stopped after {step} of {STEPS} steps by a STOP file" in first.log
    check_same(tmp_path, straight.run)


def test_a_cancelled_job_saves_and_stays_cancelled(
    cluster: Cluster, config: Path, tmp_path: Path
) -> None:
    run = Training(cluster, config, tmp_path, "--checkpoint.every=100000")
    run.wait_for_step(50)
    cluster.cancel(run.number)
    run.finish("CANCELLED")
    log = cluster.wait_for_log(run.number, "stopped after")
    latest = (tmp_path / "latest").read_text().strip()
    step = int(latest.rpartition("-")[2])
    assert 0 < step < STEPS and f"stopped after {step} of {STEPS} steps" in log
    clock = cluster.submit(
        script='#!/bin/bash\n((SLURM_RESTART_COUNT)) || scontrol requeue "$SLURM_JOB_ID"\n'
    )
    assert cluster.wait_for(clock, "COMPLETED")["Restarts"] == "1"  # so long a requeue takes
    job = cluster.job(run.number)
    assert (job["JobState"], job["Restarts"]) == ("CANCELLED", "0")
    assert "is requeued" not in run.log and run.starts == [0]


@pytest.mark.usefixtures("limited", "crashing")
def test_a_rank_that_hangs_is_shown_and_requeued(
    cluster: Cluster, config: Path, tmp_path: Path
) -> None:
    hang = (f"{OWN}HangsAtTheFirstStart", "--model.discriminator_args={}")
    run = Training(
        cluster, config, tmp_path, *hang, "--machine.step_timeout=8", "--checkpoint.every=5"
    )
    assert run.finish() == 1
    run.check_interrupted()
    for rank in (0, 1):
        assert run.log.count(f"rank {rank} hangs: 8 s without a step since step") == 1
    assert "in wait_for_nothing" in run.log  # where rank 1 is
    assert "in synchronize" in run.log or "all_reduce" in run.log  # and rank 0, which waits for it


def test_a_bad_setting_is_not_tried_again(cluster: Cluster, config: Path, tmp_path: Path) -> None:
    run = Training(cluster, config, tmp_path, "--optim.lr=-1", options=ONE_NODE)
    assert run.finish("FAILED") == 0
    assert cluster.job(run.number)["ExitCode"] == "1:0"
    reason = (tmp_path / "FAILED").read_text().strip()
    assert "optim.lr" in reason and f"ALERT: {tmp_path}: failed: {reason}\n" in run.log
    assert "is requeued" not in run.log


def test_conda_beside_a_venv_and_no_environment_at_all(
    cluster: Cluster, config: Path, tmp_path: Path
) -> None:
    bare = {"VIRTUAL_ENV": "", "PATH": PATH, "CONDA_PREFIX": "/opt/conda"}
    script = str(REPOSITORY / "launch" / "train.sbatch")
    command = (*ONE_NODE, str(config), f"--run_dir={tmp_path}/run", "--train.steps=5")
    number = submit(cluster, *command, script=script, cwd=tmp_path, **bare)
    assert cluster.wait_for(number, "FAILED")["Restarts"] == "0"
    assert "there is no accelerate on PATH" in (tmp_path / "run" / "FAILED").read_text()
    (tmp_path / ".venv").symlink_to(sys.prefix)
    number = submit(cluster, *command, script=script, cwd=tmp_path, **bare)
    cluster.wait_for(number, "COMPLETED", timeout=LONG)
    assert (tmp_path / "run" / "DONE").exists()


def test_a_run_that_makes_no_progress_is_given_up(crashing: Training) -> None:
    restarts, log = crashing.finish("FAILED"), crashing.log
    assert (restarts, crashing.cluster.job(crashing.number)["ExitCode"]) == (2, "1:0")
    assert log.count("RuntimeError: no such kernel") == 3 and log.count("is requeued") == 2
    assert log.count("ALERT") == 1
    assert f"two requeues of job {crashing.number} made no checkpoint" in log


def test_deepspeed_resumes_too(cluster: Cluster, config: Path, tmp_path: Path) -> None:
    run = Training(cluster, config, tmp_path, LAUNCHER="deepspeed")
    run.wait_for_step(50)
    cluster.run("scancel", "--batch", "--signal=USR1", str(run.number))
    assert run.finish() == 1
    run.check_interrupted()
    assert "DeepSpeed" in run.log and summary(run.run)["world_size"] == 2


def test_a_run_stops_before_its_time_limit(limited: Training) -> None:
    assert limited.finish() in (1, 2)
    assert limited.starts[0] == 0 and 0 < limited.starts[1] < 130
    message = f"stopped after {limited.starts[1]} of 130 steps by the job's time limit"
    assert message in limited.log and "TIME LIMIT" not in limited.log
