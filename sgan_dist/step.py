"""One step of D and one of G, each with one backward: what is minimized, and in what order."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sgan_dist import losses
from sgan_dist.augment import augment
from sgan_dist.backend import Backend, Player, frozen
from sgan_dist.config import Config
from sgan_dist.data.loader import SemiSupervisedBatch
from sgan_dist.distributed import all_sum
from sgan_dist.errors import NonFiniteLoss
from sgan_dist.networks import Networks, to_float
from sgan_dist.noise import Draw, Rows

ALIGNMENT_MOMENTUM = 0.01  # of the averaged D's mean prediction


def discriminator_step(
    networks: Networks, batch: SemiSupervisedBatch, config: Config, backend: Backend
) -> dict[str, float]:
    """Updates D on labeled, unlabeled and generated images; returns global means.

    Raises:
        NonFiniteLoss: on every rank, before the optimizer step.
    """
    form, weights, step = config.loss.form, config.loss, batch.step
    labels = batch.labels.to(backend.device, non_blocking=True)
    parts = {"labeled": to_float(batch.labeled, backend)}
    if len(batch.unlabeled):
        parts["unlabeled"] = to_float(batch.unlabeled, backend)
    if networks.generator is not None:
        parts["fake"] = _generate(networks.generator, "discriminator", config, backend, step)
    draw = _draw("discriminator", parts, config, backend, step)

    # Positions need fp32: augmentation stays outside of autocast, here and below.
    images = augment(torch.cat(list(parts.values())), config.augment, draw)
    with backend.autocast():
        out = networks.discriminator.wrapped(images, draw)
    logits = dict(zip(parts, out.logits.split(list(draw.sizes.values())), strict=True))
    totals = {name: size * backend.world_size for name, size in draw.sizes.items()}

    terms = {"supervised": (1.0, losses.supervised(logits["labeled"], labels, totals["labeled"]))}
    wrong = losses.class_logits(logits["labeled"], form).argmax(1) != labels
    seen = {"d/train_error": wrong.sum() / totals["labeled"]}
    if networks.generator is not None:
        odds = {name: losses.log_odds_real(logits[name], form) for name in ("unlabeled", "fake")}
        terms["unlabeled"] = weights.unlabeled, losses.real(odds["unlabeled"], totals["unlabeled"])
        terms["fake"] = weights.fake, losses.fake(odds["fake"], totals["fake"])
        seen["d/fakes_detected"] = (odds["fake"] < 0).sum() / totals["fake"]
    if weights.consistency:
        targets = _targets(networks, parts["unlabeled"], config, backend, step)
        guesses = losses.class_logits(logits["unlabeled"], form)
        loss = losses.soft_cross_entropy(guesses, targets, totals["unlabeled"])
        ramp = min(1.0, (step + 1) / max(weights.consistency_rampup, 1))
        terms["consistency"] = ramp * weights.consistency, loss
    if (step + 1) % config.train.log_every == 0:  # a loss that moves nothing raises an alarm
        for name, (_, loss) in terms.items():
            (gradient,) = torch.autograd.grad(loss, out.logits, retain_graph=True)
            seen[f"d/squared_logit_gradient/{name}"] = gradient.double().square().sum()

    shares = {f"d/{name}": loss for name, (_, loss) in terms.items()} | seen
    total = torch.stack([weight * loss for weight, loss in terms.values()]).sum()
    return _update(networks.discriminator, "d", total, shares, config.optim.lr, config, step)


def generator_step(
    networks: Networks, batch: SemiSupervisedBatch, config: Config, backend: Backend
) -> dict[str, float]:
    """Updates G against the updated, frozen D; returns global means. Raises as D's step does."""
    player, step = networks.generator, batch.step
    assert player is not None
    discriminator = networks.discriminator.network
    fake = _generate(player, "generator", config, backend, step)
    draw = _draw("generator/fake", {"fake": fake}, config, backend, step)
    images = augment(fake, config.augment, draw)
    with frozen(discriminator), backend.autocast():
        out = discriminator(images, draw)
    if config.loss.generator == "feature_matching":
        # Apart from the fakes: it needs no backward, and D does not mix samples of two parts.
        unlabeled = to_float(batch.unlabeled, backend)
        draw = _draw("generator/real", {"unlabeled": unlabeled}, config, backend, step)
        images = augment(unlabeled, config.augment, draw)
        with torch.no_grad(), frozen(discriminator), backend.autocast():
            real = discriminator(images, draw)
        loss = losses.feature_matching(real.features, out.features)
    else:
        odds = losses.log_odds_real(out.logits, config.loss.form)
        loss = losses.non_saturating(odds, len(odds) * backend.world_size)
    name = f"g/{config.loss.generator}"
    return _update(player, "g", loss, {name: loss}, config.optim.generator_lr, config, step)


