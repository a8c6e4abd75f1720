"""The only file that knows Accelerate: processes, devices, data-parallel wrappers, precision."""

from __future__ import annotations

import contextlib
import copy
import os
import platform
import warnings
from collections.abc import Iterator
from typing import Any

import accelerate
import torch
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn

from sgan_dist import launcher
from sgan_dist.config import OptimConfig, TrainConfig
from sgan_dist.distributed import gather_objects
from sgan_dist.errors import UserError, plural


class Player:
    """A network and its optimizer: `network` is the plain module, `wrapped` adds up gradients."""

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
        """Makes DDP order its gradient buckets now, by one forward and backward over `example`.

        Left alone it does so after its first step, and sums in another order from then on: a resumed
        run would differ from an uninterrupted one in the last bits.

        Raises:
            UserError: a parameter has no part in the output; several ranks would wait for it.
        """
        kept = copy.deepcopy(self.network.state_dict())
        out = self.wrapped(example)
        (out if isinstance(out, Tensor) else out[0]).sum().backward()
        unused = [
            name
            for name, p in self.network.named_parameters()
            if p.requires_grad and p.grad is None
        ]
        if unused:
            raise UserError(
                f"{type(self.network).__name__} does not use its parameters {', '.join(unused)}: take"
                " them out, or freeze them with requires_grad_(False)"
            )
        self._optimizer.zero_grad(set_to_none=True)
        self.network.load_state_dict(kept)

    def part(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """A forward and backward over one part of this rank's batch.

        Gradients add up over the parts, and are exchanged between ranks in the last one.
        """
        if last:
            return contextlib.nullcontext()
        return self._accelerator.no_sync(self.wrapped)  # type: ignore[no-any-return]

    def backward(self, loss_share: Tensor) -> None:
        """Adds the gradient of this rank's share of the loss; shares add up over parts and ranks."""
        # Data-parallel wrappers average gradients over ranks. Not accelerator.backward: it divides
        # by an accumulation count from the environment.
        (loss_share * self._accelerator.num_processes).backward()

    def clipped(self) -> Tensor:
        """The norm of the global loss's gradient, which is then clipped to `optim.clip_norm`."""
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self._clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self._parameters, self._clip_norm, norm)
        return norm

    def step(self, lr: float) -> None:
        """One optimizer step at the rate `lr`; gradients are cleared."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Any]:
        """Network and optimizer, as a checkpoint keeps them."""
        return {"network": self.network.state_dict(), "optimizer": self._optimizer.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        self._optimizer.load_state_dict(state["optimizer"])


class Backend:
    """The processes of this run, as Accelerate finds them in the launcher's environment."""

    def __init__(self, config: TrainConfig) -> None:
        launcher.refuse_silent_single_process(os.environ)
        self.precision = launcher.precision(config.precision, os.environ)
        self.dtype = torch.float64 if self.precision == "fp64" else torch.float32
        ranks = int(os.environ.get("WORLD_SIZE", "1"))
        self.accelerator = accelerate.Accelerator(
            # by itself it would leave the ranks of a machine without GPUs each on its own
            cpu=ranks > 1 and not torch.accelerator.is_available(),
            mixed_precision="bf16" if self.precision == "bf16" else "no",
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
        if config.world_size is not None and config.world_size != self.world_size:
            raise UserError(
                f"train.world_size asks for {config.world_size} processes, and the launcher started"
                f" {self.world_size}; on CPU start them with:"
                f" {launcher.CPU_RANKS.format(n=config.world_size)}"
            )

    def prepare(self, network: nn.Module, lr: float, config: OptimConfig) -> Player:
        """The network, moved to the device, with its optimizer."""
        network.to(self.device, self.dtype)
        parameters = list(network.parameters())
        optimizer: torch.optim.Optimizer
        if config.name == "adam":
            optimizer = torch.optim.Adam(parameters, lr, betas=config.betas, fused=True)
        else:
            optimizer = torch.optim.SGD(parameters, lr, momentum=config.betas[0], fused=True)
        return Player(network, self.accelerator, optimizer, config.clip_norm)

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        """Mixed precision for the networks, where the config asks for it."""
        return self.accelerator.autocast()  # type: ignore[no-any-return]

    def describe(self) -> str:
        """One line: launcher, wrapper, world, device and precision. All ranks must ask for it."""
        nodes = len(set(gather_objects(platform.node())))
        if self.device.type == "cuda":
            device = torch.cuda.get_device_name(self.device)
        else:
            device = f"{self.device.type} with {plural(torch.get_num_threads(), 'thread')} each"
        return (
            f"{launcher.name(os.environ)}, {'DDP' if self.world_size > 1 else 'no wrapper'},"
            f" {plural(self.world_size, 'process')} on {plural(nodes, 'node')}, {device},"
            f" {self.precision}"
        )

    def close(self) -> None:
        """Leaves the process group; without it a multi-process run ends with a warning."""
        self.accelerator.end_training()


@contextlib.contextmanager
def frozen(network: nn.Module) -> Iterator[nn.Module]:
    """`network` without gradients for its own parameters: they flow through it only."""
    trained = [p for p in network.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield network
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
