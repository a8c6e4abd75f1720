"""Losses against their closed forms, in value and in gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sgan_dist.gan import losses

torch.manual_seed(0)
N, CLASSES = 7, 5
LOGITS = torch.randn(N, CLASSES, dtype=torch.float64)
FAKE_LOGIT = torch.randn(N, 1, dtype=torch.float64)
LABELS = torch.randint(0, CLASSES, (N,))


def with_fake(logits: Tensor, fake: Tensor) -> Tensor:
    return torch.cat([logits, fake], 1)


def gradient_of(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


def test_implied_probabilities_are_the_papers() -> None:
    z = LOGITS.exp().sum(1)  # D(x) = Z / (Z + 1), Salimans et al. 2016
    odds = losses.log_odds_real(LOGITS, "implied")
    assert torch.allclose(losses.real(odds, N), -(z / (z + 1)).log().mean())
    assert torch.allclose(losses.fake(odds, N), -(1 / (z + 1)).log().mean())


def test_explicit_probabilities_are_a_softmax_over_all_classes() -> None:
    logits = with_fake(LOGITS, FAKE_LOGIT)
    p = logits.softmax(1)
    odds = losses.log_odds_real(logits, "explicit")
    assert torch.allclose(losses.real(odds, N), -(1 - p[:, -1]).log().mean())
    assert torch.allclose(losses.fake(odds, N), -p[:, -1].log().mean())
    assert torch.allclose(losses.supervised(logits, LABELS, N), F.nll_loss(p.log(), LABELS))


def test_the_two_forms_agree_where_the_fake_logit_is_zero() -> None:
    explicit = with_fake(LOGITS, torch.zeros_like(FAKE_LOGIT))
    implied_odds = losses.log_odds_real(LOGITS, "implied")
    assert torch.allclose(implied_odds, losses.log_odds_real(explicit, "explicit"))
    assert torch.equal(losses.class_logits(explicit, "explicit"), LOGITS)
    # a labeled image is a real one too: the explicit cross-entropy holds that part as well
    both = losses.supervised(LOGITS, LABELS, N) + losses.real(implied_odds, N)
    assert torch.allclose(both, losses.supervised(explicit, LABELS, N))


def test_the_explicit_form_sees_only_differences_to_the_fake_logit() -> None:
    logits = with_fake(LOGITS, FAKE_LOGIT)
    shifted = losses.log_odds_real(logits + 3.5, "explicit")
    assert torch.allclose(shifted, losses.log_odds_real(logits, "explicit"))
    assert torch.allclose(shifted, losses.log_odds_real(LOGITS - FAKE_LOGIT, "implied"))


@pytest.mark.parametrize(
    ("loss", "gradient"),
    [
        # d/dl of -log p(real) = -p(fake) softmax(l); of -log p(fake) = p(real) softmax(l)
        (losses.real, lambda logits, t: -torch.sigmoid(-t)[:, None] * logits.softmax(1) / N),
        (losses.fake, lambda logits, t: torch.sigmoid(t)[:, None] * logits.softmax(1) / N),
        (
            losses.non_saturating,
            lambda logits, t: -torch.sigmoid(-t)[:, None] * logits.softmax(1) / N,
        ),
    ],
)
def test_gradients(
    loss: Callable[[Tensor, int], Tensor], gradient: Callable[[Tensor, Tensor], Tensor]
) -> None:
    logits = LOGITS.clone().requires_grad_()
    loss(losses.log_odds_real(logits, "implied"), N).backward()
    odds = losses.log_odds_real(LOGITS, "implied")
    assert torch.allclose(gradient_of(logits), gradient(LOGITS, odds))


def test_supervised_gradient() -> None:
    logits = LOGITS.clone().requires_grad_()
    losses.supervised(logits, LABELS, N).backward()
    expected = (LOGITS.softmax(1) - F.one_hot(LABELS, CLASSES)) / N
    assert torch.allclose(gradient_of(logits), expected)


def test_feature_matching_value_and_gradient() -> None:
    real = torch.randn(6, 4, dtype=torch.float64)
    fake = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    difference = real.mean(0) - fake.detach().mean(0)
    means = losses.feature_means(([real], 6), ([fake], 3))
    assert torch.allclose(losses.feature_means(([real[:2], real[2:]], 6))[0], means[0])
    # whole, and in parts, whose shares add up to the same value and gradient
    for cuts in ([slice(0, 3)], [slice(0, 1), slice(1, 3)]):
        shares = [losses.feature_matching(means[0], fake[c], means[1], 3, len(cuts)) for c in cuts]
        loss = torch.stack(shares).sum()
        assert torch.allclose(loss, difference.square().mean())
        fake.grad = None
        loss.backward()
        assert torch.allclose(gradient_of(fake), (-2 / 4 * difference / 3).expand(3, 4))


def test_extreme_logits_stay_finite_and_exact() -> None:
    odds = torch.tensor([800.0, -800.0])
    assert losses.real(odds[:1], 1) == 0 and losses.real(odds[1:], 1) == 800
    assert losses.fake(odds[:1], 1) == 800 and losses.fake(odds[1:], 1) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_upcast(dtype: torch.dtype) -> None:
    logits = LOGITS.to(dtype)
    assert losses.supervised(logits, LABELS, N).dtype == torch.float32
    assert losses.log_odds_real(logits, "implied").dtype == torch.float32
    assert losses.feature_means(([logits], N)).dtype == torch.float32


def test_alignment_and_sharpening() -> None:
    p = LOGITS.softmax(1)
    assert torch.allclose(losses.aligned(p, torch.full((CLASSES,), 1 / CLASSES)), p)
    skewed = p * torch.arange(1, CLASSES + 1)
    skewed = skewed / skewed.sum(1, keepdim=True)
    ratio = skewed / skewed.mean(0)
    expected = ratio / ratio.sum(1, keepdim=True)
    assert torch.allclose(losses.aligned(skewed, skewed.mean(0)), expected)
    assert torch.allclose(losses.sharpened(p, 1.0), p)
    assert torch.allclose(losses.sharpened(p, 0.5), p**2 / (p**2).sum(1, keepdim=True))


def test_soft_cross_entropy_of_hard_targets_is_the_supervised_loss() -> None:
    targets = F.one_hot(LABELS, CLASSES).double()
    soft = losses.soft_cross_entropy(LOGITS, targets, N)
    assert torch.allclose(soft, losses.supervised(LOGITS, LABELS, N))


def test_targets_below_the_threshold_have_no_part_in_the_loss() -> None:
    p = torch.tensor([[0.8, 0.2], [0.5, 0.5], [0.1, 0.9]], dtype=torch.float64)
    logits = LOGITS[:3, :2].clone().requires_grad_()
    confident = losses.confident(losses.sharpened(p, 0.5), p, 0.8)
    loss = losses.soft_cross_entropy(logits, confident, 3)
    loss.backward()
    one, two = p[[0, 2]] ** 2 / (p[[0, 2]] ** 2).sum(1, keepdim=True)
    q = LOGITS[:3, :2].log_softmax(1)
    assert torch.allclose(loss, -((one * q[0]).sum() + (two * q[2]).sum()) / 3)  # of all, not of 2
    assert torch.equal(gradient_of(logits)[1], torch.zeros(2, dtype=torch.float64))
    assert torch.equal(losses.confident(p, p, 0.0), p)


def test_alignment_to_a_prior() -> None:
    p = LOGITS.softmax(1)
    mean = p.mean(0)
    prior = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05], dtype=torch.float64)
    expected = p * prior / mean
    expected = expected / expected.sum(1, keepdim=True)
    assert torch.allclose(losses.aligned(p, mean, prior), expected)
    uniform = torch.full((CLASSES,), 1 / CLASSES, dtype=torch.float64)
    assert torch.allclose(losses.aligned(p, mean, uniform), losses.aligned(p, mean))


def test_the_prior_of_the_labels_and_a_class_that_is_never_seen() -> None:
    prior = losses.labeled_prior([60, 30, 10, 0, 0])
    assert torch.allclose(prior.sum(), torch.ones((), dtype=torch.float64))
    assert torch.allclose(prior[0] / prior[1], torch.tensor(2.0, dtype=torch.float64))
    assert torch.allclose(prior[3] / prior[0], torch.tensor(0.02 / 0.6, dtype=torch.float64))
    # a class that is not predicted at all is raised ten times, not without a bound
    p = torch.tensor([[0.7, 0.3 - 1e-9, 0.0, 1e-9, 0.0]], dtype=torch.float64)
    mean = torch.tensor([0.5, 0.5 - 1e-9, 1e-12, 1e-12, 1e-30], dtype=torch.float64)
    aligned = losses.aligned(p, mean, prior)
    assert aligned.isfinite().all() and aligned[0, 3] < 1e-7


def test_balanced_weights_make_classes_count_alike() -> None:
    histogram = torch.bincount(LABELS, minlength=CLASSES).tolist()
    weights = losses.balanced_weights(histogram, CLASSES)
    per_image = F.cross_entropy(LOGITS, LABELS, reduction="none")
    classes = [per_image[c == LABELS].mean() for c in range(CLASSES) if histogram[c]]
    weighted = losses.supervised(LOGITS, LABELS, N, weights)
    assert torch.allclose(weighted, torch.stack(classes).mean())
    assert losses.balanced_weights([2, 0, 2], 4).tolist() == [1.0, 1.0, 1.0, 1.0]