def rate(step: int, config: Config) -> float:
    """Factor of the learning rates: 1, then linear to 0 over the last `optim.decay` of the run."""
    tail = config.optim.decay * config.train.steps
    return min(1.0, (config.train.steps - step) / tail) if tail else 1.0


def _generate(player: Player, phase: str, config: Config, backend: Backend, step: int) -> Tensor:
    """This rank's part of the global batch of fakes; with gradient in G's own step alone."""
    rows = Rows.of(config.train.fake_batch, backend.rank, backend.world_size)
    draw = Draw(config.seed, f"{phase}/latent", step, {"fake": rows}, backend.device)
    z = player.network.latent(draw).to(backend.dtype)  # type: ignore[operator]
    with backend.autocast():
        if phase == "generator":
            return player.wrapped(z)  # type: ignore[no-any-return]
        with torch.no_grad():
            return player.network(z).to(z.dtype)  # type: ignore[no-any-return]


@torch.no_grad()
def _targets(
    networks: Networks, unlabeled: Tensor, config: Config, backend: Backend, step: int
) -> Tensor:
    """The averaged D's class probabilities of unlabeled images, aligned and sharpened, (n, N)."""
    draw = _draw("teacher", {"unlabeled": unlabeled}, config, backend, step)
    images = augment(unlabeled, config.teacher_augment, draw)
    with backend.autocast():
        logits = networks.average(images).logits
    p = losses.class_logits(logits, config.loss.form).softmax(1)
    mean = all_sum(p.sum(0)) / (len(p) * backend.world_size)
    networks.mean_prediction.lerp_(mean.to(backend.dtype), ALIGNMENT_MOMENTUM)
    return losses.sharpened(losses.aligned(p, networks.mean_prediction), config.loss.temperature)


def _draw(
    phase: str, parts: dict[str, Tensor], config: Config, backend: Backend, step: int
) -> Draw:
    rows = {
        name: Rows.of(len(part) * backend.world_size, backend.rank, backend.world_size)
        for name, part in parts.items()
    }
    return Draw(config.seed, phase, step, rows, backend.device)


def _update(
    player: Player, prefix: str, loss: Tensor, shares: dict[str, Tensor], lr: float,
    config: Config, step: int,
) -> dict[str, float]:  # fmt: skip
    """Backward, the finite check, the optimizer step; one wait for the device."""
    totals = all_sum(torch.stack([value.detach().to(loss.dtype) for value in shares.values()]))
    norm = player.backward(loss, config.optim.clip_norm)
    values = torch.cat([totals, norm.to(totals.dtype).view(1)]).tolist()
    metrics = dict(zip([*shares, f"{prefix}/gradient_norm"], values, strict=True))
    bad = [name for name, value in metrics.items() if not math.isfinite(value)]
    if bad:
        raise NonFiniteLoss(
            f"{', '.join(bad)} became {metrics[bad[0]]} at step {step}, before its update:"
            " start anew, with another --run_dir, at lower rates or with optim.clip_norm; checkpoints"
            " of earlier steps are good"
        )
    player.step(lr * rate(step, config))
    return metrics
