"""What a run will do, in words, before it does it; and whether it can be cut over the ranks."""

from __future__ import annotations

from sgan_dist.backend import Backend
from sgan_dist.config import Config
from sgan_dist.data.index import DatasetIndex
from sgan_dist.data.loader import check_shares
from sgan_dist.errors import UserError


def check_world(config: Config, index: DatasetIndex, world_size: int) -> None:
    """Raises UserError where the batches can't be shared by `world_size` ranks."""
    check_shares(index, config.data, world_size)
    fakes = config.train.fake_batch
    if config.model.generator is not None and fakes % world_size:
        raise UserError(
            f"train.fake_batch is {fakes}, and {world_size} processes can't share it evenly: make it"
            f" a multiple of {world_size}"
        )


def describe(config: Config, index: DatasetIndex, backend: Backend) -> str:
    """What runs where, what the batches are cut from, and how long an epoch is."""
    world = backend.world_size
    lines = [f"{config.name}: {backend.describe()}"]
    streams = [("labeled", config.data.labeled_batch), ("unlabeled", config.data.unlabeled_batch)]
    for name, batch in streams:
        if batch == 0:
            continue
        split = getattr(index, name)
        lanes = f", {config.data.lanes} lanes" if split.order == "windowed" else ""
        epochs = config.train.steps * batch / split.samples
        lines.append(
            f"  {name:<9}  {split.samples} images in {len(split.shards)} shards, {split.order}"
            f" order{lanes}; {batch} a step, {batch // world} a rank; an epoch is"
            f" {split.samples / batch:.1f} steps, {epochs:.1f} epochs in all"
        )
    if config.model.generator is not None:
        fakes = config.train.fake_batch
        lines.append(f"  generated  {fakes} a step, {fakes // world} a rank")
    lines.append(f"  {config.train.steps} steps; run directory {config.directory}")
    return "\n".join(lines)
