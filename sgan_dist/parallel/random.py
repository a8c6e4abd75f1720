"""Random numbers that do not depend on the world size.

Numbers are drawn for the global batch from `(seed, purpose, step)`, and each rank keeps the rows of
its own samples. So noise, dropout and augmentation are a function of the step and of the sample's
position in the global batch, and a resumed run draws the same numbers as an uninterrupted one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BatchSlice:
    """The rows `[start, stop)` of a global batch of `total` samples that this rank holds."""

    total: int
    start: int
    stop: int

    @staticmethod
    def of(total: int, rank: int, world_size: int) -> BatchSlice:
        """The contiguous slice of `rank`; `world_size` divides `total`."""
        share = total // world_size
        return BatchSlice(total, rank * share, (rank + 1) * share)

    def __len__(self) -> int:
        return self.stop - self.start


class GlobalRandom:
    """A sequence of random tensors for one forward pass over a joined batch.

    The batch is the concatenation of named parts (labeled, unlabeled, fake), each a slice of its own
    global batch. The n-th call draws the same global tensor on all ranks, so every rank must make
    the same calls in the same order. Values are drawn in fp32, on the device.
    """

    def __init__(
        self,
        seed: int,
        purpose: str,
        step: int,
        parts: Mapping[str, BatchSlice],
        device: torch.device,
    ) -> None:
        self._key = f"{seed}/{purpose}/{step}"
        self._parts = list(parts.values())
        self.sizes = {name: len(part) for name, part in parts.items()}
        self._device = device
        self._calls = 0
        self._generator = torch.Generator(device)

    def normal(self, *shape: int) -> Tensor:
        """N(0, 1), fp32 (n, *shape), for the n rows of the joined local batch."""
        return self._draw(torch.randn, shape)

    def uniform(self, *shape: int) -> Tensor:
        """U[0, 1), fp32 (n, *shape)."""
        return self._draw(torch.rand, shape)

    def _draw(self, sampler: Callable[..., Tensor], shape: tuple[int, ...]) -> Tensor:
        rows = []
        for number, part in enumerate(self._parts):
            key = f"{self._key}/{self._calls}/{number}".encode()
            digest = hashlib.blake2b(key, digest_size=8).digest()
            # manual_seed takes a signed 64-bit value
            self._generator.manual_seed(int.from_bytes(digest, "little", signed=True))
            whole = sampler((part.total, *shape), generator=self._generator, device=self._device)
            rows.append(whole[part.start : part.stop])
        self._calls += 1
        return torch.cat(rows)
