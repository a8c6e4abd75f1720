"""Real processes for tests: spawned gloo ranks, and the command line as users run it."""

from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parent.parent
CONTEXT = multiprocessing.get_context("forkserver")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def run_ranks(
    world_size: int, work: Callable[..., Any], *args: Any, timeout: float = 120
) -> list[Any]:
    """`work(rank, *args)` on gloo ranks with one thread each, as a launcher would start them.

    Returns the results in rank order; raises RuntimeError with the traceback of the first failure.
    """
    CONTEXT.set_forkserver_preload(["sgan_dist.run.trainer"])
    port = free_port()
    pipes, processes = [], []
    for rank in range(world_size):
        receiver, sender = CONTEXT.Pipe(duplex=False)
        process = CONTEXT.Process(
            target=_child, args=(rank, world_size, port, sender, work, args), daemon=True
        )
        process.start()
        sender.close()
        pipes.append(receiver)
        processes.append(process)
    try:
        results = []
        for rank, pipe in enumerate(pipes):
            if not pipe.poll(timeout):
                raise RuntimeError(f"rank {rank} gave no result within {timeout} s")
            try:
                failed, result = pipe.recv()
            except EOFError:
                raise RuntimeError(f"rank {rank} died") from None
            if failed:
                raise RuntimeError(f"rank {rank}:\n{result}")
            results.append(result)
        return results
    finally:
        for process in processes:
            process.join(5)
            if process.is_alive():
                process.kill()


def _child(
    rank: int,
    world_size: int,
    port: int,
    pipe: Any,
    work: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    os.environ["ACCELERATE_USE_CPU"] = "true"
    if world_size > 1:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    import torch

    torch.set_num_threads(1)
    try:
        pipe.send((False, work(rank, *args)))
    except BaseException:  # noqa: BLE001 - sent to the parent
        pipe.send((True, traceback.format_exc()))


def with_children(rank: int, work: Callable[..., Any], *args: Any) -> Any:
    """`work(rank, *args)` on a rank of `run_ranks` that may start loader workers.

    The ranks are daemons, which multiprocessing allows no children.
    """
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    return work(rank, *args)


def environment(**more: str | None) -> dict[str, str]:
    """The environment of a command: no W&B, one thread; None takes a variable out."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "ACCELERATE_"))}
    merged = {**clean, "WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1", **more}
    return {name: value for name, value in merged.items() if value is not None}


def launch(*command: str, **more: str | None) -> subprocess.Popen[str]:
    """Starts a command in the repository, in a process group of its own."""
    programs = Path(sys.executable).parent
    first = str(programs / command[0])
    return subprocess.Popen(
        [first, *command[1:]],
        cwd=REPOSITORY,
        env=environment(**more),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def run(*command: str, timeout: float = 180, **more: str | None) -> tuple[int, str]:
    """Exit code and output of a command."""
    process = launch(*command, **more)
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        output, _ = process.communicate()
        raise AssertionError(f"{command} hung; its output so far:\n{output}") from None
    return process.returncode, output
