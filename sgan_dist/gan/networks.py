"""The networks of a run: building them, their initial values, and their state in a checkpoint."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sgan_dist.config import Config, EmaConfig
from sgan_dist.data.loader import SemiSupervisedBatch
from sgan_dist.errors import UserError
from sgan_dist.gan import ema, losses
from sgan_dist.gan.brake import Brake
from sgan_dist.gan.models import build_discriminator, build_generator
from sgan_dist.gan.models.base import CHW, data_dependent_init
from sgan_dist.gan.phases import DiscriminatorPhase, GeneratorPhase, MicroBatch
from sgan_dist.gan.pixels import images_to_float
from sgan_dist.parallel.collectives import broadcast, differing_replica, first_rows
from sgan_dist.parallel.engine import Backend, Engine
from sgan_dist.parallel.random import GlobalRandom

INIT_ROWS = 512  # images of the first batch from which D's initial values are made


@dataclass(frozen=True)
class SGAN:
    """A semi-supervised GAN in training: D, G and the averaged D, with their optimizers."""

    discriminator: Engine
    generator: Engine | None
    """None where the config has no generator"""
    average: nn.Module
    """the moving average of D, which is evaluated and kept"""
    mean_prediction: Tensor
    """(N,), the running mean of the averaged D's class probabilities on unlabeled images"""
    prior: Tensor | None
    """(N,), the shares of the classes that targets are aligned to, None for uniform ones"""
    brake: Brake
    """keeps all of this as it is once a loss or gradient was not finite"""

    def engines(self) -> dict[str, Engine]:
        """D's engine and, where there is one, G's, by name."""
        engines = {"discriminator": self.discriminator, "generator": self.generator}
        return {name: engine for name, engine in engines.items() if engine is not None}

    def networks(self) -> dict[str, nn.Module]:
        """The modules by name, without wrappers."""
        networks = {name: engine.network for name, engine in self.engines().items()}
        return networks | {"average": self.average}

    def update_average(self, seen: int, batch: int, config: EmaConfig) -> None:
        """Updates the averaged D after a step; see `sgan_dist.gan.ema.update`."""
        ema.update(self.average, self.discriminator.network, seen, batch, config, self.brake)

    def check_replicas(self, step: int) -> None:
        """Raises UserError on every rank if the weights are not the same on all ranks."""
        tensors = {
            f"{name}.{key}": value
            for name, network in self.networks().items()
            for key, value in network.state_dict().items()
            if isinstance(value, Tensor)  # not a network's extra state
        }
        name = differing_replica(tensors)
        if name is not None:
            raise UserError(
                f"step {step}: {name} differs between ranks, after a hardware fault, or because the"
                " code of a network depends on the rank: the same command continues from the last"
                " checkpoint (--machine.replica_check_every is the number of steps between checks)"
            )

    def state(self) -> dict[str, Any]:
        """The networks' part of a checkpoint. All ranks call it."""
        state: dict[str, Any] = {name: engine.state() for name, engine in self.engines().items()}
        state["average"] = self.average.state_dict()
        return state | {"mean_prediction": self.mean_prediction}

    def load(self, state: dict[str, Any]) -> None:
        """Loads what `state` returned."""
        for name, engine in self.engines().items():
            engine.load(state[name])
        self.average.load_state_dict(state["average"])
        self.mean_prediction.copy_(state["mean_prediction"])


@dataclass(frozen=True)
class DiscriminatorSpec:
    """What a D is built from, in training and from a classifier's file."""

    discriminator: str
    """a name of `sgan_dist.gan.models`, or `package.module:Class`"""
    discriminator_args: dict[str, Any]
    image_chw: CHW
    outputs: int
    """logits: one a class, and in the explicit form one more for fake"""

    @classmethod
    def of(cls, config: Config, image_hwc: Sequence[int], classes: int) -> DiscriminatorSpec:
        """That of a run on images (H, W, C)."""
        height, width, channels = image_hwc
        outputs, model = classes + (config.loss.form == "explicit"), config.model
        image_chw = (channels, height, width)
        return cls(model.discriminator, model.discriminator_args, image_chw, outputs)

    def build(self) -> nn.Module:
        """A new D; raises as `build_discriminator` does."""
        return build_discriminator(
            self.discriminator, self.image_chw, self.outputs, self.discriminator_args
        )


