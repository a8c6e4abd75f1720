"""Which backend a run uses: Accelerate's DDP, or DeepSpeed."""

from __future__ import annotations

import os

import torch

from sgan_dist.config import Config
from sgan_dist.errors import UserError
from sgan_dist.parallel import launcher
from sgan_dist.parallel.agreement import synchronize
from sgan_dist.parallel.ddp import AccelerateBackend
from sgan_dist.parallel.deepspeed_config import requested
from sgan_dist.parallel.engine import Backend


def open_backend(config: Config, resumed: launcher.Precision | None = None) -> Backend:
    """Returns DeepSpeed's backend where the config or the launcher asks for it, else Accelerate's.

    `resumed` is the precision of the run that is resumed, for `machine.precision` auto.

    Raises:
        UserError: the number of processes is not the requested one, or DeepSpeed is not installed.
    """
    launcher.refuse_silent_single_process(os.environ)
    launcher.check_gpus(os.environ, torch.cuda.device_count())
    zero = requested(config.machine.deepspeed, os.environ)
    backend: Backend
    if zero is None:
        backend = AccelerateBackend(config, resumed)
    else:
        from sgan_dist.parallel.deepspeed import DeepSpeedBackend  # imports an optional dependency

        backend = DeepSpeedBackend(config, zero, resumed)
    expected, error = config.machine.world_size, None
    if expected is not None and expected != backend.world_size:
        error = UserError(
            f"machine.world_size is {expected}, and the launcher started {backend.world_size}"
            f" processes; on CPU start them with: {launcher.CPU_RANKS.format(n=expected)}"
        )
    synchronize(error)  # a rank that leaves before the others have joined would be an error of gloo
    return backend
