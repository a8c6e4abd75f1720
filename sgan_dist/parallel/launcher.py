"""What started this process, according to its environment: ranks, threads and precision.

`accelerate launch`, `torchrun` and `deepspeed` set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and
MASTER_PORT; under `srun` alone they are made here from SLURM's variables; plain `python` has none and
is a world of one. Imports nothing heavy.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import socket
import threading
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Literal

import psutil

from sgan_dist.errors import UserError, plural

Precision = Literal["fp32", "tf32", "bf16", "fp64"]

RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# requests to stop: a closed terminal sends HUP, a batch system may send USR1
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
CPU_RANKS = (
    "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes {n} launch/train.py"
)


log = logging.getLogger(__name__)


def adopt_slurm(environ: MutableMapping[str, str]) -> None:
    """Under `srun python launch/train.py`, one process a task, sets what a launcher would set.

    Variables that exist are kept: under `srun accelerate launch`, the launchers set the ranks. The
    process of a batch script itself, which srun did not start, stays a world of one.

    Raises:
        UserError: some of SLURM's variables are missing.
    """
    tasks = int(environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if "RANK" in environ or "SLURM_PROCID" not in environ or tasks == 1:
        return
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST")
    needed = ("SLURM_LOCALID", "SLURM_JOB_ID", "SLURM_STEP_ID")
    missing = [key for key in needed if not environ.get(key, "").isdigit()]
    if missing or not nodes:
        raise UserError(
            f"SLURM_PROCID and SLURM_STEP_NUM_TASKS={tasks} say that srun started several tasks, but"
            f" {', '.join(missing) or 'SLURM_STEP_NODELIST'} is not set: unset SLURM_PROCID for a"
            f" single process, or set {', '.join(RANK_VARIABLES)} yourself"
        )
    # with --gpus-per-task=1 each task sees one GPU, which is number 0 for it
    one_gpu = re.fullmatch(r"[^,]+", environ.get("CUDA_VISIBLE_DEVICES", "")) is not None
    variables = {
        "RANK": environ["SLURM_PROCID"],
        "LOCAL_RANK": "0" if one_gpu else environ["SLURM_LOCALID"],
        "WORLD_SIZE": str(tasks),
        "MASTER_ADDR": first_host(nodes),
        # the same for all tasks of a step; different for the jobs and steps of a node
        "MASTER_PORT": str(
            10_000 + (int(environ["SLURM_JOB_ID"]) * 31 + int(environ["SLURM_STEP_ID"])) % 20_000
        ),
    }
    for name, value in variables.items():
        environ.setdefault(name, value)


def use_all_cores(environ: MutableMapping[str, str]) -> None:
    """Removes the OMP_NUM_THREADS=1 that `accelerate launch` sets, if this is its only process.

    Then torch takes its default, one thread a core. A number from the user stays, whether in the
    launcher's own environment or in its options. To be called before torch is imported.
    """
    if name(environ) != "accelerate launch" or environ.get("WORLD_SIZE", "1") != "1":
        return
    inherited, words = parent_process()
    by_option = any(word.startswith("--num_cpu_threads_per_process") for word in words)
    if words and not by_option and "OMP_NUM_THREADS" not in inherited:
        environ.pop("OMP_NUM_THREADS", None)


def parent_process() -> tuple[dict[str, str], list[str]]:
    """The environment and the command line with which the parent was started; empty if unreadable."""
    try:
        parent = psutil.Process(os.getppid())
        return parent.environ(), parent.cmdline()
    except psutil.Error:  # it has ended, or is another user's
        return {}, []


def launcher_pid(environ: Mapping[str, str]) -> int | None:
    """The process of the launcher that started this one; None without a launcher.

    People export Accelerate's variables in their shells, so these alone say nothing.
    """
    launched = {"TORCHELASTIC_RUN_ID", "CROSS_RANK"} & environ.keys()
    if not launched and "ACCELERATE_MIXED_PRECISION" in environ:
        launched = {word for word in parent_process()[1][:4] if "accelerate" in word}
    return os.getppid() if launched else None


def check_variables(environ: Mapping[str, str]) -> None:
    """Raises UserError if the variables of a launcher are incomplete or no ranks."""
    if "RANK" not in environ and environ.get("WORLD_SIZE", "1") == "1":
        return
    missing = [name for name in RANK_VARIABLES if not environ.get(name)]
    unset = f"for a single process, unset {' '.join(RANK_VARIABLES)}"
    if missing:
        present = ", ".join(name for name in RANK_VARIABLES if name not in missing)
        raise UserError(
            f"the environment has {present or 'empty variables of a launcher'}, but not"
            f" {', '.join(missing)}: start the processes by accelerate launch or torchrun, or {unset}"
        )
    for key in ("LOCAL_RANK", "MASTER_PORT"):
        if not environ[key].isdigit():
            raise UserError(
                f"{key} is {environ[key]} in the environment, and must be a number: {unset}"
            )
    number, size = environ["RANK"], environ["WORLD_SIZE"]
    if not (number.isdigit() and size.isdigit() and int(number) < int(size)):
        raise UserError(
            f"RANK is {number} and WORLD_SIZE is {size} in the environment, and ranks count from 0 to"
            f" WORLD_SIZE - 1: correct them, or {unset}"
        )


def choose_interface(environ: MutableMapping[str, str]) -> None:
    """Sets GLOO_SOCKET_IFNAME for ranks on several nodes, unless the user did.

    Gloo takes the address that the host's name resolves to, which may be a loopback or a management
    network. NCCL_SOCKET_IFNAME decides if it names one interface; else the route to MASTER_ADDR; else,
    on the master's own node, the only interface that is up.
    """
    local = environ.get("LOCAL_WORLD_SIZE") or environ.get("LOCAL_SIZE")
    nodes = int(environ.get("SLURM_STEP_NUM_NODES") or environ.get("SLURM_NNODES") or "1")
    # srun alone says only how many nodes its step has
    several = nodes > 1 if local is None else int(local) < int(environ.get("WORLD_SIZE", "1"))
    if not several or "RANK" not in environ or "GLOO_SOCKET_IFNAME" in environ:
        return
    addresses = {
        interface: {a.address for a in rows if a.family in (socket.AF_INET, socket.AF_INET6)}
        for interface, rows in psutil.net_if_addrs().items()
    }
    chosen = environ.get("NCCL_SOCKET_IFNAME", "").removeprefix("=")
    if chosen not in addresses:  # not set, or a list, a prefix or an exclusion
        own = _address_towards(environ["MASTER_ADDR"], int(environ["MASTER_PORT"]))
        routed = [interface for interface, rows in addresses.items() if own in rows]
        if not routed or routed[0].startswith("lo"):
            stats = psutil.net_if_stats()
            # aliases such as eth0:1 have addresses, but no state of their own
            up = {interface for interface, state in stats.items() if state.isup}
            routed = [i for i in addresses if i in up and addresses[i] and i[:2] != "lo"]
        if len(routed) != 1:
            return
        chosen = routed[0]
    environ["GLOO_SOCKET_IFNAME"] = chosen


def _address_towards(host: str, port: int) -> str | None:
    """This machine's address on the way to a host; sends nothing. None if there is no way."""
    try:
        family, kind, _, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(target)
            return str(probe.getsockname()[0])
    except OSError:  # joining the others will say so
        return None


