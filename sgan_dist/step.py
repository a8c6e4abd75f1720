"""One step of D and one of G, each with one backward: what is minimized, and in what order."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sgan_dist import losses
from sgan_dist.augment import augment
from sgan_dist.config import Config
from sgan_dist.data.loader import SemiSupervisedBatch
from sgan_dist.distributed import all_sum
from sgan_dist.errors import NonFiniteLoss
from sgan_dist.networks import Networks, to_float
from sgan_dist.noise import Draw, Rows
from sgan_dist.players import Backend, Player, frozen

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
    whole = {"labeled": to_float(batch.labeled, backend)}
    if len(batch.unlabeled):
        whole["unlabeled"] = to_float(batch.unlabeled, backend)
    if networks.generator is not None:
        whole["fake"] = _generate(networks.generator, "discriminator", config, backend, step)
    totals = {name: len(images) * backend.world_size for name, images in whole.items()}
    targets = None
    if weights.consistency:
        targets = _targets(networks, whole["unlabeled"], config, backend, step)
    shares: dict[str, Tensor] = {}
    for part in _parts(whole, "discriminator", config, backend, step):
        with networks.discriminator.part(part.last):
            # Positions need fp32: augmentation stays outside of autocast, here and below.
            images = augment(torch.cat(list(part.images.values())), config.augment, part.draw)
            with backend.autocast():
                out = networks.discriminator.wrapped(images, part.draw)
            sizes = list(part.draw.sizes.values())
            logits = dict(zip(part.images, out.logits.split(sizes), strict=True))

            y = labels[part.rows["labeled"]]
            loss = losses.supervised(logits["labeled"], y, totals["labeled"])
            terms = {"supervised": (1.0, loss)}
            wrong = losses.class_logits(logits["labeled"], form).argmax(1) != y
            seen = {"d/train_error": wrong.sum() / totals["labeled"]}
            if networks.generator is not None:
                odds = {n: losses.log_odds_real(logits[n], form) for n in ("unlabeled", "fake")}
                loss = losses.real(odds["unlabeled"], totals["unlabeled"])
                terms["unlabeled"] = weights.unlabeled, loss
                terms["fake"] = weights.fake, losses.fake(odds["fake"], totals["fake"])
                seen["d/fakes_detected"] = (odds["fake"] < 0).sum() / totals["fake"]
            if targets is not None:
                guesses = losses.class_logits(logits["unlabeled"], form)
                wanted = targets[part.rows["unlabeled"]]
                loss = losses.soft_cross_entropy(guesses, wanted, totals["unlabeled"])
                terms["consistency"] = weights.consistency, loss
                if weights.threshold:
                    seen["d/confident"] = wanted.any(1).sum() / totals["unlabeled"]
            if (step + 1) % config.train.log_every == 0:  # a loss that moves nothing: an alarm
                for name, (_, loss) in terms.items():
                    (gradient,) = torch.autograd.grad(loss, out.logits, retain_graph=True)
                    seen[f"d/squared_logit_gradient/{name}"] = gradient.double().square().sum()

            _add(shares, {f"d/{name}": loss for name, (_, loss) in terms.items()} | seen)
            networks.discriminator.backward(_weighted(terms))
    return _update(networks.discriminator, "d", shares, config.optim.lr, config, step)


def generator_step(
    networks: Networks, batch: SemiSupervisedBatch, config: Config, backend: Backend
) -> dict[str, float]:
    """Updates G against the updated, frozen D; returns global means. Raises as D's step does."""
    player, step = networks.generator, batch.step
    assert player is not None
    discriminator = networks.discriminator.network
    matching = config.loss.generator == "feature_matching"
    count, shares = config.train.fake_batch, dict[str, Tensor]()
    parts = config.train.accumulation * backend.world_size
    real_mean = fake_mean = features = None
    if matching:
        # Apart from the fakes: it needs no backward, and D does not mix samples of two parts.
        real = {"unlabeled": to_float(batch.unlabeled, backend)}
        found = _features(discriminator, real, "generator/real", config, backend, step)
        real_mean = losses.feature_mean(found, len(batch.unlabeled) * backend.world_size)
    # G sees its whole batch, which its batch norm mixes, and D part after part; the images'
    # gradients are passed on to G at the end.
    with player.part(last=True):
        fake = _generate(player, "generator", config, backend, step)
        leaf = fake.detach().requires_grad_()
        if matching and config.train.accumulation > 1:
            whole = {"fake": leaf}
            features = _features(discriminator, whole, "generator/fake", config, backend, step)
        for part in _parts({"fake": leaf}, "generator/fake", config, backend, step):
            images = augment(part.images["fake"], config.augment, part.draw)
            with frozen(discriminator), backend.autocast():
                out = discriminator(images, part.draw)
            if real_mean is not None:
                if fake_mean is None:
                    fakes = features or [out.features]  # without accumulation, this part is all
                    fake_mean = losses.feature_mean(fakes, count)
                loss = losses.feature_matching(real_mean, out.features, fake_mean, count, parts)
            else:
                odds = losses.log_odds_real(out.logits, config.loss.form)
                loss = losses.non_saturating(odds, count)
            _add(shares, {f"g/{config.loss.generator}": loss})
            torch.autograd.backward([loss])
        assert leaf.grad is not None
        player.backward((fake * leaf.grad).sum())
    return _update(player, "g", shares, config.optim.generator_lr, config, step)


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


