"""The networks of a run: building them, their first values, and their state in a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sgan_dist import ema
from sgan_dist.config import Config, EmaConfig
from sgan_dist.data.loader import SemiSupervisedBatch
from sgan_dist.distributed import GlobalBatchNorm, differing_replica, gather_batch
from sgan_dist.errors import UserError
from sgan_dist.models import build_discriminator, build_generator
from sgan_dist.models.base import data_dependent_init
from sgan_dist.noise import Draw, Rows
from sgan_dist.players import Backend, Player


@dataclass(frozen=True)
class Networks:
    """What is trained, the averaged D, and its mean prediction on unlabeled images, (N,).

    `generator` is None where the config has none.
    """

    discriminator: Player
    generator: Player | None
    average: nn.Module
    mean_prediction: Tensor

    def plain(self) -> dict[str, nn.Module]:
        """The modules by name, without wrappers."""
        players = {"discriminator": self.discriminator.network, "average": self.average}
        if self.generator is not None:
            players["generator"] = self.generator.network
        return players

    def update_average(self, seen: int, batch: int, config: EmaConfig) -> None:
        """Moves the averaged D after a step; see `sgan_dist.ema.update`."""
        ema.update(self.average, self.discriminator.network, seen, batch, config)

    def check_replicas(self, step: int) -> None:
        """Raises UserError on every rank where the ranks' weights are no longer the same."""
        tensors = {
            f"{name}.{key}": value
            for name, network in self.plain().items()
            for key, value in network.state_dict().items()
        }
        name = differing_replica(tensors)
        if name is not None:
            raise UserError(
                f"step {step}: {name} differs between ranks, as after a hardware fault, or with code in"
                " a network that depends on the rank: the same command goes on from the last"
                " checkpoint (--train.replica_check_every tells how often this is looked at)"
            )

    def state(self) -> dict[str, Any]:
        """All tensors of a checkpoint."""
        state = {
            "discriminator": self.discriminator.state(),
            "average": self.average.state_dict(),
            "mean_prediction": self.mean_prediction,
        }
        if self.generator is not None:
            state["generator"] = self.generator.state()
        return state

    def load(self, state: dict[str, Any]) -> None:
        self.discriminator.load(state["discriminator"])
        self.average.load_state_dict(state["average"])
        self.mean_prediction.copy_(state["mean_prediction"])
        if self.generator is not None:
            self.generator.load(state["generator"])


def outputs(config: Config, classes: int) -> int:
    """Logits of D: one a class, and in the explicit form one for fake."""
    return classes + (config.loss.form == "explicit")


def build(
    config: Config, image_shape: tuple[int, int, int], classes: int, backend: Backend
) -> Networks:
    """The networks for images (H, W, C), with the same initial values on every rank."""
    height, width, channels = image_shape
    shape, model, optim = (channels, height, width), config.model, config.optim
    torch.manual_seed(config.seed)
    discriminator = build_discriminator(
        model.discriminator, shape, outputs(config, classes), model.discriminator_args
    )
    mixes = (GlobalBatchNorm, nn.modules.batchnorm._BatchNorm)
    if config.train.accumulation > 1 and any(isinstance(m, mixes) for m in discriminator.modules()):
        raise UserError(
            f"train.accumulation is {config.train.accumulation}, and the discriminator has batch norm,"
            " whose statistics over a part of a batch are not those of the batch: take more processes"
            " instead, or a discriminator without"
        )
    generator = None
    if model.generator is not None:
        network = build_generator(model.generator, shape, model.generator_args)
        generator = backend.prepare(network, optim.generator_lr, optim)
    average = ema.averaged_copy(discriminator)
    player = backend.prepare(discriminator, optim.lr, optim)
    average.to(backend.device, next(discriminator.parameters()).dtype)
    uniform = torch.full((classes,), 1 / classes, device=backend.device, dtype=backend.dtype)
    with backend.autocast():
        player.settle(torch.zeros(2, *shape, device=backend.device, dtype=backend.dtype))
        if generator is not None:
            rows = {"example": Rows.of(2, 0, 1)}
            draw = Draw(config.seed, "settle", 0, rows, backend.device)
            generator.settle(generator.network.latent(draw).to(backend.dtype))  # type: ignore[operator]
    return Networks(player, generator, average, uniform)


def initialize(networks: Networks, first: SemiSupervisedBatch, seed: int, backend: Backend) -> None:
    """Data-dependent first values of D, from the whole first global batch, alike on every rank.

    With D's noise: without it signals start larger against noise whose size is fixed, and stay so
    where the scale of a layer is not trained.
    """
    parts = [first.labeled, first.unlabeled]
    images = torch.cat([gather_batch(to_float(part, backend)) for part in parts if len(part)])
    # In eval mode: batch norm must not take every rank's copy of the images for a part of a batch.
    draw = Draw(seed, "init", 0, {"first": Rows(len(images), 0, len(images))}, backend.device)
    data_dependent_init(networks.discriminator.network.eval(), images, draw)
    networks.discriminator.network.train()
    networks.average.load_state_dict(networks.discriminator.network.state_dict())


def to_float(images: Tensor, backend: Backend) -> Tensor:
    """uint8 (n, H, W, C) -> (n, C, H, W) in [-1, 1], fp32 or fp64, on the device."""
    images = images.to(backend.device, non_blocking=True)
    return images.permute(0, 3, 1, 2).to(backend.dtype).div_(127.5).sub_(1).contiguous()
