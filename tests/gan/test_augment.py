"""Augmentation: how far images move, and that they do so differentiably."""

from __future__ import annotations

import torch

from sgan_dist.config import AugmentConfig
from sgan_dist.gan.augment import augment
from sgan_dist.parallel.random import GlobalRandom

CPU = torch.device("cpu")


def an_rng(n: int) -> GlobalRandom:
    return GlobalRandom(0, "test", 0, {"all": range(n)}, CPU)


def test_no_augmentation_returns_the_images_themselves() -> None:
    images = torch.rand(4, 1, 28, 28)
    assert augment(images, AugmentConfig(), an_rng(4)) is images


def test_translation_moves_whole_pixels_at_most() -> None:
    images = torch.full((400, 1, 28, 28), -1.0)
    images[:, :, 14, 14] = 1
    moved = augment(images, AugmentConfig(translate=2), an_rng(400)).add(1).squeeze(1)
    rows = (moved.sum(2) * torch.arange(28)).sum(1) / moved.sum((1, 2))
    assert 11.9 <= rows.min() < 12.2 and 15.8 < rows.max() <= 16.1
    assert torch.allclose(moved.sum((1, 2)), torch.full((400,), 2.0), atol=1e-4)


def test_augmentation_is_differentiable() -> None:
    images = torch.rand(4, 1, 28, 28, requires_grad=True)
    config = AugmentConfig(rotation=10, scale=0.1, shear=0.1, translate=2)
    augment(images, config, an_rng(4)).sum().backward()
    assert images.grad is not None and images.grad.abs().sum() > 0


def test_rotation_turns_by_at_most_the_angle() -> None:
    images = torch.full((300, 1, 28, 28), -1.0)
    images[:, :, 13:15, 24] = 1  # on the horizontal axis, 10.5 px right of the centre
    turned = augment(images, AugmentConfig(rotation=20), an_rng(300)).add(1).squeeze(1)
    mass = turned.sum((1, 2))
    y = (turned.sum(2) * (torch.arange(28) - 13.5)).sum(1) / mass
    x = (turned.sum(1) * (torch.arange(28) - 13.5)).sum(1) / mass
    angles = torch.atan2(y, x).rad2deg()
    assert angles.abs().max() < 21 and angles.min() < -17 and angles.max() > 17
    assert torch.allclose((x**2 + y**2).sqrt(), torch.full((300,), 10.5), atol=0.3)


def test_flip_mirrors_the_share_of_images_that_it_says() -> None:
    images = torch.rand(2000, 1, 8, 8)
    flipped = augment(images, AugmentConfig(flip=0.25), an_rng(2000))
    mirrored = (flipped - images.flip(3)).abs().amax((1, 2, 3)) < 1e-5
    unchanged = (flipped - images).abs().amax((1, 2, 3)) < 1e-5
    assert (mirrored ^ unchanged).all() and abs(mirrored.float().mean() - 0.25) < 0.03


def test_thickness_grows_and_shrinks_strokes_by_at_most_its_part_of_a_pixel() -> None:
    images = torch.full((400, 1, 28, 28), -1.0)
    images[:, :, :, 10:14] = 1  # a bar, 4 pixels wide
    changed = augment(images, AugmentConfig(thickness=0.5), an_rng(400))
    widths = changed.add(1).div(2).sum(3).mean((1, 2))
    assert 3 <= widths.min() < 3.02 and 4.98 < widths.max() <= 5
    assert abs(widths.mean() - 4) < 0.1
