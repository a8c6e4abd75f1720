"""One step of D, one of G, each with one backward: what is minimized, and in what order.

The host waits for nothing: metrics are tensors, and the brake, not the host, leaves out an update that
is not finite.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from sgan_dist.config import Config
from sgan_dist.data.batch import SemiSupervisedBatch
from sgan_dist.errors import NonFiniteLoss
from sgan_dist.gan import losses
from sgan_dist.gan.augment import augment
from sgan_dist.gan.brake import Brake
from sgan_dist.gan.models.base import DiscriminatorOutput
from sgan_dist.gan.networks import SGAN
from sgan_dist.gan.pixels import images_to_float
from sgan_dist.parallel.collectives import all_sum
from sgan_dist.parallel.engine import Backend, Engine, frozen
from sgan_dist.parallel.random import GlobalRandom, share

Rows = TypeVar("Rows", Tensor, range)
ALIGNMENT_MOMENTUM = 0.01  # of the averaged D's mean prediction


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


@dataclass(frozen=True)
class MicroBatch:
    """What passes D at once: the images (n, C, H, W) of each kind, and their random numbers."""

    images: dict[str, Tensor]
    rng: GlobalRandom
    number: int
    total: int

    @property
    def last(self) -> bool:
        """Whether it is the last of its step."""
        return self.number == self.total - 1

    def cut(self, rows: Tensor) -> Tensor:
        """The micro-batch's part of a tensor with a row for each image of a kind."""
        return _part(rows, self.number, self.total)


@dataclass(frozen=True)
class Metrics:
    """Global means of a step, (k,) on the device, by name."""

    names: list[str]
    values: Tensor

    def __add__(self, other: Metrics) -> Metrics:
        return Metrics(self.names + other.names, torch.cat([self.values, other.values]))


def train_step(sgan: SGAN, batch: SemiSupervisedBatch, config: Config, backend: Backend) -> Metrics:
    """Updates D, then G, then the averaged D; returns global means.

    If D's losses or gradient are not finite, everything stays as it was before the step, and in all
    later ones; if G's are not, D has made the step. The caller sees it in the metrics.

    Raises:
        NonFiniteLoss: under DeepSpeed, on every rank, before the update.
    """
    discriminator, brake = sgan.discriminator.network, sgan.brake
    generator_buffers = [] if sgan.generator is None else sgan.generator.network.buffers()
    with brake.protecting(generator_buffers):  # D's step makes images with G, too
        with brake.protecting([*discriminator.buffers(), sgan.mean_prediction]):
            metrics = discriminator_step(sgan, batch, config, backend)
        if sgan.generator is not None:
            metrics += generator_step(sgan, batch, config, backend)
    images = sum(config.batches.values())
    sgan.update_average((batch.step + 1) * images, images, config.ema)
    return metrics


def discriminator_step(
    sgan: SGAN, batch: SemiSupervisedBatch, config: Config, backend: Backend
) -> Metrics:
    """Updates D on labeled, unlabeled and generated images; raises as `train_step` does."""
    step, counts = Step.of(batch, config, backend), config.batches
    labels = batch.labels.to(backend.device, non_blocking=True)
    images = {"labeled": step.images(batch.labeled)}
    if "unlabeled" in counts:
        images["unlabeled"] = step.images(batch.unlabeled)
    if sgan.generator is not None:
        images["fake"] = _generate(sgan.generator, "discriminator", step)
        counts |= {"fake": config.batch.fake}
    targets = None
    if config.uses_consistency:
        targets = _targets(sgan, images["unlabeled"], step)

    weights = {  # the supervised term has weight 1
        "unlabeled": config.loss.unlabeled,
        "fake": config.loss.fake,
        "consistency": config.loss.consistency,
    }
    shares: dict[str, Tensor] = {}
    for micro in _micro_batches(images, "discriminator", step):
        micro_labels = micro.cut(labels)
        micro_targets = None if targets is None else micro.cut(targets)
        with sgan.discriminator.accumulate(sync=micro.last):
            # Positions need fp32: augmentation stays outside of autocast, here and below.
            joined = augment(torch.cat(list(micro.images.values())), config.augment, micro.rng)
            with backend.autocast():
                output = sgan.discriminator.forward(joined, micro.rng)
            parts = output.logits.split(list(micro.rng.sizes.values()))
            logits = dict(zip(micro.images, parts, strict=True))
            terms, fractions = _discriminator_terms(
                logits, micro_labels, micro_targets, counts, config
            )
            _add(shares, {f"d/{name}": term for name, term in terms.items()} | fractions)
            if (batch.step + 1) % config.train.log_every == 0:
                _add(shares, _squared_logit_gradients(terms, output.logits))
            weighted = [weights.get(name, 1.0) * term for name, term in terms.items()]
            sgan.discriminator.backward(torch.stack(weighted).sum())
    return _update(sgan.discriminator, "d", shares, config.optim.lr, step, sgan.brake)


