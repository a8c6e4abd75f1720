"""One step of D and one of G: each a single forward and a single backward over a joined batch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sgan_dist import losses
from sgan_dist.augment import affine
from sgan_dist.backend import Backend, Player, frozen
from sgan_dist.config import Config
from sgan_dist.data.loader import SemiSupervisedBatch
from sgan_dist.distributed import all_sum
from sgan_dist.errors import NonFiniteLoss
from sgan_dist.networks import Networks, to_float
from sgan_dist.noise import Draw, Rows


def discriminator_step(
    networks: Networks, batch: SemiSupervisedBatch, config: Config, backend: Backend
) -> dict[str, float]:
    """Updates D on labeled, unlabeled and generated images; returns global means.

    Raises:
        NonFiniteLoss: on every rank, before the optimizer step.
    """
    form, step = config.loss.form, batch.step
    labels = batch.labels.to(backend.device, non_blocking=True)
    parts = {"labeled": to_float(batch.labeled, backend)}
    if networks.generator is not None:
        parts["unlabeled"] = to_float(batch.unlabeled, backend)
        parts["fake"] = _generate(networks.generator, "discriminator", config, backend, step)
    draw = _draw("discriminator", list(parts.values()), config, backend, step)

    with backend.autocast():
        images = affine(torch.cat(list(parts.values())), config.augment, draw)
        out = networks.discriminator.wrapped(images, draw)
    sizes = [len(part) for part in parts.values()]
    logits = dict(zip(parts, out.logits.split(sizes), strict=True))
    totals = {name: len(part) * backend.world_size for name, part in parts.items()}

    class_logits = losses.class_logits(logits["labeled"], form)
    shares = {
        "d/supervised": losses.supervised(logits["labeled"], labels, totals["labeled"]),
        "d/train_error": (class_logits.argmax(1) != labels).sum() / totals["labeled"],
    }
    loss = shares["d/supervised"]
    if networks.generator is not None:
        odds = {name: losses.log_odds_real(logits[name], form) for name in ("unlabeled", "fake")}
        shares["d/unlabeled"] = losses.real(odds["unlabeled"], totals["unlabeled"])
        shares["d/fake"] = losses.fake(odds["fake"], totals["fake"])
        shares["d/fakes_detected"] = (odds["fake"] < 0).sum() / totals["fake"]
        loss = loss + config.loss.unlabeled * shares["d/unlabeled"]
        loss = loss + config.loss.fake * shares["d/fake"]
    return _update(networks.discriminator, "d", loss, shares, config.optim.lr, config, step)


def generator_step(
    networks: Networks, batch: SemiSupervisedBatch, config: Config, backend: Backend
) -> dict[str, float]:
    """Updates G against the updated, frozen D; returns global means. Raises as D's step does."""
    player, step = networks.generator, batch.step
    assert player is not None
    fake = _generate(player, "generator", config, backend, step)
    matching = config.loss.generator == "feature_matching"
    parts = [to_float(batch.unlabeled, backend), fake] if matching else [fake]
    draw = _draw("generator", parts, config, backend, step)

    with frozen(networks.discriminator.network) as discriminator, backend.autocast():
        out = discriminator(affine(torch.cat(parts), config.augment, draw), draw)
    if matching:
        real_features, fake_features = out.features.split([len(part) for part in parts])
        loss = losses.feature_matching(real_features.detach(), fake_features)
    else:
        odds = losses.log_odds_real(out.logits, config.loss.form)
        loss = losses.non_saturating(odds, len(fake) * backend.world_size)
    name = f"g/{config.loss.generator}"
    return _update(player, "g", loss, {name: loss}, config.optim.generator_lr, config, step)


def rate(step: int, config: Config) -> float:
    """Factor of the learning rates: 1, then linear to 0 over the last `optim.decay` of the run."""
    tail = config.optim.decay * config.train.steps
    return min(1.0, (config.train.steps - step) / tail) if tail else 1.0


def _generate(player: Player, phase: str, config: Config, backend: Backend, step: int) -> Tensor:
    """This rank's part of the global batch of fakes; with gradient in G's own step alone."""
    rows = Rows.of(config.train.fake_batch, backend.rank, backend.world_size)
    draw = Draw(config.seed, f"{phase}/latent", step, [rows], backend.device)
    z = player.network.latent(draw)  # type: ignore[operator]
    z = z.to(backend.dtype)
    with backend.autocast():
        if phase == "generator":
            return player.wrapped(z)  # type: ignore[no-any-return]
        with torch.no_grad():
            return player.network(z).to(z.dtype)  # type: ignore[no-any-return]


def _draw(phase: str, parts: list[Tensor], config: Config, backend: Backend, step: int) -> Draw:
    rows = [
        Rows.of(len(part) * backend.world_size, backend.rank, backend.world_size) for part in parts
    ]
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
            f"{', '.join(bad)} became {metrics[bad[0]]} at step {step}, before its update: lower"
            " optim.lr and optim.generator_lr, or set optim.clip_norm; earlier checkpoints are good"
        )
    player.step(lr * rate(step, config))
    return metrics
