"""What started this process, told from its environment: ranks and precision.

`accelerate launch`, `torchrun` and `deepspeed` hand out RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and
MASTER_PORT; under `srun` alone they are made here from SLURM's variables; plain `python` has none and
is a world of one. Imports nothing heavy.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Literal

import psutil

from sgan_dist.errors import UserError

Precision = Literal["fp32", "bf16", "fp64"]

PRECISIONS: dict[str, Precision] = {
    "no": "fp32",
    "bf16": "bf16",
}  # what the launcher's --mixed_precision means here
CPU_RANKS = (
    "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes {n} launch/train.py"
)


def adopt_slurm(environ: MutableMapping[str, str]) -> None:
    """Under `srun python launch/train.py`, one task a process, fills in what a launcher would.

    Leaves alone what is there, as the tasks of `srun accelerate launch` hand out ranks themselves.
    A batch script's own process, which srun did not start, stays a world of one.

    Raises:
        UserError: SLURM did not say where the tasks run.
    """
    tasks = int(environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if "RANK" in environ or "SLURM_PROCID" not in environ or tasks == 1:
        return
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST")
    if not nodes:
        raise UserError(
            "srun started several tasks and SLURM_STEP_NODELIST does not say where: set MASTER_ADDR,"
            " MASTER_PORT, RANK, LOCAL_RANK and WORLD_SIZE yourself"
        )
    made = {
        "RANK": environ["SLURM_PROCID"],
        "LOCAL_RANK": environ["SLURM_LOCALID"],
        "WORLD_SIZE": str(tasks),
        "MASTER_ADDR": first_host(nodes),
        # the same for all tasks of a step, and another one for each job and step of a node
        "MASTER_PORT": str(
            10_000 + (int(environ["SLURM_JOB_ID"]) * 31 + int(environ["SLURM_STEP_ID"])) % 20_000
        ),
    }
    for name, value in made.items():
        environ.setdefault(name, value)


def first_host(nodes: str) -> str:
    """The first host of a SLURM node list, such as `gpu[03-05,9]-ib,login1`: `gpu03-ib`."""
    first = re.split(r",(?![^\[]*\])", nodes)[0]
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first)


def name(environ: Mapping[str, str]) -> str:
    """What a person would call the launcher."""
    if by_deepspeed(environ):
        return "deepspeed"
    if "ACCELERATE_MIXED_PRECISION" in environ:  # also where it runs torchrun
        return "accelerate launch"
    if "TORCHELASTIC_RUN_ID" in environ:
        return "torchrun"
    if "RANK" in environ:
        return "srun" if environ["RANK"] == environ.get("SLURM_PROCID") else "ranks by environment"
    return "python"


def by_deepspeed(environ: Mapping[str, str]) -> bool:
    """Whether the `deepspeed` launcher started this process."""
    return "CROSS_RANK" in environ and "LOCAL_SIZE" in environ


def without_local_rank(argv: Sequence[str], environ: Mapping[str, str]) -> list[str]:
    """The command line without the `--local_rank=N` that the `deepspeed` launcher puts into it."""
    added = f"--local_rank={environ.get('LOCAL_RANK')}" if by_deepspeed(environ) else None
    return [argument for argument in argv if argument != added]


def precision(asked: Literal["auto"] | Precision, environ: Mapping[str, str]) -> Precision:
    """`train.precision`, or what the launcher's --mixed_precision asks for where that is `auto`.

    Raises:
        UserError: the launcher's is one that isn't supported.
    """
    if asked != "auto":
        return asked
    given = environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if given not in PRECISIONS:
        raise UserError(
            f"the launcher asks for --mixed_precision {given}, which needs loss scaling, and that would"
            " skip steps: start it with --mixed_precision bf16 or no, or give --train.precision"
        )
    return PRECISIONS[given]


def refuse_silent_single_process(environ: Mapping[str, str]) -> None:
    """On CPU `accelerate launch --num_processes 2` names a rendezvous and starts one process."""
    if "RANK" in environ or not {"MASTER_PORT", "ACCELERATE_USE_CPU"} <= environ.keys():
        return
    started_by = psutil.Process().parent()
    # A port that the launcher was started with is the user's own, and asks for nothing.
    if started_by is not None and "MASTER_PORT" not in started_by.environ():
        raise UserError(
            "accelerate was asked for several processes and started a single one, as it does on CPU;"
            f" start them with: {CPU_RANKS.format(n='N')}"
        )
