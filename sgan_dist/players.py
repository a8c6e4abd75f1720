"""What the two forms of the backend share: the protocol that training sees, and its small parts."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Callable, Collection, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sgan_dist import launcher
from sgan_dist.config import OptimConfig
from sgan_dist.distributed import gather_objects
from sgan_dist.errors import UserError, plural


class Player(Protocol):
    """A network and its optimizer."""

    network: nn.Module
    """the plain module"""

    @property
    def wrapped(self) -> Callable[..., Any]:
        """The forward pass whose backward adds gradients up over ranks."""

    def settle(self, example: Tensor) -> None:
        """Makes the first step like all later ones, by a forward and backward over `example`.

        Raises:
            UserError: a parameter has no part in the output; several ranks would wait for it.
        """

    def part(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """A forward and backward over one part of this rank's batch.

        Gradients add up over the parts, and are exchanged between ranks in the last one.
        """

    def backward(self, loss_share: Tensor) -> None:
        """Adds the gradient of this rank's share of the loss; shares add up over parts and ranks."""

    def clipped(self) -> Tensor | None:
        """The norm of the global loss's gradient, which is then clipped to `optim.clip_norm`.

        None where it is known only after `step`.
        """

    def step(self, lr: float) -> Tensor | None:
        """One optimizer step at the rate `lr`; gradients are cleared.

        Returns the norm where `clipped` did not; the step was left out if that is not finite.
        """

    def state(self) -> dict[str, Any]:
        """Network and optimizer, whole, as a checkpoint keeps them. All ranks call it."""

    def load(self, state: dict[str, Any]) -> None:
        """Takes over what `state` of any form gave, at this world size or another."""


class Backend(Protocol):
    """The processes of a run."""

    precision: launcher.Precision
    dtype: torch.dtype
    """of the parameters and of what the losses are computed in"""
    rank: int
    world_size: int
    device: torch.device

    def prepare(self, network: nn.Module, lr: float, config: OptimConfig) -> Player:
        """The network, moved to the device, with its optimizer."""

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        """Mixed precision for the networks, where the config asks for it."""

    def describe(self) -> str:
        """One line: launcher, wrapper, world, device and precision. All ranks must ask for it."""

    def close(self) -> None:
        """Leaves the process group; without it a multi-process run ends with a warning."""


def make_optimizer(network: nn.Module, lr: float, config: OptimConfig) -> torch.optim.Optimizer:
    """Adam or SGD over all of the network's parameters."""
    parameters = list(network.parameters())
    if config.name == "adam":
        return torch.optim.Adam(parameters, lr, betas=config.betas, fused=True)
    return torch.optim.SGD(parameters, lr, momentum=config.betas[0], fused=True)


def refuse_unused(network: nn.Module, used: Collection[nn.Parameter]) -> None:
    """Raises UserError where a trained parameter is not among those that got a gradient."""
    there = {id(parameter) for parameter in used}
    unused = [
        name for name, p in network.named_parameters() if p.requires_grad and id(p) not in there
    ]
    if unused:
        raise UserError(
            f"{type(network).__name__} does not use its parameters {', '.join(unused)}: take them"
            " out, or freeze them with requires_grad_(False)"
        )


def autocast(backend: Backend) -> contextlib.AbstractContextManager[None]:
    """bf16 for the networks, where the config asks for it; parameters stay as they are."""
    if backend.precision != "bf16":
        return contextlib.nullcontext()
    return torch.autocast(backend.device.type, torch.bfloat16)


def describe(backend: Backend, wrapper: str) -> str:
    """One line: launcher, wrapper, world, device and precision. All ranks must ask for it."""
    nodes = len(set(gather_objects(platform.node())))
    if backend.device.type == "cuda":
        device = torch.cuda.get_device_name(backend.device)
    else:
        device = f"{backend.device.type} with {plural(torch.get_num_threads(), 'thread')} each"
    return (
        f"{launcher.name(os.environ)}, {wrapper}, {plural(backend.world_size, 'process')} on"
        f" {plural(nodes, 'node')}, {device}, {backend.precision}"
    )


@contextlib.contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """`network` without gradients for its own parameters: they flow through it only."""
    trained = [p for p in network.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
