"""The losses of an (N+1)-class discriminator and of its generator, exact over any number of ranks.

D gives logits l. In the implied form (Salimans et al. 2016, sec. 5) there are N of them, and the
fake logit is fixed at 0; in the explicit form the fake logit is the (N+1)-th. With
`t = logsumexp(l over real classes) - l_fake`, the log odds that x is real, both read

    log p(real | x) = -softplus(-t)        log p(fake | x) = -softplus(t)

The supervised term is the cross-entropy of all the classes that the form has: N in the implied
form, N+1 in the explicit one, where it is the implied term plus `softplus(-t)` of the labeled image.

Every function returns this rank's *share* (see `sgan_dist.distributed`): shares add up over ranks to
the global value, in value and in gradient. Losses are computed in at least fp32.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sgan_dist.distributed import share, straight_through_sum

Form = Literal["implied", "explicit"]


def log_odds_real(logits: Tensor, form: Form) -> Tensor:
    """log p(real | x) - log p(fake | x), (n,), from logits (n, N) or (n, N+1)."""
    logits = _upcast(logits)
    if form == "implied":
        return logits.logsumexp(1)
    return logits[:, :-1].logsumexp(1) - logits[:, -1]


def class_logits(logits: Tensor, form: Form) -> Tensor:
    """The N logits of p(y | x, real), (n, N), at least fp32."""
    return _upcast(logits if form == "implied" else logits[:, :-1])


def supervised(logits: Tensor, labels: Tensor, count: int) -> Tensor:
    """Cross-entropy of labeled images; `count` is the global number of them."""
    return F.cross_entropy(_upcast(logits), labels, reduction="sum") / count


def real(log_odds: Tensor, count: int) -> Tensor:
    """-log p(real | x) of unlabeled images with log odds (n,); `count` is global."""
    return F.softplus(-log_odds).sum() / count


def fake(log_odds: Tensor, count: int) -> Tensor:
    """-log p(fake | x) of generated images with log odds (n,); `count` is global."""
    return F.softplus(log_odds).sum() / count


def feature_matching(real_features: Tensor, fake_features: Tensor) -> Tensor:
    """Mean squared difference of the global batches' mean features (Salimans et al. 2016, sec. 3.1).

    Features are (n, F) and (m, F) of this rank; every rank brings as many. The mean features are
    global: the mean of per-rank losses would be another loss.
    """
    difference = _global_mean(real_features) - _global_mean(fake_features)
    return share(difference.square().mean())


def non_saturating(log_odds: Tensor, count: int) -> Tensor:
    """-log p(real | G(z)) (Goodfellow et al. 2014), for the generator; `count` is global."""
    return F.softplus(-log_odds).sum() / count


def soft_cross_entropy(class_logits: Tensor, targets: Tensor, count: int) -> Tensor:
    """-sum_y targets log softmax(class_logits), both (n, N); `count` is global."""
    return -(targets * class_logits.log_softmax(1)).sum() / count


def aligned(p: Tensor, mean: Tensor) -> Tensor:
    """Distributions p (n, N) corrected by the ratio of the uniform marginal to their mean (N,).

    Distribution alignment, for balanced classes (Berthelot et al. 2020, ReMixMatch, sec. 3.1).
    """
    ratio = p / mean
    return ratio / ratio.sum(1, keepdim=True)


def sharpened(p: Tensor, temperature: float) -> Tensor:
    """p^(1/T), normalized (Berthelot et al. 2019, MixMatch, eq. 7)."""
    return (p.log() / temperature).softmax(1)


def _global_mean(features: Tensor) -> Tensor:
    features = _upcast(features)
    sums = torch.cat([features.sum(0), features.new_tensor([len(features)])])
    total = straight_through_sum(sums)
    return total[:-1] / total[-1].detach()


def _upcast(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
