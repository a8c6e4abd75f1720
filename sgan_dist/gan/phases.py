"""The two phases of a step, each one module: from images to this rank's shares of the losses.

DDP or a DeepSpeed engine wraps the whole phase, and backward is called outside.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from sgan_dist.config import Config
from sgan_dist.data.loader import SemiSupervisedBatch
from sgan_dist.gan import losses
from sgan_dist.gan.augment import augment
from sgan_dist.gan.models.base import DiscriminatorOutput
from sgan_dist.gan.pixels import images_to_float
from sgan_dist.parallel.engine import Backend, frozen
from sgan_dist.parallel.random import GlobalRandom, share

Rows = TypeVar("Rows", Tensor, range)


@dataclass(frozen=True)
class Step:
    """The step that is made, on this rank."""

    number: int
    rows: dict[str, range]
    """of the global batches, by kind of images: which this rank has"""
    config: Config
    backend: Backend

    @classmethod
    def of(cls, batch: SemiSupervisedBatch, config: Config, backend: Backend) -> Step:
        """The step of a batch; generated images are shared like loaded ones."""
        fake = share(config.batch.fake, backend.rank, backend.world_size)
        return cls(batch.step, {**batch.rows, "fake": fake}, config, backend)

    def images(self, pixels: Tensor) -> Tensor:
        """The batch's uint8 images (n, H, W, C) as a network's input."""
        return images_to_float(pixels, self.backend.device, self.backend.dtype)

    def latent_random(self, purpose: str) -> GlobalRandom:
        """The random numbers of the latent vectors of this rank's fakes."""
        rows = {"fake": self.rows["fake"]}
        return GlobalRandom(self.config.seed, purpose, self.number, rows, self.backend.device)

    def random(self, kinds: Sequence[str], purpose: str) -> list[GlobalRandom]:
        """Those of each micro-batch of these kinds of images.

        Each image gets the same random numbers at any accumulation and world size.
        """
        n, seed, device = self.config.batch.accumulation, self.config.seed, self.backend.device
        rows = [{kind: part(self.rows[kind], i, n) for kind in kinds} for i in range(n)]
        return [GlobalRandom(seed, purpose, self.number, each, device) for each in rows]

    def micro_batches(self, images: dict[str, Tensor], purpose: str) -> list[MicroBatch]:
        """This rank's images, by kind, cut into `batch.accumulation` micro-batches."""
        rngs = self.random(list(images), purpose)
        return [
            MicroBatch({kind: part(x, i, len(rngs)) for kind, x in images.items()}, rng)
            for i, rng in enumerate(rngs)
        ]


class MicroBatch(NamedTuple):
    """What passes D at once: the images (n, C, H, W) of each kind, and their random numbers."""

    images: dict[str, Tensor]
    rng: GlobalRandom


class Shares(NamedTuple):
    """What a phase returns of a micro-batch; all are this rank's shares of global values."""

    loss: Tensor
    """0-d, to call backward on"""
    values: dict[str, Tensor]
    """0-d, without gradient, by the name of the metric"""


