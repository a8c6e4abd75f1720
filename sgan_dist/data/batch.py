"""What the loader hands to training: one rank's slice of a step's global batches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class Skip(NamedTuple):
    """A record that was already damaged when its shard was indexed: `samples` of it are left out."""

    shard: str
    record: int
    samples: int
    why: str


@dataclass(frozen=True)
class SemiSupervisedBatch:
    """This rank's contiguous slice of the global batches of one step, on the CPU.

    rows: which rows of the global batch these are, of each split that is trained on.
    labeled: uint8 (b_l, H, W, C); labels: int64 (b_l,); unlabeled: uint8 (b_u, H, W, C), b_u = 0
    without an unlabeled stream; ids: int64, a sample's number in its split. In pinned memory for a
    GPU. skips: damaged records that this rank has not reported before.
    """

    step: int
    rows: Mapping[str, range]
    labeled: Tensor
    labels: Tensor
    unlabeled: Tensor
    labeled_ids: Tensor
    unlabeled_ids: Tensor
    skips: tuple[Skip, ...] = ()
