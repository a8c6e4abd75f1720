"""One step of D, one of G, each with one backward: what is minimized, and in what order.

The host waits for nothing: metrics are tensors, and the brake, not the host, leaves out an update that
is not finite.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sgan_dist.config import Config
from sgan_dist.data.loader import SemiSupervisedBatch
from sgan_dist.errors import NonFiniteLoss
from sgan_dist.gan import losses
from sgan_dist.gan.augment import augment
from sgan_dist.gan.brake import Brake
from sgan_dist.gan.networks import SGAN
from sgan_dist.gan.phases import MicroBatch, Step, generate, part
from sgan_dist.parallel.collectives import all_sum
from sgan_dist.parallel.engine import Backend, Engine

ALIGNMENT_MOMENTUM = 0.01  # of the averaged D's mean prediction


@dataclass(frozen=True)
class Metrics:
    """Global values of a step, (k,) on the device, by name."""

    names: list[str]
    values: Tensor

    def __add__(self, other: Metrics) -> Metrics:
        return Metrics(self.names + other.names, torch.cat([self.values, other.values]))


def train_step(
    sgan: SGAN,
    batch: SemiSupervisedBatch,
    config: Config,
    backend: Backend,
    flags: Mapping[str, bool],
) -> Metrics:
    """Updates D, then G, then the averaged D; returns global means, and how many ranks set each flag.

    If D's losses or gradient are not finite, everything stays as it was before the step, and in all
    later ones; if G's are not, D has made the step. The caller sees it in the metrics.

    Raises:
        NonFiniteLoss: under DeepSpeed, on every rank, before the update.
    """
    step = Step.of(batch, config, backend)
    discriminator, brake = sgan.discriminator.network, sgan.brake
    generator_buffers = [] if sgan.generator is None else sgan.generator.network.buffers()
    with brake.protecting(generator_buffers):  # D's step makes images with G, too
        with brake.protecting([*discriminator.buffers(), sgan.mean_prediction]):
            metrics = discriminator_step(sgan, batch, step, flags)
        if sgan.generator is not None:
            metrics += generator_step(sgan, batch, step)
    images = sum(config.batches.values())
    sgan.update_average((batch.step + 1) * images, images, config.ema)
    return metrics


def discriminator_step(
    sgan: SGAN, batch: SemiSupervisedBatch, step: Step, flags: Mapping[str, bool]
) -> Metrics:
    """Updates D on labeled, unlabeled and generated images; returns and raises as `train_step` does."""
    engine, config, backend = sgan.discriminator, step.config, step.backend
    total = config.batch.accumulation
    labels = batch.labels.to(backend.device, non_blocking=True)
    images = {"labeled": step.images(batch.labeled)}
    if "unlabeled" in config.batches:
        images["unlabeled"] = step.images(batch.unlabeled)
    if sgan.generator is not None:
        latent = step.latent_random("discriminator/latent")
        with torch.no_grad():
            fake = generate(sgan.generator.network, latent, backend)
        images["fake"] = fake.to(backend.dtype)
    targets = None
    if config.uses_consistency:
        targets = _targets(sgan, images["unlabeled"], step)

    diagnose = (batch.step + 1) % config.train.log_every == 0
    values: dict[str, Tensor] = {}
    for number, micro in enumerate(step.micro_batches(images, "discriminator")):
        own_labels = part(labels, number, total)
        own_targets = None if targets is None else part(targets, number, total)
        with engine.accumulate(sync=number == total - 1):
            shares = engine.forward(micro, own_labels, own_targets, diagnose)
            engine.backward(shares.loss)
        for name, value in shares.values.items():
            values[name] = values.get(name, 0) + value
    # filled, not copied, on the device; summed over ranks with the losses
    values |= {
        name: torch.full((), float(flag), device=backend.device) for name, flag in flags.items()
    }
    return _update(engine, "d", values, config.optim.lr, step, sgan.brake)


def generator_step(sgan: SGAN, batch: SemiSupervisedBatch, step: Step) -> Metrics:
    """Updates G against the updated, frozen D; raises as `train_step` does."""
    engine, config = sgan.generator, step.config
    assert engine is not None
    real: list[MicroBatch] = []
    if config.loss.generator == "feature_matching":
        unlabeled = {"unlabeled": step.images(batch.unlabeled)}
        real = step.micro_batches(unlabeled, "generator/real")
    latent, fake = step.latent_random("generator/latent"), step.random(["fake"], "generator/fake")
    with engine.accumulate(sync=True):
        shares = engine.forward(latent, fake, real)
        engine.backward(shares.loss)
    return _update(engine, "g", shares.values, config.optim.generator_lr, step, sgan.brake)


def rate(step: int, config: Config) -> float:
    """Factor of the learning rates: 1, then linear to 0 over the last `optim.decay` of the run."""
    tail = config.optim.decay * config.train.steps
    return min(1.0, (config.train.steps - step) / tail) if tail else 1.0


@torch.no_grad()
def _targets(sgan: SGAN, unlabeled: Tensor, step: Step) -> Tensor:
    """The averaged D's class probabilities of unlabeled images, aligned and sharpened, (n, N).

    Rows whose largest probability is below `loss.threshold` are zeros.
    """
    config, backend = step.config, step.backend
    probabilities = []
    for micro in step.micro_batches({"unlabeled": unlabeled}, "teacher"):
        images = augment(micro.images["unlabeled"], config.teacher_augment, micro.rng)
        with backend.autocast():
            logits = sgan.average(images).logits
        probabilities.append(losses.class_logits(logits, config.loss.form).softmax(1))
    p = torch.cat(probabilities)
    mean = all_sum(p.sum(0)) / config.batch.unlabeled
    sgan.mean_prediction.lerp_(mean.to(backend.dtype), ALIGNMENT_MOMENTUM)
    p = losses.aligned(p, sgan.mean_prediction, sgan.prior)
    targets = losses.sharpened(p, config.loss.temperature)
    return losses.confident(targets, p, config.loss.threshold)


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
