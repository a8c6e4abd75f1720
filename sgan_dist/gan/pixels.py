"""Pixels to floats and back: the one scaling that training, evaluation and a classifier share."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sgan_dist.files import write_whole


@dataclass(frozen=True)
class PixelScaling:
    """How a pixel, 0 to 255, becomes a network's input: pixel / divisor + offset."""

    divisor: float = 127.5
    offset: float = -1.0


SCALING = PixelScaling()  # 0 to 255 becomes -1 to 1, which is also the range of a generator's tanh


def images_to_float(
    images: Tensor, device: torch.device, dtype: torch.dtype, scaling: PixelScaling = SCALING
) -> Tensor:
    """Images uint8 (n, H, W, C) -> (n, C, H, W) of `dtype` on `device`, scaled."""
    floats = images.to(device, non_blocking=True).permute(0, 3, 1, 2).to(dtype)
    return floats.div_(scaling.divisor).add_(scaling.offset).contiguous()


def images_to_uint8(images: Tensor) -> Tensor:
    """Images (n, C, H, W) in [-1, 1] -> uint8 (n, H, W, C); the inverse of `images_to_float`."""
    pixels = images.float().sub(SCALING.offset).mul(SCALING.divisor)
    return pixels.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def save_grid(images: Tensor, path: Path, columns: int = 8) -> None:
    """Writes images (n, C, H, W) in [-1, 1] as one PNG, `columns` in a row; makes its folder."""
    pixels = images_to_uint8(images).cpu().numpy()
    pixels = np.pad(pixels, [(0, -len(pixels) % columns), (0, 0), (0, 0), (0, 0)])
    n, height, width, channels = pixels.shape
    grid = pixels.reshape(n // columns, columns, height, width, channels).swapaxes(1, 2)
    grid = grid.reshape(n // columns * height, columns * width, channels)
    png = io.BytesIO()
    Image.fromarray(grid.squeeze(2) if channels == 1 else grid).save(png, "png")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, png.getvalue())
