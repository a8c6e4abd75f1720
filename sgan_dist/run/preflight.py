"""Before a run: its dataset, whether the batches can be shared, and what it will do, in words."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sgan_dist import checkpoint
from sgan_dist.config import Config, result_settings, resumable
from sgan_dist.data.index import INDEX_NAME, DatasetIndex, Shard, load_index
from sgan_dist.data.loader import batch_rows, check_shares
from sgan_dist.data.order import WindowedOrder, lane_cut, lane_length
from sgan_dist.data.prepare.shards import prepare
from sgan_dist.data.prepare.sources import source_name
from sgan_dist.data.prepare.splits import Labels
from sgan_dist.data.remote.urls import is_remote, redact_url
from sgan_dist.data.stream import window_samples
from sgan_dist.errors import UserError, plural
from sgan_dist.gan.gate import check_networks
from sgan_dist.parallel import launcher
from sgan_dist.parallel.agreement import run_on_all, run_on_main
from sgan_dist.parallel.backends import open_backend
from sgan_dist.parallel.engine import Backend
from sgan_dist.parallel.random import RANDOM_VERSION, share
from sgan_dist.run import rundir

WELL_MIXED = 1000  # samples of a shuffle window

log = logging.getLogger(__name__)


def plan(config: Config) -> str:
    """Returns what `train(config)` would do under this launcher. Trains and writes nothing.

    All ranks must call it.

    Raises:
        UserError: on every rank, if `train` would refuse the config.
    """
    backend = open_backend(config, rundir.resumed_precision(config))
    config = with_precision(config, backend.precision)
    if must_prepare(config):
        return f"{config.data.root} does not exist: a run first prepares {config.data.source}"
    index = run_on_main(lambda: dataset(config))
    check_shares(index, config, backend.world_size)
    config = refuse_other_run(config, index)
    check_networks(config, index.image_hwc, len(index.class_names), backend)
    return f"{describe(config, index, backend)}\n{coverage(config, index, backend.world_size)}"


def with_precision(config: Config, precision: launcher.Precision) -> Config:
    """Returns `config` with the precision that is used in place of `auto`."""
    machine = dataclasses.replace(config.machine, precision=precision)
    return dataclasses.replace(config, machine=machine)


def identity(config: Config, index: DatasetIndex) -> dict[str, Any]:
    """Returns setting -> value of all that a run's result depends on, with data and random numbers."""
    versions = {"data_fingerprint": index.fingerprint, "random_version": RANDOM_VERSION}
    return result_settings(config) | versions


def refuse_other_run(config: Config, index: DatasetIndex) -> Config:
    """Returns the config with which the run in its directory continues, or starts.

    Settings newer than the checkpoint are at the values that reproduce its version. All ranks call
    it: rank 0 reads the checkpoint, and each rank keeps its own paths.

    Raises:
        UserError: the run directory holds a checkpoint of another run, or of a version that draws
            other random numbers.
    """
    path, _ = run_on_main(lambda: checkpoint.latest(config.directory))
    if path is None:
        return config
    meta = run_on_main(lambda: checkpoint.read_meta(path))
    version = meta["meaning"].get("random_version", 1)  # 0.1.0 did not write it

    def resumed() -> Config:
        continued, saved = resumable(config, meta["meaning"])
        current = identity(continued, index)
        checkpoint.refuse_other_run(path, saved, current | {"random_version": version})
        if version != RANDOM_VERSION:
            raise UserError(
                f"{config.directory} was trained with random numbers of version {version}, and this"
                f" program draws those of version {RANDOM_VERSION}: continue it with the release that"
                " made it, or start again with another --run_dir; it can still be evaluated"
            )
        return continued

    return run_on_all(resumed)


def must_prepare(config: Config) -> bool:
    """Returns whether the run first prepares its dataset, `data.source`, in `data.root`."""
    data = config.data
    if data.source is None or is_remote(data.root):
        return False
    return not (Path(data.root) / INDEX_NAME).exists()


