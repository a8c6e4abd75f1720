"""launch/train.sbatch when it loses a process, a node, or both nodes to another job."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.commands import metrics, summary
from tests.slurm.cluster import Cluster
from tests.slurm.training import LONG, ONE_NODE, STEPS, Training, check_same


def kill_worker(run: Training) -> None:
    (worker,) = run.processes("n1", "sgan_dist", "train", "-u")
    worker.send_signal(signal.SIGKILL)


def kill_launcher(run: Training) -> None:
    (launcher,) = run.processes("n2", "sgan_dist", "train", "accelerate")
    launcher.send_signal(signal.SIGKILL)


def kill_node(run: Training) -> None:
    """The node is back at once, so that SLURM itself notices nothing."""
    run.cluster.kill_node("n2")
    run.cluster.start_node("n2")


@pytest.mark.parametrize("kill", [kill_worker, kill_launcher, kill_node])
def test_what_is_killed_comes_back(
    kill: Callable[[Training], None],
    cluster: Cluster,
    config: Path,
    straight: Training,
    tmp_path: Path,
) -> None:
    run = Training(cluster, config, tmp_path)
    run.wait_for_step(50)
    kill(run)
    assert run.finish() >= 1
    # from a checkpoint; the workers of a dead launcher save once more, if they are in time
    assert run.check_interrupted() % 20 == 0 or kill is kill_launcher
    check_same(tmp_path, straight.run)


def test_a_run_continues_with_the_nodes_that_are_left(
    cluster: Cluster, config: Path, tmp_path: Path
) -> None:
    """One node takes the batches of two, sample by sample: in fp64 the difference is rounding."""
    fp64 = "--machine.precision=fp64"
    two = Training(cluster, config, tmp_path / "two", fp64)
    two.finish()
    run = Training(cluster, config, tmp_path / "run", fp64, options=("--nodes=1-2",))
    run.wait_for_step(50)
    try:
        cluster.kill_node("n2")
        assert run.finish() >= 1
    finally:
        cluster.start_node("n2")
        cluster.wait_for_node("n2", "idle")
    run.check_interrupted()
    worlds = [(start["nodes"], start["world_size"]) for start in run.start_lines]
    assert worlds == [("n[1-2]", 2), ("n1", 1)]
    assert summary(run.run)["world_size"] == 1
    weights, expected = (load_file(r.run / "classifier.safetensors") for r in (run, two))
    assert weights.keys() == expected.keys()
    assert max((weights[name] - expected[name]).abs().max().item() for name in weights) < 1e-9
    for line, other in zip(metrics(run.run), metrics(two.run), strict=True):
        assert line == pytest.approx(other, abs=1e-9)


def test_a_crash_after_the_signal_is_requeued_too(
    cluster: Cluster, config: Path, tmp_path: Path
) -> None:
    own = "--model.discriminator=tests.own_models:CrashesWhenToldToLeave"
    options = (own, "--model.discriminator_args={}", "--checkpoint.every=5")
    run = Training(cluster, config, tmp_path, *options, options=ONE_NODE)
    cluster.wait_for_log(run.number, "waits to be told", timeout=LONG)
    cluster.run("scancel", "--batch", "--signal=USR1", str(run.number))
    assert run.finish() == 1
    assert run.check_interrupted() % 5 == 0  # from a checkpoint before the crash
    assert "RuntimeError: out of memory" in run.log and "stopped after" not in run.log


@pytest.mark.parametrize("partition", ["requeue", "cancel"])
def test_a_preempted_run_comes_back(
    partition: str, cluster: Cluster, config: Path, straight: Training, tmp_path: Path
) -> None:
    options = ("--nodes=2", f"--partition={partition}")
    run = Training(cluster, config, tmp_path, options=options)
    run.wait_for_step(50)
    urgent = cluster.submit(
        "--partition=urgent",
        "--nodelist=n2",
        "--cpus-per-task=4",
        script="#!/bin/bash\nhostname\n",
    )
    cluster.wait_for(urgent, "COMPLETED", timeout=120)
    assert run.finish() >= 1
    step = run.check_interrupted()
    assert f"stopped after {step} of {STEPS} steps by the batch system" in run.log
    check_same(tmp_path, straight.run)
