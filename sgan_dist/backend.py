"""What trains the networks: processes, devices, data-parallel wrappers, precision.

This file knows Accelerate, and `zero.py` beside it DeepSpeed; no other file knows either.
"""

from __future__ import annotations

import contextlib
import copy
import os
import warnings
from typing import Any

import accelerate
import torch
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn

from sgan_dist import launcher
from sgan_dist.config import Config, OptimConfig
from sgan_dist.errors import UserError
from sgan_dist.players import Backend, autocast, describe, make_optimizer, refuse_unused
from sgan_dist.zero_config import requested


def open_backend(config: Config) -> Backend:
    """DeepSpeed where the config or the launcher asks for it, else Accelerate.

    Raises:
        UserError: the processes that were asked for are not there, or DeepSpeed isn't.
    """
    launcher.refuse_silent_single_process(os.environ)
    zero = requested(config.train.deepspeed, os.environ)
    if zero is None:
        backend: Backend = AccelerateBackend(config)
    else:
        from sgan_dist.zero import DeepSpeedBackend  # an extra

        backend = DeepSpeedBackend(config, zero)
    asked = config.train.world_size
    if asked is not None and asked != backend.world_size:
        raise UserError(
            f"train.world_size asks for {asked} processes, and the launcher started"
            f" {backend.world_size}; on CPU start them with: {launcher.CPU_RANKS.format(n=asked)}"
        )
    return backend


class AcceleratePlayer:
    """A network under DDP where there are several ranks; see `Player`."""

    def __init__(
        self,
        network: nn.Module,
        accelerator: accelerate.Accelerator,
        optimizer: torch.optim.Optimizer,
        clip_norm: float | None,
    ) -> None:
        self.network = network
        self.wrapped: nn.Module = accelerator.prepare_model(network)
        self._accelerator = accelerator
        self._optimizer = optimizer
        self._clip_norm = clip_norm
        self._parameters = list(network.parameters())

    def settle(self, example: Tensor) -> None:
        """See `Player`.

        Left alone DDP orders its gradient buckets after its first step, and sums in another order
        from then on: a resumed run would differ from an uninterrupted one in the last bits.
        """
        kept = copy.deepcopy(self.network.state_dict())
        out = self.wrapped(example)
        (out if isinstance(out, Tensor) else out[0]).sum().backward()
        refuse_unused(self.network, {p for p in self._parameters if p.grad is not None})
        self._optimizer.zero_grad(set_to_none=True)
        self.network.load_state_dict(kept)

    def part(self, last: bool) -> contextlib.AbstractContextManager[None]:
        if last:
            return contextlib.nullcontext()
        return self._accelerator.no_sync(self.wrapped)  # type: ignore[no-any-return]

    def backward(self, loss_share: Tensor) -> None:
        # Data-parallel wrappers average gradients over ranks. Not accelerator.backward: it divides
        # by an accumulation count from the environment.
        (loss_share * self._accelerator.num_processes).backward()

    def clipped(self) -> Tensor:
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self._clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self._parameters, self._clip_norm, norm)
        return norm

    def step(self, lr: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Any]:
        return {"network": self.network.state_dict(), "optimizer": self._optimizer.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        self._optimizer.load_state_dict(state["optimizer"])


class AccelerateBackend:
    """The processes of this run, as Accelerate finds them in the launcher's environment."""

    def __init__(self, config: Config) -> None:
        self.precision = launcher.precision(config.train.precision, os.environ)
        self.dtype = torch.float64 if self.precision == "fp64" else torch.float32
        ranks = int(os.environ.get("WORLD_SIZE", "1"))
        self.accelerator = accelerate.Accelerator(
            # by itself it would leave the ranks of a machine without GPUs each on its own
            cpu=ranks > 1 and not torch.accelerator.is_available(),
            # else it would replace the network's own forward, wherever that is called from
            mixed_precision="no",
            kwargs_handlers=[
                # Buffers are global averages already, the same on every rank.
                DistributedDataParallelKwargs(broadcast_buffers=False)
            ],
        )
        warnings.filterwarnings("ignore", message=".*`broadcast_buffers` is deprecated.*")
        self.rank: int = self.accelerator.process_index
        self.world_size: int = self.accelerator.num_processes
        self.device: torch.device = self.accelerator.device
        if self.world_size != ranks:
            raise UserError(
                f"the launcher started {ranks} processes, and accelerate joined {self.world_size} of"
                f" them; on CPU start them with: {launcher.CPU_RANKS.format(n=ranks)}"
            )

    def prepare(self, network: nn.Module, lr: float, config: OptimConfig) -> AcceleratePlayer:
        network.to(self.device, self.dtype)
        optimizer = make_optimizer(network, lr, config)
        return AcceleratePlayer(network, self.accelerator, optimizer, config.clip_norm)

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        return autocast(self)

    def describe(self) -> str:
        return describe(self, "DDP" if self.world_size > 1 else "no wrapper")

    def close(self) -> None:
        self.accelerator.end_training()