def dataset(config: Config) -> DatasetIndex:
    """Returns the index of the dataset, which it first prepares if `data.root` does not exist.

    Raises:
        UserError: `data.root` is no dataset, or was prepared with other settings.
    """
    data = config.data
    if data.source is not None and must_prepare(config):
        log.info(f"preparing {data.source} in {data.root}")
        labels = Labels(data.labels_per_class, seed=data.label_seed)
        prepare(data.source, data.root, labels, data.validation)
    index = load_index(data.root, config.remote)
    if data.source is None:
        return index
    held_out = index.validation.samples
    # setting: value in the dataset, value in the config
    settings = {
        "data.source": (index.source, source_name(data.source)),
        "data.labels_per_class": (index.labels_per_class, data.labels_per_class),
        "data.label_seed": (index.label_seed, data.label_seed),
        "data.validation": (held_out, data.validation or held_out),
    }
    for key, (prepared, configured) in settings.items():
        if prepared != configured:
            raise UserError(
                f"{redact_url(data.root)} was prepared with {key} {prepared}, and the config asks for"
                f" {configured}: give another --data.root, or set {key} to {prepared}"
            )
    return index


def describe(config: Config, index: DatasetIndex, backend: Backend) -> str:
    """Returns what runs where, what a step is made of, and how long an epoch is. A collective."""
    world, parts = backend.world_size, config.batch.accumulation
    images = config.batches | ({"generated": config.batch.fake} if config.uses_generator else {})
    windowed = any(index.split(name).order == "windowed" for name in config.batches)
    step = " + ".join(f"{batch} {name}" for name, batch in images.items()) + " images"
    if world > 1:
        step += f", {' + '.join(_of_a_rank(name, config, index, world) for name in images)} a rank"
    if parts > 1:
        step += f" in {parts} parts"
    if windowed:
        step += f", {plural(config.stream.lanes, 'lane')}"
    lines = [f"{config.name}: {backend.describe()}; a step is {step}"]
    for name, batch in config.batches.items():
        split = index.split(name)
        order = "balanced" if config.batch.balanced and name == "labeled" else split.order
        lines.append(
            f"  {name:<9}  {plural(split.samples, 'image')} in {plural(len(split.shards), 'shard')},"
            f" {order} order; an epoch is {split.samples / batch:.1f} steps,"
            f" {config.train.steps * batch / split.samples:.1f} epochs in all"
        )
        if split.order == "windowed":
            window = window_samples(split, config.stream.lane_window_mib)
            if window < min(WELL_MIXED, split.samples // config.stream.lanes):
                lines.append(
                    f"  WARNING: {name} images are shuffled in windows of {window} only: raise"
                    " stream.lane_window_mib"
                )
    lines.append(f"  {plural(config.train.steps, 'step')}; run directory {config.directory}")
    return "\n".join(lines)


def _of_a_rank(name: str, config: Config, index: DatasetIndex, world_size: int) -> str:
    """Returns how many images of a split, or generated ones, a rank has in a step: `8`, or `1-2`."""

    def rows(rank: int) -> range:
        if name == "generated":
            return share(config.batch.fake, rank, world_size)
        return batch_rows(index, config, name, rank, world_size)

    counts = [len(rows(rank)) for rank in range(world_size)]
    return "-".join(map(str, sorted({min(counts), max(counts)})))


def coverage(config: Config, index: DatasetIndex, world_size: int) -> str:
    """Returns what each rank reads: a whole split in full order, its lanes in windowed order.

    A shard at the border of two lanes is read by both, and counted twice.
    """
    lines = []
    for name, batch in config.batches.items():
        split = index.split(name)
        if split.order == "full":
            reads = "every rank reads the whole split once, at the start"
            lines.append(f"  {name:<9}  {reads}: {_size(split.shards)}")
            continue
        lanes, n = config.stream.lanes, split.samples
        window = window_samples(split, config.stream.lane_window_mib)
        counts = [shard.samples for shard in split.shards]
        order = WindowedOrder(counts, lanes, window, config.seed, name)
        lines.append(
            f"  {name:<9}  {lanes} lanes of about {n // lanes} samples, {batch // lanes} a step each,"
            f" windows of {min(window, -(-n // lanes))}; epoch 0 of {_size(split.shards)}:"
        )
        for rank in range(world_size):
            numbers: list[int] = []
            for lane in share(lanes, rank, world_size):
                start = lane_cut(n, lanes, lane, 0)
                pieces = order.pieces(0, start, start + lane_length(n, lanes, lane, 0))
                numbers += sorted({piece.shard for piece in pieces})
            shards = [split.shards[number] for number in numbers]
            lines.append(f"    rank {rank} reads {_size(shards)}")
    return "\n".join(lines)


def _size(shards: Sequence[Shard]) -> str:
    mebibytes = sum(shard.bytes for shard in shards) / 2**20
    return f"{plural(len(shards), 'shard')}, {mebibytes:,.1f} MiB"