@dataclass(frozen=True)
class _Part:
    """What passes D at once: some of each of this rank's parts of the global batch."""

    images: dict[str, Tensor]
    rows: dict[str, slice]
    """their places among this rank's images"""
    draw: Draw
    last: bool


def _parts(
    whole: dict[str, Tensor], phase: str, config: Config, backend: Backend, step: int
) -> Iterator[_Part]:
    """This rank's images in `train.accumulation` parts, with the noise that is theirs anyhow."""
    parts = config.train.accumulation
    for number in range(parts):
        rows, drawn = {}, {}
        for name, images in whole.items():
            mine = Rows.of(len(images), number, parts)
            rows[name] = slice(mine.start, mine.stop)
            first = backend.rank * len(images)
            total = len(images) * backend.world_size
            drawn[name] = Rows(total, first + mine.start, first + mine.stop)
        draw = Draw(config.seed, phase, step, drawn, backend.device)
        images_of = {name: whole[name][place] for name, place in rows.items()}
        yield _Part(images_of, rows, draw, number == parts - 1)


@torch.no_grad()
def _features(
    discriminator: nn.Module,
    whole: dict[str, Tensor],
    phase: str,
    config: Config,
    backend: Backend,
    step: int,
) -> list[Tensor]:
    """The features (n, F) of this rank's images, `whole`, part after part."""
    features = []
    for part in _parts(whole, phase, config, backend, step):
        (images,) = part.images.values()
        with frozen(discriminator), backend.autocast():
            out = discriminator(augment(images, config.augment, part.draw), part.draw)
        features.append(out.features)
    return features


@torch.no_grad()
def _targets(
    networks: Networks, unlabeled: Tensor, config: Config, backend: Backend, step: int
) -> Tensor:
    """The averaged D's class probabilities of unlabeled images, aligned and sharpened, (n, N).

    Those of an image that it is not sure of, by `loss.threshold`, are zeros.
    """
    found = []
    for part in _parts({"unlabeled": unlabeled}, "teacher", config, backend, step):
        images = augment(part.images["unlabeled"], config.teacher_augment, part.draw)
        with backend.autocast():
            logits = networks.average(images).logits
        found.append(losses.class_logits(logits, config.loss.form).softmax(1))
    p = torch.cat(found)
    mean = all_sum(p.sum(0)) / (len(p) * backend.world_size)
    networks.mean_prediction.lerp_(mean.to(backend.dtype), ALIGNMENT_MOMENTUM)
    p = losses.aligned(p, networks.mean_prediction)
    targets = losses.sharpened(p, config.loss.temperature)
    return losses.confident(targets, p, config.loss.threshold)


def _weighted(terms: dict[str, tuple[float, Tensor]]) -> Tensor:
    """The sum of losses by their weights."""
    return torch.stack([weight * loss for weight, loss in terms.values()]).sum()


def _add(shares: dict[str, Tensor], more: dict[str, Tensor]) -> None:
    """Adds the shares of a part to those of the parts before."""
    for name, value in more.items():
        shares[name] = shares[name] + value.detach() if name in shares else value.detach()


def _update(
    player: Player, prefix: str, shares: dict[str, Tensor], lr: float, config: Config, step: int
) -> dict[str, float]:
    """The finite check and the optimizer step, after the backward; one wait for the device."""
    dtype = next(iter(shares.values())).dtype
    totals = all_sum(torch.stack([value.to(dtype) for value in shares.values()]))
    norm, norm_name = player.clipped(), f"{prefix}/gradient_norm"
    if norm is not None:
        totals = torch.cat([totals, norm.to(totals.dtype).view(1)])
    names = [*shares, norm_name] if norm is not None else list(shares)
    metrics = dict(zip(names, totals.tolist(), strict=True))
    _check_finite(metrics, step)
    after = player.step(lr * rate(step, config))
    if after is not None:  # ZeRO knows the norm only now, and left the step out if it is not finite
        metrics[norm_name] = float(after)
        _check_finite(metrics, step)
    return metrics


def _check_finite(metrics: dict[str, float], step: int) -> None:
    bad = [name for name, value in metrics.items() if not math.isfinite(value)]
    if bad:
        raise NonFiniteLoss(
            f"{', '.join(bad)} became {metrics[bad[0]]} at step {step}, before its update:"
            " start anew, with another --run_dir, at lower rates or with optim.clip_norm; checkpoints"
            " of earlier steps are good"
        )
