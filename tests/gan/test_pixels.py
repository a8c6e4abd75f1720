"""Pixels to floats and back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from sgan_dist.gan.pixels import images_to_float, images_to_uint8, save_grid

CPU = torch.device("cpu")


def test_every_pixel_survives_the_way_to_floats_and_back() -> None:
    images = torch.arange(256, dtype=torch.uint8).reshape(2, 8, 16, 1).expand(-1, -1, -1, 3)
    for dtype in (torch.float32, torch.float64):
        floats = images_to_float(images, CPU, dtype)
        assert floats.shape == (2, 3, 8, 16) and floats.dtype == dtype
        assert floats.min() == -1 and floats.max() == 1
        assert torch.equal(images_to_uint8(floats), images)


def test_a_grid_has_its_images_in_rows(tmp_path: Path) -> None:
    images = torch.arange(5 * 3 * 2 * 4, dtype=torch.uint8).reshape(5, 2, 4, 3)
    path = tmp_path / "new" / "grid.png"
    save_grid(images_to_float(images, CPU, torch.float32), path, columns=3)
    with Image.open(path) as file:
        grid = np.array(file)
    assert grid.shape == (4, 12, 3)
    for i, image in enumerate(images.numpy()):
        y, x = i // 3 * 2, i % 3 * 4
        assert np.array_equal(grid[y : y + 2, x : x + 4], image)
    assert not grid[2:, 8:].any()
    save_grid(torch.ones(1, 1, 2, 4), path, columns=1)
    with Image.open(path) as file:
        assert file.mode == "L" and np.array(file).tolist() == [[255] * 4] * 2