@contextlib.contextmanager
def joining(environ: Mapping[str, str]) -> Iterator[None]:
    """Surrounds the wait for the other processes, in C code, where no handler of Python runs.

    Signals end the process; after a while a line says what is awaited, and where that was read.
    """
    size = environ.get("WORLD_SIZE", "1")
    if size == "1" or threading.current_thread() is not threading.main_thread():
        yield
        return
    by_slurm = name(environ) == "srun"
    variables = "SLURM_PROCID and SLURM_STEP_NUM_TASKS" if by_slurm else "RANK and WORLD_SIZE"
    message = (
        f"rank {environ['RANK']} waits for the others of {size} processes, at"
        f" {environ['MASTER_ADDR']}:{environ['MASTER_PORT']}, because {variables} are set"
        f" ({name(environ)}): if nothing else was started, end this with Ctrl-C, and unset"
        f" {'SLURM_PROCID' if by_slurm else ' '.join(RANK_VARIABLES)}"
    )
    timer = threading.Timer(10 if environ["RANK"] == "0" else 30, log.warning, [message])
    timer.daemon = True
    handlers = {
        number: signal.signal(number, signal.SIG_DFL)
        for number in STOP_SIGNALS
        if callable(signal.getsignal(number))
    }
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        for number, handler in handlers.items():
            signal.signal(number, handler)


