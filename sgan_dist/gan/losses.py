"""The losses of an (N+1)-class discriminator and of its generator, exact over any number of ranks.

D gives logits l. In the implied form (Salimans et al. 2016, arXiv:1606.03498, sec. 5) there are N of
them, and the fake logit is fixed at 0; in the explicit form the fake logit is the (N+1)-th. With
`t = logsumexp(l over real classes) - l_fake`, the log odds that x is real, both read

    log p(real | x) = -softplus(-t)        log p(fake | x) = -softplus(t)

The supervised term is the cross-entropy over all classes of the form: N in the implied form, N+1 in
the explicit form, where it is the implied term plus `softplus(-t)` of the labeled image.

Every loss is this rank's *share* (see `sgan_dist.parallel.collectives`): shares add up over ranks to
the global value, in value and in gradient. Losses are computed in at least fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sgan_dist.parallel.collectives import all_sum

Form = Literal["implied", "explicit"]

PRIOR_FLOOR = 0.1


def log_odds_real(logits: Tensor, form: Form) -> Tensor:
    """log p(real | x) - log p(fake | x), (n,), from logits (n, N) or (n, N+1)."""
    logits = _upcast(logits)
    if form == "implied":
        return logits.logsumexp(1)
    return logits[:, :-1].logsumexp(1) - logits[:, -1]


def class_logits(logits: Tensor, form: Form) -> Tensor:
    """The N logits of p(y | x, real), (n, N), at least fp32."""
    return _upcast(logits if form == "implied" else logits[:, :-1])


def supervised(logits: Tensor, labels: Tensor, count: int, weights: Tensor | None = None) -> Tensor:
    """Cross-entropy of labeled images; `count` is the global number of them.

    `weights` (number of logits,), see `balanced_weights`: of each class.
    """
    logits = _upcast(logits)
    if weights is not None:
        weights = weights.to(logits.dtype)
    return F.cross_entropy(logits, labels, weights, reduction="sum") / count


def balanced_weights(histogram: Sequence[int], outputs: int) -> Tensor:
    """Weights, fp64 (outputs,), of the classes, n / (N * n_class): their mean over the n labels is 1.

    For the fake class and those without a label 1, which no label uses.
    """
    weights = torch.ones(outputs, dtype=torch.float64)
    counts = torch.tensor(histogram, dtype=torch.float64)
    shown = (counts > 0).nonzero().flatten()
    weights[shown] = counts.sum() / (len(shown) * counts[shown])
    return weights


def labeled_prior(histogram: Sequence[int]) -> Tensor:
    """The labels' shares of the classes, fp64 (N,), none below PRIOR_FLOOR of a uniform share."""
    counts = torch.tensor(histogram, dtype=torch.float64)
    share = (counts / counts.sum()).clamp(min=PRIOR_FLOOR / len(counts))
    return share / share.sum()


def real(log_odds: Tensor, count: int) -> Tensor:
    """-log p(real | x), for unlabeled images with log odds (n,); `count` is global."""
    return F.softplus(-log_odds).sum() / count


def fake(log_odds: Tensor, count: int) -> Tensor:
    """-log p(fake | x), for generated images with log odds (n,); `count` is global."""
    return F.softplus(log_odds).sum() / count


def feature_matching(
    real_mean: Tensor, fake_features: Tensor, fake_mean: Tensor, count: int, shares: int
) -> Tensor:
    """Mean squared difference of the global batches' mean features.

    Salimans et al. 2016, arXiv:1606.03498, sec. 3.1. The mean of per-rank losses would be another
    loss, so the means are global and have no gradient; it comes from `fake_features` alone.

    Args:
        real_mean: mean features (F,) of the global batch of real images; see `feature_means`.
        fake_features: features (n, F) of one micro-batch of generated images, with gradient.
        fake_mean: mean features (F,) of the global batch of generated images.
        count: number of generated images in the global batch.
        shares: number of micro-batches over all ranks; each computes the same value.
    """
    own = _upcast(fake_features).sum(0)
    difference = real_mean - (fake_mean + (own - own.detach()) / count)
    loss = difference.square().mean()
    return loss - loss.detach() * (1 - 1 / shares)


def feature_means(*batches: tuple[Sequence[Tensor], int]) -> Tensor:
    """Mean features (k, F) of k global batches, in one collective; no gradient.

    Of each batch: this rank's micro-batches of features (n, F), and the global number of images.
    """
    sums = [
        torch.stack([_upcast(f.detach()).sum(0) for f in features]).sum(0) / count
        for features, count in batches
    ]
    return all_sum(torch.stack(sums))


def non_saturating(log_odds: Tensor, count: int) -> Tensor:
    """-log p(real | G(z)), for G; `count` is global. Goodfellow 2014, arXiv:1406.2661, sec. 3."""
    return real(log_odds, count)


def soft_cross_entropy(class_logits: Tensor, targets: Tensor, count: int) -> Tensor:
    """-sum_y targets log softmax(class_logits), both (n, N); `count` is global."""
    return -(targets * class_logits.log_softmax(1)).sum() / count


def aligned(p: Tensor, mean: Tensor, prior: Tensor | None = None) -> Tensor:
    """Distributions p (n, N) corrected by the ratio of a marginal to their mean (N,).

    Distribution alignment (ReMixMatch, arXiv:1911.09785, sec. 3.1). The marginal is `prior` (N,), or
    uniform. With a prior no class is raised more than 1 / PRIOR_FLOOR times: one that is never
    predicted would else blow up.
    """
    ratio = p / mean if prior is None else p * (prior / mean).clamp(max=1 / PRIOR_FLOOR)
    return ratio / ratio.sum(1, keepdim=True)


def sharpened(p: Tensor, temperature: float) -> Tensor:
    """p^(1/T), normalized, for p (n, N) (MixMatch, arXiv:1905.02249, eq. 7)."""
    return (p.log() / temperature).softmax(1)


def confident(targets: Tensor, p: Tensor, threshold: float) -> Tensor:
    """Targets (n, N), with zeros for images whose largest probability in p (n, N) is below `threshold`.

    FixMatch (arXiv:2001.07685, eq. 4): a row of zeros adds nothing to `soft_cross_entropy`.
    """
    return targets * (p.amax(1, keepdim=True) >= threshold)


def _upcast(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
