"""The default backend: Accelerate's processes, and networks under torch's DDP."""

from __future__ import annotations

import contextlib
import os
import warnings
from typing import Any

import accelerate
import torch
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn

from sgan_dist.config import Config, OptimConfig
from sgan_dist.errors import UserError
from sgan_dist.parallel import launcher
from sgan_dist.parallel.engine import Backend, Engine, Phase, make_optimizer


class DDPEngine(Engine):
    """A phase under DDP; in a single process, without a wrapper."""

    skips_on_device = True

    def __init__(
        self,
        phase: Phase,
        accelerator: accelerate.Accelerator,
        optimizer: torch.optim.Optimizer,
        clip_norm: float | None,
    ) -> None:
        super().__init__(phase, optimizer, clip_norm)
        self._accelerator = accelerator
        self._wrapped: nn.Module = accelerator.prepare_model(phase)

    def forward(self, *inputs: Any) -> Any:
        """Returns the output of the DDP wrapper, whose backward averages gradients over ranks."""
        return self._wrapped(*inputs)

    def warm_up(self, *inputs: Any) -> None:
        """Lets DDP order its gradient buckets before the first step.

        DDP does so in its first backward, and sums in another order from then on: without this a
        resumed run would differ from an uninterrupted one in the last bits.
        """
        if self._accelerator.num_processes > 1:
            self.backward(self.forward(*inputs).loss)
            self._optimizer.zero_grad(set_to_none=True)

    def accumulate(self, sync: bool) -> contextlib.AbstractContextManager[None]:
        """Without `sync`, DDP's own `no_sync`."""
        if sync:
            return contextlib.nullcontext()
        return self._accelerator.no_sync(self._wrapped)  # type: ignore[no-any-return]

    def backward(self, loss_share: Tensor) -> None:
        """Multiplies by the number of ranks, because DDP averages gradients over them."""
        # Not accelerator.backward: it divides by an accumulation count from the environment.
        (loss_share * self._accelerator.num_processes).backward()

    def _step(self, skip: Tensor) -> None:
        # torch's fused optimizers read these
        self._optimizer.found_inf = skip
        self._optimizer.grad_scale = None
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)


class AccelerateBackend(Backend):
    """The processes of this run, as Accelerate finds them in the launcher's environment."""

    def __init__(self, config: Config, resumed: launcher.Precision | None = None) -> None:
        super().__init__(config, resumed)
        ranks = int(os.environ.get("WORLD_SIZE", "1"))
        # Buffers are global averages already, the same on every rank.
        options = DistributedDataParallelKwargs(broadcast_buffers=False)
        with launcher.joining(os.environ):
            self._accelerator = accelerate.Accelerator(
                # on a machine without GPUs, Accelerate would otherwise not connect the ranks
                cpu=ranks > 1 and not torch.accelerator.is_available(),
                # with another value, Accelerate replaces the network's own forward everywhere
                mixed_precision="no",
                kwargs_handlers=[options],
            )
        warnings.filterwarnings("ignore", message=".*`broadcast_buffers` is deprecated.*")
        self.rank = self._accelerator.process_index
        self.world_size = self._accelerator.num_processes
        self.device = self._accelerator.device
        self.wrapper = "DDP" if self.world_size > 1 else "no wrapper"
        if self.world_size != ranks:
            raise UserError(
                f"the launcher started {ranks} processes, and Accelerate joined {self.world_size} of"
                f" them; on CPU start them with: {launcher.CPU_RANKS.format(n=ranks)}"
            )

    def prepare(self, phase: Phase, lr: float, config: OptimConfig) -> DDPEngine:
        phase.network.to(self.device, self.dtype)
        optimizer = make_optimizer(phase.network, lr, config)
        return DDPEngine(phase, self._accelerator, optimizer, config.clip_norm)
