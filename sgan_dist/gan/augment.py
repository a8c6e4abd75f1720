"""Augmentations on the device: functions of (seed, step, place in the global batch)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sgan_dist.config import AugmentConfig
from sgan_dist.parallel.random import GlobalRandom


def augment(images: Tensor, config: AugmentConfig, rng: GlobalRandom) -> Tensor:
    """Thickens, mirrors, rotates, scales, shears, shifts and bends images (n, C, H, W) at random.

    Bilinear and differentiable; positions outside an image take its border. Real and generated
    images are augmented in the same way: otherwise D would tell them apart by the augmentation.
    """
    if not len(images):  # of a small batch, a rank may have none
        return images
    if config.thickness:
        images = _thickened(images, config.thickness, rng)
    movements = (config.rotation, config.scale, config.shear, config.translate, config.elastic)
    if not any(movements) and not config.flip:
        return images
    height, width = images.shape[-2:]
    u = (2 * rng.uniform(5) - 1).to(images.dtype)
    angle = u[:, 0] * (config.rotation * torch.pi / 180)
    zoom = 1 + u[:, 1] * config.scale
    shear = u[:, 2] * config.shear
    shift = torch.stack([u[:, 3] * 2 / width, u[:, 4] * 2 / height], 1) * config.translate
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    # the map from output to input positions: rotation and zoom after a horizontal shear
    matrix = torch.stack([cos, cos * shear - sin, sin, sin * shear + cos], 1).view(-1, 2, 2)
    if config.flip:
        sign = torch.where(rng.uniform(1) < config.flip, -1.0, 1.0).to(images.dtype)
        matrix = matrix * torch.cat([sign, torch.ones_like(sign)], 1).unsqueeze(2)
    theta = torch.cat([matrix, shift.unsqueeze(2)], 2)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    if config.elastic:
        coarse = rng.normal(2, 5, 5).to(images.dtype)
        # from pixels to the grid's unit, half an image; a tensor of two numbers would be copied there
        x, y = coarse.mul(2 * config.elastic).unbind(1)
        coarse = torch.stack([x / width, y / height], 1)
        smooth = F.interpolate(coarse, (height, width), mode="bicubic", align_corners=True)
        grid = grid + smooth.permute(0, 2, 3, 1)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def _thickened(images: Tensor, maximum: float, rng: GlobalRandom) -> Tensor:
    """Blends images with their 3x3 maximum or minimum, so that bright strokes grow or shrink."""
    u = ((2 * rng.uniform(1) - 1).to(images.dtype) * maximum).view(-1, 1, 1, 1)
    grown = F.max_pool2d(images, 3, stride=1, padding=1)
    shrunk = -F.max_pool2d(-images, 3, stride=1, padding=1)
    return torch.lerp(images, torch.where(u > 0, grown, shrunk), u.abs())
