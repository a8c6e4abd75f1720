"""What launch/train.sbatch relies on, measured: signals, requeue, a lost node, preemption."""

from __future__ import annotations

import pytest

from tests.slurm.cluster import Cluster

BOTH = ("--nodes=2", "--ntasks-per-node=1", "--open-mode=append")


def test_job_on_two_nodes(cluster: Cluster) -> None:
    script = """#!/bin/bash
    echo "batch $(hostname)"
    srun bash -c 'echo task $(hostname) $(getent hosts n1 n2 | wc -l) gpus $CUDA_VISIBLE_DEVICES'
    """
    number = cluster.submit(*BOTH, "--gres=gpu:2", script=script)
    job = cluster.wait_for(number, "COMPLETED")
    assert (job["Restarts"], job["ExitCode"], job["NodeList"]) == ("0", "0:0", "n[1-2]")
    expected = ["batch n1", "task n1 2 gpus 0,1", "task n2 2 gpus 0,1"]
    assert sorted(cluster.log(number).splitlines()) == expected


def test_two_nodes_are_separate(cluster: Cluster) -> None:
    """The processes of a node are found, also those that left their session and lost their parent."""
    script = """#!/bin/bash
    srun bash -c 'setsid sleep 321 & echo ready; wait'
    """
    number = cluster.submit(*BOTH, script=script)
    cluster.wait_for_log(number, "ready\nready")
    for name in cluster.nodes:
        members = cluster.node_processes(name)
        commands = [" ".join(process.cmdline()) for process in members]
        assert commands.count("sleep 321") == 1
        assert sum("slurmd -D" in command for command in commands) == 1
        assert sum(f"slurmstepd: [{number}." in command for command in commands) >= 1
    cluster.cancel(number)
    cluster.wait_for(number, "CANCELLED")
    for name in cluster.nodes:
        cluster.wait_for_node(name, "idle")


@pytest.fixture(scope="module")
def warned(cluster: Cluster) -> int:
    """A job on n1, submitted ahead: SLURM checks time limits only every 30 s."""
    script = """#!/bin/bash
    echo "start ${SLURM_RESTART_COUNT:-0}"
    [ "${SLURM_RESTART_COUNT:-0}" = 0 ] || exit 0
    trap 'echo warned; scontrol requeue $SLURM_JOB_ID' USR1
    srun bash -c 'trap "echo task warned" USR1; echo ready; sleep 100 & wait' &
    wait
    wait
    """
    warning = ("--time=1", "--signal=B:USR1@60")  # at the next check
    return cluster.submit("--nodelist=n1", "--open-mode=append", *warning, script=script)


@pytest.mark.usefixtures("warned")
def test_lost_node(cluster: Cluster) -> None:
    """A job that lost a node is requeued, and runs as soon as the node is back."""
    script = """#!/bin/bash
    echo "start ${SLURM_RESTART_COUNT:-0}"
    [ "${SLURM_RESTART_COUNT:-0}" = 0 ] || exec srun hostname
    exec srun bash -c 'echo ready; exec sleep 100'
    """
    number = cluster.submit(*BOTH, "--requeue", script=script)
    cluster.wait_for_log(number, "ready\nready")
    cluster.kill_node("n2")
    assert cluster.node_processes("n2") == []
    cluster.wait_for_node("n2", "down*", timeout=120)
    assert cluster.job(number)["Restarts"] == "1"
    cluster.start_node("n2")
    cluster.wait_for(number, "COMPLETED")
    after = cluster.log(number).split("start 1\n")[1]
    assert sorted(after.splitlines()) == ["n1", "n2"]
    cluster.wait_for_node("n2", "idle")


def test_warned_job_requeues_itself(cluster: Cluster, warned: int) -> None:
    """--signal=B: reaches the batch shell alone, which may requeue its own job."""
    cluster.wait_for_log(warned, "start 1")
    assert cluster.wait_for(warned, "COMPLETED")["Restarts"] == "1"
    lines = cluster.log(warned).splitlines()
    assert "warned" in lines and "task warned" not in lines


def test_preemption(cluster: Cluster) -> None:
    """Only the tasks get TERM, at once; a job that ends in its grace time must requeue itself."""
    script = """#!/bin/bash
    echo "start ${SLURM_RESTART_COUNT:-0}"
    [ "${SLURM_RESTART_COUNT:-0}" = 0 ] || exit 0
    trap 'echo batch signaled' TERM
    child='trap "echo child signaled" TERM; echo ready; sleep 100 & wait'
    export child
    srun bash -c 'trap "echo task signaled; exit 3" TERM; bash -c "$child" & wait' &
    wait $!
    echo "srun exit $?"
    scontrol requeue $SLURM_JOB_ID
    sleep 100
    """
    number = cluster.submit(*BOTH, "--partition=requeue", "--exclusive", script=script)
    cluster.wait_for_log(number, "ready\nready")
    urgent = cluster.submit(
        *BOTH, "--partition=urgent", "--exclusive", script="#!/bin/bash\nhostname\n"
    )
    cluster.wait_for_log(number, "srun exit")
    before = cluster.log(number).splitlines()
    assert before.count("task signaled") == 2
    assert "batch signaled" not in before
    assert "srun exit 3" in before
    if cluster.cgroups:
        assert "child signaled" not in before
    cluster.wait_for(urgent, "COMPLETED")
    assert cluster.wait_for(number, "COMPLETED")["Restarts"] == "1"


def test_job_that_ends_in_its_grace_time_is_not_requeued(cluster: Cluster) -> None:
    script = """#!/bin/bash
    srun bash -c 'trap "exit 0" TERM; echo ready; sleep 100 & wait'
    """
    number = cluster.submit(*BOTH, "--partition=requeue", "--exclusive", script=script)
    cluster.wait_for_log(number, "ready\nready")
    urgent = cluster.submit(
        *BOTH, "--partition=urgent", "--exclusive", script="#!/bin/bash\nhostname\n"
    )
    cluster.wait_for(urgent, "COMPLETED")
    job = cluster.job(number)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "0")
    assert "PreemptTime" in job
