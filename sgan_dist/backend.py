"""The only file that knows Accelerate: processes, devices, data-parallel wrappers, precision."""

from __future__ import annotations

import contextlib
import copy
import os
import warnings
from collections.abc import Iterator
from typing import Any

import accelerate
import psutil
import torch
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn

from sgan_dist.config import OptimConfig, TrainConfig
from sgan_dist.errors import UserError

CPU_RANKS = (
    "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes {n} launch/train.py"
)


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
        _refuse_silent_single_process()
        self.precision = config.precision
        self.dtype = torch.float64 if config.precision == "fp64" else torch.float32
        self.accelerator = accelerate.Accelerator(
            mixed_precision="bf16" if config.precision == "bf16" else "no",
            kwargs_handlers=[
                # Buffers are global averages already, the same on every rank.
                DistributedDataParallelKwargs(broadcast_buffers=False)
            ],
        )
        warnings.filterwarnings("ignore", message=".*`broadcast_buffers` is deprecated.*")
        self.rank: int = self.accelerator.process_index
        self.world_size: int = self.accelerator.num_processes
        self.device: torch.device = self.accelerator.device
        if config.world_size is not None and config.world_size != self.world_size:
            raise UserError(
                f"train.world_size asks for {config.world_size} processes, and the launcher started"
                f" {self.world_size}; on CPU start them with:"
                f" {CPU_RANKS.format(n=config.world_size)}"
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
        """One line: what the launcher gave."""
        threads = f", {torch.get_num_threads()} threads each" if self.device.type == "cpu" else ""
        return (
            f"{self.world_size} process{'es' if self.world_size > 1 else ''} on {self.device.type}"
            f"{threads}, {self.precision}, accelerate {self.accelerator.distributed_type.value}"
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


def _refuse_silent_single_process() -> None:
    """On CPU `accelerate launch --num_processes 2` names a rendezvous and starts one process."""
    if "RANK" in os.environ or not {"MASTER_PORT", "ACCELERATE_USE_CPU"} <= os.environ.keys():
        return
    launcher = psutil.Process().parent()
    # A port that the launcher was started with is the user's own, and asks for nothing.
    if launcher is not None and "MASTER_PORT" not in launcher.environ():
        raise UserError(
            "accelerate was asked for several processes and started a single one, as it does on CPU;"
            f" start them with: {CPU_RANKS.format(n='N')}"
        )