def generator_step(
    sgan: SGAN, batch: SemiSupervisedBatch, config: Config, backend: Backend
) -> Metrics:
    """Updates G against the updated, frozen D; raises as `train_step` does.

    G makes its whole batch at once, because its batch norm mixes the images; D sees it in
    micro-batches. Gradients are collected at the images, and G gets them in one backward.
    """
    engine, step = sgan.generator, Step.of(batch, config, backend)
    assert engine is not None
    count, shares_of_loss = config.batch.fake, config.batch.accumulation * backend.world_size
    matching = config.loss.generator == "feature_matching"
    real_features: list[Tensor] = []
    if matching:
        images = {"unlabeled": step.images(batch.unlabeled)}
        real_features = _features(sgan, images, "generator/real", step)

    shares: dict[str, Tensor] = {}
    with engine.accumulate(sync=True):
        fake = _generate(engine, "generator", step)
        images = {"fake": fake.detach().requires_grad_()}
        outputs = _frozen_outputs(sgan, images, "generator/fake", step)
        if matching:
            if config.batch.accumulation == 1:
                only = next(outputs)
                outputs, fake_features = iter([only]), [only.features]
            else:
                # The mean over all micro-batches, which the loss of each needs, takes another pass.
                fake_features = _features(sgan, images, "generator/fake", step)
            real = real_features, config.batch.unlabeled
            means = losses.feature_means(real, (fake_features, count))
        for output in outputs:
            if matching:
                loss = losses.feature_matching(
                    means[0], output.features, means[1], count, shares_of_loss
                )
            else:
                odds = losses.log_odds_real(output.logits, config.loss.form)
                loss = losses.non_saturating(odds, count)
            _add(shares, {f"g/{config.loss.generator}": loss})
            torch.autograd.backward(loss)
        gradient = images["fake"].grad
        assert gradient is not None
        engine.backward((fake * gradient).sum())
    return _update(engine, "g", shares, config.optim.generator_lr, step, sgan.brake)


def rate(step: int, config: Config) -> float:
    """Factor of the learning rates: 1, then linear to 0 over the last `optim.decay` of the run."""
    tail = config.optim.decay * config.train.steps
    return min(1.0, (config.train.steps - step) / tail) if tail else 1.0


