"""Engines and backends: what the training steps call, and what DDP and DeepSpeed share.

An `Engine` trains one network, a `Backend` is the processes of a run. `sgan_dist.parallel.ddp` and
`sgan_dist.parallel.deepspeed` implement both; no other module imports Accelerate or DeepSpeed.
"""

from __future__ import annotations

import contextlib
import os
import platform
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sgan_dist.config import Config, OptimConfig
from sgan_dist.errors import plural
from sgan_dist.parallel import launcher
from sgan_dist.parallel.agreement import leave_at_exit, reduce_objects


class Phase(Protocol):
    """A module with the parameters of one network, which it trains, and no others.

    Its forward returns this rank's share of the loss as `loss`, 0-d, beside other values.
    """

    network: nn.Module


class Engine(ABC):
    """A phase in its data-parallel wrapper, and the optimizer of its network.

    A step is `accumulate`, `forward` and `backward` for each micro-batch, then `clip_gradients`,
    then `step`.
    """

    network: nn.Module
    """the plain module, without phase and wrapper"""
    skips_on_device: bool
    """whether `step` leaves out the update by the flag; else the host must check before"""

    def __init__(self, phase: Phase, optimizer: Any, clip_norm: float | None) -> None:
        self.network = phase.network
        self._optimizer = optimizer
        self._clip_norm = clip_norm
        self._parameters = list(self.network.parameters())

    @abstractmethod
    def forward(self, *inputs: Any) -> Any:
        """Returns the phase's output; `backward` sums the gradients of its loss over ranks."""

    def warm_up(self, *inputs: Any) -> None:  # noqa: B027 - only DDP needs it
        """Makes the first step like all later ones, by a forward and backward if that is needed.

        Buffers may change.
        """

    @abstractmethod
    def accumulate(self, sync: bool) -> contextlib.AbstractContextManager[None]:
        """Surrounds the forward and backward of one micro-batch.

        Gradients add up over micro-batches; `sync`, for the last one, sums them over ranks.
        """

    @abstractmethod
    def backward(self, loss_share: Tensor) -> None:
        """Adds the gradient of this rank's share of the loss; see `sgan_dist.parallel.collectives`."""

    def clip_gradients(self) -> Tensor | None:
        """Clips the global loss's gradient to `optim.clip_norm`, and returns its norm before that.

        Returns None where the norm is known only after `step`.
        """
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self._clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self._parameters, self._clip_norm, norm)
        return norm

    def step(self, lr: float, skip: Tensor) -> Tensor | None:
        """Takes one optimizer step at the learning rate `lr`, and clears the gradients.

        `skip`, 0-d fp32 on the device: with 1, nothing changes, where `skips_on_device`. Returns the
        norm where `clip_gradients` did not. If that is not finite, the step was skipped.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        return self._step(skip)

    @abstractmethod
    def _step(self, skip: Tensor) -> Tensor | None: ...

    def state(self) -> dict[str, Any]:
        """Network and optimizer, whole, in the same form for every engine. All ranks call it."""
        return {"network": self.network.state_dict(), "optimizer": self._optimizer_state()}

    def load(self, state: dict[str, Any]) -> None:
        """Loads what `state` of any engine returned, at this world size or another."""
        self.network.load_state_dict(state["network"])
        self._load_optimizer(state["optimizer"])

    def _optimizer_state(self) -> dict[str, Any]:
        return self._optimizer.state_dict()  # type: ignore[no-any-return]

    def _load_optimizer(self, state: dict[str, Any]) -> None:
        self._optimizer.load_state_dict(state)


class Backend(ABC):
    """The processes of a run, with the device and precision of this one."""

    rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype
    """of the parameters, and of what the losses are computed in"""
    wrapper: str
    """what the networks run in, for `describe`"""

    def __init__(self, config: Config, resumed: launcher.Precision | None = None) -> None:
        leave_at_exit()  # also where joining the process group, or what follows, fails
        self.precision, self._reason = launcher.precision(
            config.machine.precision, os.environ, hardware(os.environ), resumed
        )
        # torch's default computes convolutions of fp32 in TF32, and matrix products in fp32
        torch.backends.cuda.matmul.allow_tf32 = self.precision == "tf32"
        torch.backends.cudnn.allow_tf32 = self.precision == "tf32"
        self.dtype = torch.float64 if self.precision == "fp64" else torch.float32

    @abstractmethod
    def prepare(self, phase: Phase, lr: float, config: OptimConfig) -> Engine:
        """Moves a phase's network to the device, and returns it with its optimizer."""

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        """bf16 for the networks, where the config asks for it; parameters keep their dtype."""
        if self.precision != "bf16":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def describe(self) -> str:
        """One line: launcher, wrapper, processes, nodes, device, precision. All ranks call it."""
        nodes = reduce_objects(platform.node(), lambda names: len(set(names)))
        if self.device.type == "cuda":
            device = torch.cuda.get_device_name(self.device)
        else:
            device = f"{self.device.type} with {plural(torch.get_num_threads(), 'thread')} each"
        why = f" ({self._reason})" if self._reason else ""
        return (
            f"{launcher.name(os.environ)}, {self.wrapper}, {plural(self.world_size, 'process')} on"
            f" {plural(nodes, 'node')}, {device}, {self.precision}{why}"
        )


def hardware(environ: Mapping[str, str]) -> str:
    """What the networks run on, as far as it decides the precision: CUDA and AMX are fast at bf16."""
    if not torch.cuda.is_available() or launcher.uses_cpu(environ):
        return "AMX" if torch.cpu._is_amx_tile_supported() else "CPU"
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return "CUDA" if has_bf16 else "GPU without bf16"


def make_optimizer(network: nn.Module, lr: float, config: OptimConfig) -> torch.optim.Optimizer:
    """Adam or SGD over all parameters of the network."""
    parameters = list(network.parameters())
    if config.name == "adam":
        return torch.optim.Adam(parameters, lr, betas=config.betas, fused=True)
    return torch.optim.SGD(parameters, lr, momentum=config.betas[0], fused=True)


@contextlib.contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """Turns off gradients for the parameters of `network`: they only flow through it."""
    trained = [p for p in network.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
