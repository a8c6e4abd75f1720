"""Random numbers that are functions of (seed, purpose, step, call, global sample, element).

Each is made by integer arithmetic and a look-up in a table: the same bits on every device, in eager
and compiled code and at any world size, at a cost that depends on this rank's samples alone. So noise,
dropout and augmentation belong to the step and to a sample's place in the global batch, and a resumed
run draws the same numbers as an uninterrupted one. Any change of the numbers must raise RANDOM_VERSION.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

RANDOM_VERSION = 2  # 1: torch's generators, for the global batch on every rank

# splitmix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators")
GAMMA, MULTIPLIER_1, MULTIPLIER_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
CALL = 0xD1342543DE82EF95  # the n-th call starts n times this further on
PART_BITS = 40  # a part's samples are numbered from part << PART_BITS on
TABLE_SHA256 = "1cfbba1e07e34386a57626f82aeb43e6ed54ba70a3ea6b7d964dc66a841074a8"


def share(total: int, rank: int, world_size: int) -> range:
    """The contiguous rows of a global batch of `total` samples that `rank` holds.

    Lanes are shared by ranks and workers, and rows by micro-batches, in the same way.
    """
    return range(total * rank // world_size, total * (rank + 1) // world_size)


class GlobalRandom:
    """A sequence of random tensors for one forward pass over a joined batch.

    The batch is the concatenation of named parts (labeled, unlabeled, fake), each the rows of its own
    global batch that this rank holds. The n-th call belongs together on all ranks, so every rank must
    make the same calls in the same order.
    """

    def __init__(
        self, seed: int, purpose: str, step: int, parts: Mapping[str, range], device: torch.device
    ) -> None:
        self.sizes = {name: len(rows) for name, rows in parts.items()}
        self._rows = _numbered(tuple(parts.values()), device)
        # tensors, which are filled without a copy from the host, and are no constants in compiled code
        key = _signed(_hashed(f"{seed}/{purpose}/{step}"))
        self._key = torch.full((1,), key, dtype=torch.int64, device=device)
        self._gamma = torch.full((1,), _signed(GAMMA), dtype=torch.int64, device=device)
        self._quantiles = _on_device(device)
        self._calls = 0

    def normal(self, *shape: int) -> Tensor:
        """N(0, 1), fp32 (n, *shape), for the n rows of the joined local batch.

        The 65,536 values are the middles of equally probable intervals, from -4.32 to 4.32.
        """
        numbers = self._bits(torch.int16, shape).int().add_(1 << 15)
        return self._quantiles.index_select(0, numbers.view(-1)).view(numbers.shape)

    def uniform(self, *shape: int) -> Tensor:
        """U[0, 1), fp32 (n, *shape), in steps of 2^-24."""
        numbers = self._bits(torch.int32, shape)
        return (numbers >> 8).bitwise_and_((1 << 24) - 1).float().mul_(2.0**-24)

    def _bits(self, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """Random integers of `dtype`, (n, *shape)."""
        elements = math.prod(shape)
        words = -(-elements * dtype.itemsize // 8)
        call = self._key + _signed(self._calls * CALL)
        self._calls += 1
        first = torch.add(call, self._rows, alpha=_signed(words * GAMMA))
        inner = torch.arange(words, device=first.device)
        x = mix_(torch.addcmul(first.unsqueeze(1), inner, self._gamma))
        numbers = x.flatten().view(dtype).view(len(first), words * 8 // dtype.itemsize)
        return numbers[:, :elements].reshape(-1, *shape)


def mix_(x: Tensor) -> Tensor:
    """splitmix64's finalizer, in place: int64 -> int64, one to one."""
    x.bitwise_xor_((x >> 30).bitwise_and_((1 << 34) - 1)).mul_(_signed(MULTIPLIER_1))
    x.bitwise_xor_((x >> 27).bitwise_and_((1 << 37) - 1)).mul_(_signed(MULTIPLIER_2))
    return x.bitwise_xor_((x >> 31).bitwise_and_((1 << 33) - 1))


def digest(tensor: Tensor) -> Tensor:
    """A hash of a tensor's bytes, 0-d int64, on its device: the sum of hashes of numbered words."""
    data = tensor.detach().contiguous().flatten().view(torch.uint8)
    words = F.pad(data, (0, -len(data) % 4)).view(torch.int32).long()
    return mix_(words + torch.arange(len(words), device=words.device) * _signed(GAMMA)).sum()


def _hashed(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _signed(value: int) -> int:
    """The int64 with the same lowest 64 bits."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


@functools.lru_cache(maxsize=64)
def _numbered(parts: tuple[range, ...], device: torch.device) -> Tensor:
    """The numbers of the parts' samples, int64 (n,)."""
    rows = [
        torch.arange(part.start, part.stop, device=device) + (number << PART_BITS)
        for number, part in enumerate(parts)
    ]
    return torch.cat(rows)


@functools.cache
def _on_device(device: torch.device) -> Tensor:
    return normal_quantiles().to(device)


@functools.cache
def normal_quantiles() -> Tensor:
    """The middles of 65,536 equally probable intervals of N(0, 1), in order, fp32, on the CPU."""
    middles = (torch.arange(1 << 16, dtype=torch.float64) + 0.5) / (1 << 16)
    table: Tensor = torch.special.ndtri(middles).float()
    if hashlib.sha256(table.numpy().tobytes()).hexdigest() != TABLE_SHA256:
        raise RuntimeError(
            "this build of torch computes another table of normal quantiles, so runs would draw other"
            " noise than elsewhere: use the torch of constraints.txt, and report it"
        )
    return table
