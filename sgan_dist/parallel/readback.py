"""Values on the device that the host reads later."""

from __future__ import annotations

import torch
from torch import Tensor


class Readback:
    """A copy of a tensor on its way to the host, which waits for it in `read` only.

    On a GPU, prepare the next work before `read`: then the device always has some.
    """

    def __init__(self, values: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._values = values
        if values.device.type == "cuda":
            self._values = torch.empty_like(values, device="cpu", pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def read(self) -> list[float]:
        """The values, a flat list."""
        if self._event is not None:
            self._event.synchronize()
        return self._values.flatten().tolist()