class DiscriminatorPhase(nn.Module):
    """Augmentation, D and its losses; only D's parameters are in it."""

    def __init__(
        self,
        discriminator: nn.Module,
        config: Config,
        backend: Backend,
        class_weights: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.network = discriminator
        self._config, self._backend = config, backend
        self._class_weights = class_weights

    def forward(
        self, micro: MicroBatch, labels: Tensor, targets: Tensor | None, diagnose: bool
    ) -> Shares:
        """D's weighted loss on a micro-batch, and its terms.

        `labels` (n,) belong to the labeled images, `targets` (n, N) to the unlabeled ones. With
        `diagnose`, also the squared norm of each term's gradient at D's logits: a term with none
        teaches nothing.
        """
        config = self._config
        # Positions need fp32: augmentation stays outside of autocast, here and below.
        joined = augment(torch.cat(list(micro.images.values())), config.augment, micro.rng)
        with self._backend.autocast():
            output = self.network(joined, micro.rng)
        parts = output.logits.split(list(micro.rng.sizes.values()))
        logits = dict(zip(micro.images, parts, strict=True))
        weights = self._class_weights
        terms, fractions = _discriminator_terms(logits, labels, targets, weights, config)
        values = {f"d/{name}": term.detach() for name, term in terms.items()} | fractions
        if diagnose:
            for name, term in terms.items():
                (gradient,) = torch.autograd.grad(term, output.logits, retain_graph=True)
                square = gradient.double().square().sum()
                values[f"d/squared_logit_gradient/{name}"] = square
        factors = {  # the supervised term has weight 1
            "unlabeled": config.loss.unlabeled,
            "fake": config.loss.fake,
            "consistency": config.loss.consistency,
        }
        weighted = [factors.get(name, 1.0) * term for name, term in terms.items()]
        return Shares(torch.stack(weighted).sum(), values)


class GeneratorPhase(nn.Module):
    """G, then augmentation and the frozen D, and G's loss; only G's parameters are in it."""

    def __init__(
        self, generator: nn.Module, discriminator: nn.Module, config: Config, backend: Backend
    ) -> None:
        super().__init__()
        self.network = generator
        self._discriminator = (discriminator,)  # in a tuple it is no submodule
        self._config, self._backend = config, backend

    def forward(
        self, latent: GlobalRandom, rngs: Sequence[GlobalRandom], real: Sequence[MicroBatch]
    ) -> Shares:
        """G's loss, whose gradient is right for G's parameters only; its value is in `values`.

        G makes its whole batch at once, because its batch norm mixes the images; D sees it in
        micro-batches, with the random numbers `rngs`. Gradients are collected at the images, and G
        gets them in one backward. `real`: unlabeled images, for feature matching.
        """
        config = self._config
        fake = generate(self.network, latent, self._backend)
        parts = torch.split(fake, [rng.sizes["fake"] for rng in rngs])
        leaves = [part.detach().requires_grad_() for part in parts]
        fakes = [MicroBatch({"fake": x}, rng) for x, rng in zip(leaves, rngs, strict=True)]
        outputs = self._outputs(fakes)
        means: Tensor | None = None
        if config.loss.generator == "feature_matching":
            if len(fakes) == 1:
                only = next(outputs)
                outputs, fake_features = iter([only]), [only.features]
            else:
                # The mean over all micro-batches, which the loss of each needs, takes another pass.
                fake_features = self._features(fakes)
            means = losses.feature_means(
                (self._features(real), config.batch.unlabeled), (fake_features, config.batch.fake)
            )
        values, gradients = list[Tensor](), list[Tensor]()
        for leaf, output in zip(leaves, outputs, strict=True):
            loss = self._loss(output, means)
            values.append(loss.detach())
            gradients += torch.autograd.grad(loss, leaf)
        loss = (fake * torch.cat(gradients)).sum()
        return Shares(loss, {f"g/{config.loss.generator}": torch.stack(values).sum()})

    def _loss(self, output: DiscriminatorOutput, means: Tensor | None) -> Tensor:
        """This rank's share of G's loss on a micro-batch; `means` (2, F) are of real and of fake."""
        count = self._config.batch.fake
        if means is None:
            odds = losses.log_odds_real(output.logits, self._config.loss.form)
            return losses.non_saturating(odds, count)
        shares = self._config.batch.accumulation * self._backend.world_size
        return losses.feature_matching(means[0], output.features, means[1], count, shares)

    def _outputs(self, micro_batches: Sequence[MicroBatch]) -> Iterator[DiscriminatorOutput]:
        """The frozen D's outputs for images of one kind; gradients flow to the images only."""
        (discriminator,) = self._discriminator
        for images, rng in micro_batches:
            rng = copy.copy(rng)  # another pass over the same images draws the same numbers
            (only,) = images.values()
            augmented = augment(only, self._config.augment, rng)
            with frozen(discriminator), self._backend.autocast():
                output = discriminator(augmented, rng)
            yield output

    @torch.no_grad()
    def _features(self, micro_batches: Sequence[MicroBatch]) -> list[Tensor]:
        """The frozen D's features (n, F) of each micro-batch."""
        return [output.features for output in self._outputs(micro_batches)]


def generate(generator: nn.Module, latent: GlobalRandom, backend: Backend) -> Tensor:
    """This rank's rows of the global batch of fakes, (n, C, H, W)."""
    z = generator.latent(latent).to(backend.dtype)  # type: ignore[operator]
    with backend.autocast():
        return generator(z)  # type: ignore[no-any-return]


def part(rows: Rows, number: int, total: int) -> Rows:
    """The part of rows, or of their numbers, that micro-batch `number` of `total` has."""
    own = share(len(rows), number, total)
    return rows[own.start : own.stop]


def _discriminator_terms(
    logits: dict[str, Tensor],
    labels: Tensor,
    targets: Tensor | None,
    class_weights: Tensor | None,
    config: Config,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """This rank's shares of D's loss terms on a micro-batch, and of fractions to report.

    Divided by the sizes of the global batches.
    """
    form, counts = config.loss.form, config.batches | {"fake": config.batch.fake}
    labeled = logits["labeled"]
    terms = {"supervised": losses.supervised(labeled, labels, counts["labeled"], class_weights)}
    wrong = losses.class_logits(labeled, form).argmax(1) != labels
    fractions = {"d/train_error": wrong.sum() / counts["labeled"]}
    if "fake" in logits:
        odds = {kind: losses.log_odds_real(logits[kind], form) for kind in ("unlabeled", "fake")}
        terms["unlabeled"] = losses.real(odds["unlabeled"], counts["unlabeled"])
        terms["fake"] = losses.fake(odds["fake"], counts["fake"])
        fractions["d/fakes_detected"] = (odds["fake"] < 0).sum() / counts["fake"]
    if targets is not None:
        predicted = losses.class_logits(logits["unlabeled"], form)
        count = counts["unlabeled"]
        terms["consistency"] = losses.soft_cross_entropy(predicted, targets, count)
        if config.loss.threshold:
            fractions["d/confident"] = targets.any(1).sum() / count
    return terms, fractions