def _discriminator_terms(
    logits: dict[str, Tensor],
    labels: Tensor,
    targets: Tensor | None,
    counts: dict[str, int],
    config: Config,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """This rank's shares of D's loss terms on a micro-batch, and of fractions to report.

    `labels` (n,) belong to the labeled images, `targets` (n, N) to the unlabeled ones; `counts` are
    the sizes of the global batches.
    """
    form = config.loss.form
    terms = {"supervised": losses.supervised(logits["labeled"], labels, counts["labeled"])}
    wrong = losses.class_logits(logits["labeled"], form).argmax(1) != labels
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


def _squared_logit_gradients(terms: dict[str, Tensor], logits: Tensor) -> dict[str, Tensor]:
    """The squared norm of each term's gradient at D's logits: a term with none teaches nothing."""
    squares = {}
    for name, term in terms.items():
        (gradient,) = torch.autograd.grad(term, logits, retain_graph=True)
        squares[f"d/squared_logit_gradient/{name}"] = gradient.double().square().sum()
    return squares


def _generate(engine: Engine, phase: str, step: Step) -> Tensor:
    """This rank's rows of the global batch of fakes; with gradient only in G's own step."""
    backend, rows = step.backend, {"fake": step.rows["fake"]}
    rng = GlobalRandom(step.config.seed, f"{phase}/latent", step.number, rows, backend.device)
    z = engine.network.latent(rng).to(backend.dtype)  # type: ignore[operator]
    with backend.autocast():
        if phase == "generator":
            return engine.forward(z)  # type: ignore[no-any-return]
        with torch.no_grad():
            return engine.network(z).to(z.dtype)  # type: ignore[no-any-return]


def _micro_batches(images: dict[str, Tensor], phase: str, step: Step) -> Iterator[MicroBatch]:
    """Cuts this rank's images into `batch.accumulation` micro-batches.

    Each image gets the same random numbers at any accumulation and world size.
    """
    n, seed, device = step.config.batch.accumulation, step.config.seed, step.backend.device
    for number in range(n):
        cut = {kind: _part(x, number, n) for kind, x in images.items()}
        rows = {kind: _part(step.rows[kind], number, n) for kind in images}
        yield MicroBatch(cut, GlobalRandom(seed, phase, step.number, rows, device), number, n)


def _part(rows: Rows, number: int, total: int) -> Rows:
    """The part of rows, or of their numbers, that micro-batch `number` of `total` has."""
    own = share(len(rows), number, total)
    return rows[own.start : own.stop]


def _frozen_outputs(
    sgan: SGAN, images: dict[str, Tensor], phase: str, step: Step
) -> Iterator[DiscriminatorOutput]:
    """The frozen D's outputs for augmented images of one kind; gradients flow to the images only."""
    discriminator = sgan.discriminator.network
    for micro in _micro_batches(images, phase, step):
        (part,) = micro.images.values()
        augmented = augment(part, step.config.augment, micro.rng)
        with frozen(discriminator), step.backend.autocast():
            output = discriminator(augmented, micro.rng)
        yield output


@torch.no_grad()
def _features(sgan: SGAN, images: dict[str, Tensor], phase: str, step: Step) -> list[Tensor]:
    """The frozen D's features (n, F) of this rank's images of one kind, by micro-batch."""
    return [output.features for output in _frozen_outputs(sgan, images, phase, step)]


@torch.no_grad()
def _targets(sgan: SGAN, unlabeled: Tensor, step: Step) -> Tensor:
    """The averaged D's class probabilities of unlabeled images, aligned and sharpened, (n, N).

    Rows whose largest probability is below `loss.threshold` are zeros.
    """
    config, backend = step.config, step.backend
    probabilities = []
    for micro in _micro_batches({"unlabeled": unlabeled}, "teacher", step):
        images = augment(micro.images["unlabeled"], config.teacher_augment, micro.rng)
        with backend.autocast():
            logits = sgan.average(images).logits
        probabilities.append(losses.class_logits(logits, config.loss.form).softmax(1))
    p = torch.cat(probabilities)
    mean = all_sum(p.sum(0)) / config.batch.unlabeled
    sgan.mean_prediction.lerp_(mean.to(backend.dtype), ALIGNMENT_MOMENTUM)
    p = losses.aligned(p, sgan.mean_prediction)
    targets = losses.sharpened(p, config.loss.temperature)
    return losses.confident(targets, p, config.loss.threshold)


def _add(shares: dict[str, Tensor], more: dict[str, Tensor]) -> None:
    """Adds the shares of a micro-batch to those of the ones before it."""
    for name, value in more.items():
        shares[name] = shares.get(name, 0) + value.detach()


def _update(
    engine: Engine, prefix: str, shares: dict[str, Tensor], lr: float, step: Step, brake: Brake
) -> Metrics:
    """Takes the optimizer step if losses and gradient are finite; returns the global values."""
    dtype, norm_name = next(iter(shares.values())).dtype, [f"{prefix}/gradient_norm"]
    values = all_sum(torch.stack([value.to(dtype) for value in shares.values()]))
    metrics = Metrics(list(shares), values)
    norm = engine.clip_gradients()
    if norm is not None:
        metrics += Metrics(norm_name, norm.to(dtype).view(1))
    brake.check(metrics.values)
    if not engine.skips_on_device:
        check_finite(dict(zip(metrics.names, metrics.values.tolist(), strict=True)), step.number)
    norm = engine.step(lr * rate(step.number, step.config), brake.flag)
    if norm is not None:  # ZeRO knows the norm only now, and skips the step if it is not finite
        metrics += Metrics(norm_name, norm.to(dtype).view(1))
        brake.check(metrics.values)
        check_finite({norm_name[0]: float(norm)}, step.number)
    return metrics


def check_finite(metrics: dict[str, float], step: int) -> None:
    """Raises NonFiniteLoss, which names the step and the first metric that is NaN or infinite."""
    bad = [name for name, value in metrics.items() if not math.isfinite(value)]
    if bad:
        raise NonFiniteLoss(
            f"{', '.join(bad)} became {metrics[bad[0]]} at step {step}, before its update: start"
            " again with another --run_dir and lower learning rates or optim.clip_norm; checkpoints"
            " of earlier steps are good"
        )
