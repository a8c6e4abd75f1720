"""The brake: from the first loss or gradient on that is not finite, nothing of the networks changes.

It is a flag on the device, so that the host need not wait for the losses of a step before it prepares
the next one. State is selected, never multiplied by the flag: NaN times 0 is NaN.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Brake:
    """0-d fp32, on the device: 0, and 1 once a value was not finite. Equal on all ranks.

    The form is that of `found_inf` of torch's fused optimizers, which then skip their step.
    """

    flag: Tensor

    @classmethod
    def released(cls, device: torch.device) -> Brake:
        """The brake at the start of a run."""
        return cls(torch.zeros((), device=device))

    def check(self, values: Tensor) -> None:
        """Sets the flag, for good, unless all values are finite. They must be equal on all ranks."""
        self.flag.masked_fill_(values.isfinite().all().logical_not(), 1.0)

    def assign(self, targets: Iterable[Tensor], values: Iterable[Tensor]) -> None:
        """Copies values into the targets; with the flag set, these stay as they are."""
        stopped = self.flag > 0
        with torch.no_grad():
            for target, value in zip(targets, values, strict=True):
                torch.where(stopped, target, value, out=target)

    @contextlib.contextmanager
    def protecting(self, tensors: Iterable[Tensor]) -> Iterator[None]:
        """Restores the tensors at the end of the block if the flag is set then."""
        before = [(tensor, tensor.clone()) for tensor in tensors]
        try:
            yield
        finally:
            stopped = self.flag > 0
            for tensor, value in before:
                torch.where(stopped, value, tensor, out=tensor)
