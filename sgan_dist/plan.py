"""What a run will do, in words, before it does it; and whether it can be cut over the ranks."""

from __future__ import annotations

from pathlib import Path

from sgan_dist.config import Config
from sgan_dist.data.index import INDEX_NAME, DatasetIndex, load_index
from sgan_dist.data.loader import check_shares, split_batches
from sgan_dist.data.order import WindowedOrder, lane_cut, lane_length
from sgan_dist.data.prepare import prepare
from sgan_dist.data.remote import is_remote
from sgan_dist.data.sources import source_name
from sgan_dist.data.stream import transport, window_samples
from sgan_dist.errors import UserError, plural
from sgan_dist.players import Backend
from sgan_dist.tracking import say


def must_prepare(config: Config) -> bool:
    """Whether the run's dataset is one that it makes itself, and has not yet made."""
    data = config.data
    if data.source is None or is_remote(data.root):
        return False
    return not (Path(data.root) / INDEX_NAME).exists()


def dataset(config: Config) -> DatasetIndex:
    """The dataset's index; the embedded or named source is prepared first where it is missing.

    Raises UserError where what is there is not what the config asks for.
    """
    data = config.data
    if data.source is not None and must_prepare(config):
        say(f"preparing {data.source} in {data.root}")
        prepare(
            data.source,
            data.root,
            labels_per_class=data.labels_per_class,
            label_seed=data.label_seed,
            validation=data.validation,
        )
    index = load_index(data.root, transport(data))
    if data.source is None:
        return index
    there = {
        "data.source": index.source,
        "data.labels_per_class": index.labels_per_class,
        "data.label_seed": index.label_seed,
        "data.validation": index.validation.samples,
    }
    asked = {
        "data.source": source_name(data.source),
        "data.labels_per_class": data.labels_per_class,
        "data.label_seed": data.label_seed,
        "data.validation": data.validation or index.validation.samples,
    }
    for key, value in there.items():
        if asked[key] != value:
            raise UserError(
                f"{data.root} was prepared with {key} {value}, and the config asks for {asked[key]}:"
                f" give another --data.root, or set {key} to what is there"
            )
    return index


def check_world(config: Config, index: DatasetIndex, world_size: int) -> None:
    """Raises UserError where the batches can't be shared by `world_size` ranks."""
    check_shares(index, config.data, world_size)
    parts, fakes = config.train.accumulation, config.train.fake_batch
    if config.model.generator is not None and fakes % world_size:
        raise UserError(
            f"train.fake_batch is {fakes}, and {world_size} processes can't share it evenly: make it"
            f" a multiple of {world_size}"
        )
    batches = {f"data.{split}_batch": b for split, b in split_batches(config.data).items()}
    if config.model.generator is not None:
        batches["train.fake_batch"] = fakes
    for key, batch in batches.items():
        if batch // world_size % parts:
            raise UserError(
                f"train.accumulation is {parts}, and the {batch // world_size} images of {key} that"
                f" each of {world_size} processes has can't be cut into as many equal parts"
            )


def describe(config: Config, index: DatasetIndex, backend: Backend) -> str:
    """What runs where, what the batches are cut from, and how long an epoch is. For all ranks."""
    world, lanes = backend.world_size, f", {plural(config.data.lanes, 'lane')}"
    batches = split_batches(config.data)
    windowed = any(index.split(name).order == "windowed" for name in batches)
    made = {"generated": config.train.fake_batch} if config.model.generator is not None else {}
    step = " + ".join(f"{batch} {name}" for name, batch in (batches | made).items())
    share = " + ".join(str(batch // world) for batch in (batches | made).values())
    shared = f", {share} a rank" if world > 1 else ""
    parts = f" in {config.train.accumulation} parts" if config.train.accumulation > 1 else ""
    lines = [
        f"{config.name}: {backend.describe()}; a step is {step} images{shared}{parts}"
        f"{lanes * windowed}"
    ]
    for name, batch in batches.items():
        split = index.split(name)
        held = f"{split.samples} images in {plural(len(split.shards), 'shard')}"
        epochs = config.train.steps * batch / split.samples
        order = "balanced" if config.data.balanced and name == "labeled" else split.order
        lines.append(
            f"  {name:<9}  {held}, {order} order; an epoch is {split.samples / batch:.1f} steps,"
            f" {epochs:.1f} epochs in all"
        )
    lines.append(f"  {plural(config.train.steps, 'step')}; run directory {config.directory}")
    return "\n".join(lines)


def coverage(config: Config, index: DatasetIndex, world_size: int) -> str:
    """What every rank reads: of a split in memory all of it once, of a windowed one its lanes.

    A shard at the border of two lanes is read by both, and counted twice.
    """
    lines = []
    for name, batch in split_batches(config.data).items():
        split = index.split(name)
        size = sum(shard.bytes for shard in split.shards)
        if split.order == "full":
            lines.append(
                f"  {name:<9}  every rank reads the whole split once, at the start:"
                f" {plural(len(split.shards), 'shard')}, {_mebibytes(size)}"
            )
            continue
        lanes, n = config.data.lanes, split.samples
        window = window_samples(split, lanes, config.data.window_mib)
        counts = [shard.samples for shard in split.shards]
        order = WindowedOrder(counts, lanes, window, config.seed, name)
        lines.append(
            f"  {name:<9}  {lanes} lanes of about {n // lanes} samples, {batch // lanes} a step each,"
            f" windows of {min(window, -(-n // lanes))}; epoch 0 of {len(counts)} shards,"
            f" {_mebibytes(size)}:"
        )
        for rank in range(world_size):
            read = []
            for lane in range(rank * lanes // world_size, (rank + 1) * lanes // world_size):
                cut = lane_cut(n, lanes, lane, 0)
                pieces = order.pieces(0, cut, cut + lane_length(n, lanes, lane, 0))
                read += sorted({piece.shard for piece in pieces})
            total = sum(split.shards[shard].bytes for shard in read)
            reads = f"{plural(len(read), 'shard')}, {_mebibytes(total)}"
            lines.append(f"    rank {rank} reads {reads}")
    return "\n".join(lines)


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