def build(
    config: Config, image_hwc: tuple[int, int, int], histogram: Sequence[int], backend: Backend
) -> SGAN:
    """The networks for images (H, W, C), with the same initial values on every rank.

    `histogram`: the number of labeled images of each class.
    `sgan_dist.gan.gate` says before a run whether they can be trained.
    """
    model = config.model
    torch.manual_seed(config.seed)
    spec = DiscriminatorSpec.of(config, image_hwc, len(histogram))
    discriminator = spec.build()
    generator = None
    if config.uses_generator:
        assert model.generator is not None
        generator = build_generator(model.generator, spec.image_chw, model.generator_args)
    average = copy.deepcopy(discriminator).eval().requires_grad_(False)
    average.to(backend.device, backend.dtype)
    sgan = assemble(discriminator, generator, average, histogram, config, backend)
    _warm_up(sgan, spec.image_chw, config, backend)
    return sgan


def assemble(
    discriminator: nn.Module,
    generator: nn.Module | None,
    average: nn.Module,
    histogram: Sequence[int],
    config: Config,
    backend: Backend,
) -> SGAN:
    """The networks in their phases and engines; the averaged D is on the device already."""
    optim, generator_engine = config.optim, None
    classes, weights, prior = len(histogram), None, None
    if config.loss.class_weights == "balanced":
        outputs = classes + (config.loss.form == "explicit")
        weights = losses.balanced_weights(histogram, outputs)
        weights = weights.to(backend.device, backend.dtype)
    if config.loss.prior == "labeled":
        prior = losses.labeled_prior(histogram).to(backend.device, backend.dtype)
    d_phase = DiscriminatorPhase(discriminator, config, backend, weights)
    engine = backend.prepare(d_phase, optim.lr, optim)
    if generator is not None:
        phase = GeneratorPhase(generator, discriminator, config, backend)
        generator_engine = backend.prepare(phase, optim.generator_lr, optim)
    uniform = torch.full((classes,), 1 / classes, device=backend.device, dtype=backend.dtype)
    return SGAN(engine, generator_engine, average, uniform, prior, Brake.released(backend.device))


def _warm_up(sgan: SGAN, image_chw: CHW, config: Config, backend: Backend) -> None:
    """A pass of each phase over two black images of each kind, as `Engine.warm_up` asks for."""
    before = {name: copy.deepcopy(n.state_dict()) for name, n in sgan.networks().items()}
    kinds = list(config.batches) + ["fake"] * config.uses_generator
    black = torch.full((2, *image_chw), -1.0, device=backend.device, dtype=backend.dtype)

    def micro(*kinds: str) -> MicroBatch:
        rows = {kind: range(len(black)) for kind in kinds}
        rng = GlobalRandom(config.seed, "warm_up", 0, rows, backend.device)
        return MicroBatch(dict.fromkeys(kinds, black), rng)

    labels = torch.zeros(len(black), dtype=torch.int64, device=backend.device)
    targets = sgan.mean_prediction.expand(len(black), -1) if config.uses_consistency else None
    sgan.discriminator.warm_up(micro(*kinds), labels, targets, False)
    if sgan.generator is not None:
        real = [micro("unlabeled")] * (config.loss.generator == "feature_matching")
        sgan.generator.warm_up(micro("fake").rng, [micro("fake").rng], real)
    for name, network in sgan.networks().items():
        network.load_state_dict(before[name])


def initialize(sgan: SGAN, first: SemiSupervisedBatch, config: Config, backend: Backend) -> None:
    """Data-dependent initialization of D from the first global batch, the same on every rank.

    From at most INIT_ROWS of its images, labeled and unlabeled in the batch's proportion. D's noise is
    on: without it, signals would be too large for noise of a fixed size, and would stay so in layers
    whose scale is not trained.
    """
    network, totals = sgan.discriminator.network, config.batches
    kept = min(INIT_ROWS, sum(totals.values()))
    labeled = max(1, round(kept * totals["labeled"] / sum(totals.values())))
    own = {"labeled": (first.labeled, labeled), "unlabeled": (first.unlabeled, kept - labeled)}
    parts = [
        first_rows(own[split][0].to(backend.device), first.rows[split], own[split][1])
        for split in totals
    ]
    images = images_to_float(torch.cat(parts), backend.device, backend.dtype)
    rng = GlobalRandom(config.seed, "init", 0, {"first": range(kept)}, backend.device)
    # Every rank has all images: in training mode batch norm would count them once per rank.
    data_dependent_init(network.eval(), images, rng)
    network.train()
    # Each rank computed the same, but GPUs may round in different ways.
    broadcast(value for value in network.state_dict().values() if isinstance(value, Tensor))
    sgan.average.load_state_dict(network.state_dict())
