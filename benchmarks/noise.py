"""What a rank's random numbers cost, beside torch.randn of this rank's numbers alone, by world size.

One thread; the least of many rounds, the columns taking turns.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch

from sgan_dist.parallel.random import GlobalRandom, share

WORLDS = (1, 8, 64, 4096)
ROWS = {"labeled": 32, "unlabeled": 64, "fake": 32}  # a rank's
ELEMENTS = (5, 784, 9408)  # augmentation, an image, a feature map of dcgan
ROUNDS = 200


def measure(work: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Returns milliseconds."""
    best = dict.fromkeys(work, float("inf"))
    for _ in range(ROUNDS):
        for name, call in work.items():
            start = time.perf_counter()
            call()
            best[name] = min(best[name], (time.perf_counter() - start) * 1e3)
    return best


def rng(world_size: int) -> GlobalRandom:
    """That of the last rank."""
    parts = {
        name: share(rows * world_size, world_size - 1, world_size) for name, rows in ROWS.items()
    }
    return GlobalRandom(0, "benchmark", 0, parts, torch.device("cpu"))


def main() -> None:
    torch.set_num_threads(1)
    rows = sum(ROWS.values())
    print(
        f"| numbers ({rows} rows) | torch.randn | "
        + " | ".join(f"world {w}" for w in WORLDS)
        + " |"
    )
    print("|---" * (2 + len(WORLDS)) + "|")
    generator = torch.Generator()
    for elements in ELEMENTS:
        work: dict[str, Callable[[], object]] = {
            "randn": partial(torch.randn, rows, elements, generator=generator)
        }
        for world in WORLDS:
            work[str(world)] = partial(rng(world).normal, elements)
        times = measure(work)
        baseline = times.pop("randn")
        cells = [f"{t:.3f} ms ({t / baseline:.2f}x)" for t in times.values()]
        print(f"| {rows * elements:,} | {baseline:.3f} ms | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