def uses_cpu(environ: Mapping[str, str]) -> bool:
    """Whether the user asks Accelerate for the CPU, on a machine with GPUs too."""
    return environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")


def check_gpus(environ: Mapping[str, str], gpus: int) -> None:
    """Raises UserError if a node with GPUs has fewer of them than processes: NCCL needs one each."""
    processes = int(environ.get("LOCAL_WORLD_SIZE") or environ.get("LOCAL_SIZE") or "1")
    if 0 < gpus < processes and not uses_cpu(environ):
        raise UserError(
            f"{processes} processes were started on a node with {plural(gpus, 'GPU')}: start one for"
            f" each GPU (--num_processes {gpus}), or train on the CPU with ACCELERATE_USE_CPU=true"
        )


def first_host(nodes: str) -> str:
    """The first host of a SLURM node list, such as `gpu[03-05,9]-ib,login1`: `gpu03-ib`."""
    first = re.split(r",(?![^\[]*\])", nodes)[0]
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first)


def name(environ: Mapping[str, str]) -> str:
    """The launcher's command, or what else set the ranks."""
    if by_deepspeed(environ):
        return "deepspeed"
    if "ACCELERATE_MIXED_PRECISION" in environ:  # also where it runs torchrun
        return "accelerate launch"
    if "TORCHELASTIC_RUN_ID" in environ:
        return "torchrun"
    if "RANK" in environ:
        return "srun" if environ["RANK"] == environ.get("SLURM_PROCID") else "ranks by environment"
    return "python"


def is_main_process(environ: Mapping[str, str]) -> bool:
    """Whether this process is rank 0, the only one that prints."""
    return environ.get("RANK", "0") == "0"


def by_deepspeed(environ: Mapping[str, str]) -> bool:
    """Whether the `deepspeed` launcher started this process."""
    return "CROSS_RANK" in environ and "LOCAL_SIZE" in environ


def without_local_rank(argv: Sequence[str], environ: Mapping[str, str]) -> list[str]:
    """The command line without the `--local_rank=N` that the `deepspeed` launcher adds to it."""
    added = f"--local_rank={environ.get('LOCAL_RANK')}" if by_deepspeed(environ) else None
    return [argument for argument in argv if argument != added]


def precision(
    setting: Literal["auto"] | Precision,
    environ: Mapping[str, str],
    hardware: str,
    resumed: Precision | None = None,
) -> tuple[Precision, str]:
    """`machine.precision`, or what `auto` means here; and why, empty where the setting says it.

    `auto` is the launcher's --mixed_precision bf16, else that of the run which is resumed, `resumed`:
    any hardware can continue it. Else it is bf16 where `hardware` is CUDA or AMX, and fp32 elsewhere.
    Accelerate exports "no" also where nobody chose it.

    Raises:
        UserError: the launcher's is not supported.
    """
    if setting != "auto":
        return setting, ""
    mixed_precision = environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if mixed_precision == "bf16":
        return "bf16", "--mixed_precision"
    if mixed_precision != "no":
        raise UserError(
            f"the launcher has --mixed_precision {mixed_precision}, which needs loss scaling, and that"
            " skips steps: use --mixed_precision bf16 or no, or set --machine.precision"
        )
    if resumed is not None:
        return resumed, "auto: as the run began"
    return "bf16" if hardware in ("CUDA", "AMX") else "fp32", f"auto: {hardware}"


def refuse_silent_single_process(environ: Mapping[str, str]) -> None:
    """Raises UserError where accelerate was to start several processes and started one, as on CPU.

    `accelerate launch --num_processes 2` then sets MASTER_PORT, as for several, but no RANK.
    """
    if "RANK" in environ or not {"MASTER_PORT", "ACCELERATE_USE_CPU"} <= environ.keys():
        return
    # A MASTER_PORT in the launcher's own environment is the user's.
    inherited, words = parent_process()
    if words and "MASTER_PORT" not in inherited:
        raise UserError(
            "accelerate launch should start several processes and started a single one, as it does on"
            f" CPU: start several with {CPU_RANKS.format(n='N')}, or one with --num_processes 1; to"
            " skip this check, set MASTER_PORT in the environment of accelerate launch"
        )
