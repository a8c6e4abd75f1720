"""What started a process, according to the environments that launchers really set."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from sgan_dist.config import load_config
from sgan_dist.errors import UserError
from sgan_dist.parallel import launcher
from sgan_dist.parallel.backends import open_backend
from tests.ranks import free_port, run

SRUN = {
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
}


def test_srun_alone_sets_ranks() -> None:
    environ = dict(SRUN)
    launcher.adopt_slurm(environ)
    variables = {k: environ[k] for k in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR")}
    assert variables == {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "MASTER_ADDR": "gpu07"}
    assert 10_000 <= int(environ["MASTER_PORT"]) < 30_000
    assert launcher.name(environ) == "srun"
    other = SRUN | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    launcher.adopt_slurm(other)
    assert other["MASTER_PORT"] == environ["MASTER_PORT"]
    step = SRUN | {"SLURM_STEP_ID": "1"}
    launcher.adopt_slurm(step)
    assert step["MASTER_PORT"] != environ["MASTER_PORT"]
    by_user = SRUN | {"MASTER_PORT": "4000", "MASTER_ADDR": "10.0.0.1"}
    launcher.adopt_slurm(by_user)
    assert by_user["MASTER_PORT"] == "4000" and by_user["MASTER_ADDR"] == "10.0.0.1"


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"},  # a batch script's own
        SRUN | {"SLURM_STEP_NUM_TASKS": "1"},
        SRUN | {"RANK": "3"},  # accelerate launch under srun
    ],
    ids=["plain", "batch", "one task", "launched"],
)
def test_other_processes_are_left_alone(environ: dict[str, str]) -> None:
    before = dict(environ)
    launcher.adopt_slurm(environ)
    assert environ == before


@pytest.mark.parametrize(
    ("visible", "expected"), [(None, "1"), ("", "1"), ("0,1,2,3", "1"), ("0", "0"), ("GPU-8f", "0")]
)
def test_a_task_that_sees_one_gpu_uses_it(visible: str | None, expected: str) -> None:
    environ = SRUN | ({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})
    launcher.adopt_slurm(environ)
    assert environ["LOCAL_RANK"] == expected


def of_two_nodes(**more: str) -> dict[str, str]:
    ranks = {"RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
    return {**ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", **more}


def test_gloo_gets_the_interface_of_nccl_or_of_the_route() -> None:
    def chosen(environ: dict[str, str]) -> str | None:
        launcher.choose_interface(environ)
        return environ.get("GLOO_SOCKET_IFNAME")

    nccl = {"NCCL_SOCKET_IFNAME": "lo"}
    assert chosen(of_two_nodes(**nccl)) == "lo"
    assert chosen(of_two_nodes(NCCL_SOCKET_IFNAME="=lo")) == "lo"
    assert chosen(of_two_nodes(GLOO_SOCKET_IFNAME="mine", NCCL_SOCKET_IFNAME="lo")) == "mine"
    assert chosen(of_two_nodes(LOCAL_WORLD_SIZE="2")) is None
    assert chosen({}) is None
    # all ranks on one node of a larger job, and a step of srun alone on two nodes
    assert chosen(of_two_nodes(LOCAL_WORLD_SIZE="2", SLURM_NNODES="2", **nccl)) is None
    by_srun = of_two_nodes(SLURM_STEP_NUM_NODES="2", **nccl)
    del by_srun["LOCAL_WORLD_SIZE"]
    assert chosen(by_srun | {"SLURM_STEP_NUM_NODES": "1"}) is None
    assert chosen(by_srun) == "lo"
    stats, addresses = psutil.net_if_stats(), psutil.net_if_addrs()
    inet = (socket.AF_INET, socket.AF_INET6)
    others = [
        name
        for name, rows in addresses.items()
        if name[:2] != "lo" and stats[name].isup and any(row.family in inet for row in rows)
    ]
    only = others[0] if len(others) == 1 else None
    for excluded in ("^lo", "lo,nothing", "nothing"):  # not one interface, so the route decides
        assert chosen(of_two_nodes(NCCL_SOCKET_IFNAME=excluded)) == only
    assert chosen(of_two_nodes(MASTER_ADDR="no.such.host.invalid")) == only
    for name in others:
        for row in addresses[name]:
            if row.family == socket.AF_INET:
                assert chosen(of_two_nodes(MASTER_ADDR=row.address)) == name


def test_srun_without_a_node_list_is_refused() -> None:
    environ = {key: value for key, value in SRUN.items() if key != "SLURM_STEP_NODELIST"}
    with pytest.raises(UserError, match=r"SLURM_STEP_NODELIST.* is not set.*MASTER_ADDR"):
        launcher.adopt_slurm(environ)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("gpu[03-05,9]", "gpu03"),
        ("gpu[3,7]-ib,login1", "gpu3-ib"),
        ("a-b[001-128],c", "a-b001"),
        ("rack[1-2]gpu[3-4,9]", "rack1gpu3"),
    ],
)
def test_first_host(nodes: str, first: str) -> None:
    assert launcher.first_host(nodes) == first


def test_the_config_comes_before_the_launchers_precision() -> None:
    no, bf16, fp16 = ({"ACCELERATE_MIXED_PRECISION": value} for value in ("no", "bf16", "fp16"))
    for environ in ({}, no):  # Accelerate always exports one
        for other in ("CPU", "GPU without bf16"):
            assert launcher.precision("auto", environ, other) == ("fp32", f"auto: {other}")
        for fast in ("CUDA", "AMX"):
            assert launcher.precision("auto", environ, fast) == ("bf16", f"auto: {fast}")
        assert launcher.precision("auto", environ, "AMX", "fp32") == (
            "fp32",
            "auto: as the run began",
        )
    assert launcher.precision("auto", bf16, "CPU") == ("bf16", "--mixed_precision")
    assert launcher.precision("auto", bf16, "CPU", "fp32") == ("bf16", "--mixed_precision")
    assert launcher.precision("fp32", bf16, "CUDA", "bf16") == ("fp32", "")
    assert launcher.precision("bf16", fp16, "CPU") == ("bf16", "")
    for half in ("fp16", "fp8"):
        with pytest.raises(
            UserError, match=f"--mixed_precision {half}.*bf16 or no.*--machine.prec"
        ):
            launcher.precision("auto", {"ACCELERATE_MIXED_PRECISION": half}, "CUDA")


def test_the_deepspeed_launcher_and_its_argument() -> None:
    environ = {"CROSS_RANK": "0", "LOCAL_SIZE": "2", "RANK": "3", "LOCAL_RANK": "1"}
    assert launcher.name(environ) == "deepspeed"
    argv = ["--local_rank=1", "--seed=2", "--local_rank=7"]
    assert launcher.without_local_rank(argv, environ) == ["--seed=2", "--local_rank=7"]
    assert launcher.without_local_rank(argv, {"LOCAL_RANK": "1"}) == argv


ACCELERATE = ("accelerate", "launch")
PLAN = ("-m", "sgan_dist", "plan")
TWO = "--nproc_per_node=2"


@pytest.mark.parametrize("precision", ["tf32", "fp32", "bf16", "fp64"])
def test_only_tf32_is_tf32(precision: str) -> None:
    backend = open_backend(load_config("digits", f"--machine.precision={precision}"))
    flags = {torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32}
    assert flags == {precision == "tf32"} and f", {precision}" in backend.describe()


@pytest.mark.process
@pytest.mark.parametrize(
    ("command", "more", "expected"),
    [
        pytest.param(
            ("python", *PLAN),
            {},
            "python, no wrapper, 1 process on 1 node",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            (*ACCELERATE, "--mixed_precision", "bf16", *PLAN, "--machine.precision=auto"),
            {},
            "accelerate launch, no wrapper, 1 process on 1 node, cpu with 1 thread each, bf16",
            marks=pytest.mark.slow,
        ),
        (
            (*ACCELERATE, "--mixed_precision", "bf16", *PLAN, "--machine.precision=fp32"),
            {},
            "cpu with 1 thread each, fp32",
        ),
        (("torchrun", "--standalone", TWO, *PLAN), {}, "torchrun, DDP, 2 processes on 1 node"),
        (
            (*ACCELERATE, "--multi_gpu", "--num_processes", "2", *PLAN),
            {"ACCELERATE_USE_CPU": "true"},
            "accelerate launch, DDP, 2 processes on 1 node, cpu with 1 thread each, fp32; a step is"
            " 32 labeled + 64 unlabeled + 32 generated images, 16 + 32 + 16 a rank",
        ),
    ],
    ids=["python", "accelerate", "precedence", "torchrun", "accelerate-two"],
)
def test_every_launcher_arrives(
    command: tuple[str, ...], more: dict[str, Any], expected: str, digits: Path, tmp_path: Path
) -> None:
    options = (f"--data.root={digits}", f"--run_dir={tmp_path}/run")
    code, output = run(*command, *options, **more)
    assert code == 0 and expected in " ".join(output.split()), output


@pytest.mark.process
def test_accelerate_with_one_process_uses_all_cores(digits: Path, tmp_path: Path) -> None:
    count = ("python", "-c", "import torch; print(torch.get_num_threads())")
    code, cores = run(*count, OMP_NUM_THREADS=None)
    assert code == 0, cores
    plan = (*PLAN, f"--data.root={digits}", f"--run_dir={tmp_path}/run")
    for option, threads in (((), cores.strip()), (("--num_cpu_threads_per_process=1",), "1")):
        code, output = run(*ACCELERATE, *option, *plan, OMP_NUM_THREADS=None)
        assert code == 0 and f"cpu with {threads} thread" in output, output


@pytest.mark.process
def test_a_users_accelerate_config_is_read(digits: Path, tmp_path: Path) -> None:
    home = tmp_path / "home" / "accelerate"
    home.mkdir(parents=True)
    config = "compute_environment: LOCAL_MACHINE\ndistributed_type: 'NO'\nuse_cpu: true\n"
    options = f"--data.root={digits}", f"--run_dir={tmp_path}/run", "--machine.precision=auto"
    command = (*ACCELERATE, *PLAN, *options)
    cases = (("bf16", 0, " bf16 (--mixed_precision);"), ("fp16", 2, "--mixed_precision fp16"))
    for precision, code, expected in cases:
        (home / "default_config.yaml").write_text(f"{config}mixed_precision: {precision}\n")
        exit_code, output = run(*command, HF_HOME=str(tmp_path / "home"))
        assert (exit_code != 0) == (code != 0) and expected in output, output


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (("deepspeed", "--num_accelerators", "2"), "deepspeed, DeepSpeed ZeRO stage 1, 2 proc"),
        (
            (*ACCELERATE, "--use_deepspeed", "--num_processes", "2", "--zero_stage", "2"),
            "accelerate launch, DeepSpeed ZeRO stage 2, 2 proc",
        ),
        (
            (
                *(*ACCELERATE, "--use_deepspeed", "--num_processes", "2"),
                *("--deepspeed_config_file", "configs/deepspeed/zero1.json"),
            ),
            "accelerate launch, DeepSpeed ZeRO stage 1, 2 proc",
        ),
        (
            ("torchrun", "--standalone", TWO),
            "torchrun, DeepSpeed ZeRO stage 2 with the optimizer on the CPU, 2 proc",
        ),
    ],
    ids=["deepspeed", "zero_stage", "config_file", "torchrun"],
)
def test_every_way_to_deepspeed(
    command: tuple[str, ...], expected: str, digits: Path, tmp_path: Path
) -> None:
    named = ("--machine.deepspeed=configs/deepspeed/zero2_offload.json",)
    more = named if command[0] == "torchrun" else ()
    plan = PLAN
    if command[0] == "deepspeed":
        command = (*command, "--master_port", str(free_port()))
        plan = ("--module", *PLAN[1:])
    options = (f"--data.root={digits}", f"--run_dir={tmp_path}/run", *more)
    code, output = run(*command, *plan, *options, DS_ACCELERATOR="cpu")
    assert code == 0 and expected in output, output


def test_each_process_of_a_node_needs_a_gpu_if_there_are_any() -> None:
    two = {"LOCAL_WORLD_SIZE": "2"}
    launcher.check_gpus(two, gpus=0)
    launcher.check_gpus(two, gpus=2)
    launcher.check_gpus({}, gpus=1)
    launcher.check_gpus(two | {"ACCELERATE_USE_CPU": "true"}, gpus=1)
    with pytest.raises(UserError, match=r"2 processes .* with 1 GPU: .*--num_processes 1"):
        launcher.check_gpus(two, gpus=1)


@pytest.mark.parametrize("name", ["SLURM_LOCALID", "SLURM_JOB_ID", "SLURM_STEP_ID"])
def test_slurms_variables_may_be_incomplete(name: str) -> None:
    environ = {key: value for key, value in SRUN.items() if key != name}
    with pytest.raises(UserError, match=f"but {name} is not set: unset SLURM_PROCID"):
        launcher.adopt_slurm(environ)
