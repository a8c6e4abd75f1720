"""The dataset index (`index.json`): splits, shards, counts, checksums and the fingerprint."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sgan_dist.data.locations import shown
from sgan_dist.data.order import ORDER_VERSION
from sgan_dist.data.remote import Transport, is_remote, join, read
from sgan_dist.errors import UserError

INDEX_NAME = "index.json"
INDEX_VERSION = 2
SPLITS = ("labeled", "unlabeled", "validation", "test")
LAYOUTS = ("packed", "per-sample")
ORDERS = ("full", "windowed")
DEFAULT = Transport()
FULL_ORDER_BYTES = 2**30  # up to this decoded size a split is held in memory


@dataclass(frozen=True, slots=True)
class Shard:
    """One tar: its name, samples, file size in bytes, and sha256.

    The name is relative to the dataset's root; of somebody else's tar it is an absolute path or URL.
    """

    name: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class SplitIndex:
    """One split. `block` is the samples in a packed record (1 in the per-sample layout).

    `label_histogram` counts the samples of each class; empty for unlabeled, which has no labels.
    """

    layout: str
    order: str
    block: int
    samples: int
    label_histogram: tuple[int, ...]
    shards: tuple[Shard, ...]


@dataclass(frozen=True)
class DatasetIndex:
    """What a dataset holds. `request` tells in words what it was prepared from.

    `label` says where a per-sample record keeps its class: `cls`, or `json:KEY`. With `resize`,
    images of another size are scaled and center-cropped to `image_shape`; without, they are damage.
    """

    labeled: SplitIndex
    unlabeled: SplitIndex
    validation: SplitIndex
    test: SplitIndex
    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    label: str
    resize: bool
    source: str
    request: str
    label_seed: int
    labels_per_class: int
    order_version: int
    fingerprint: str

    def split(self, name: str) -> SplitIndex:
        """The split of that name, one of SPLITS."""
        split: SplitIndex = getattr(self, name)
        return split


def order_for(samples: int, image_shape: tuple[int, int, int]) -> str:
    """The order a split gets by its decoded size: full up to 1 GiB, else windowed."""
    return "full" if samples * math.prod(image_shape) <= FULL_ORDER_BYTES else "windowed"


def fingerprint(index: DatasetIndex) -> str:
    """sha256 over everything that decides what is trained and evaluated on; no names of files."""
    splits = {
        name: {
            **asdict(replace(index.split(name), shards=())),
            "shards": [(shard.samples, shard.sha256) for shard in index.split(name).shards],
        }
        for name in SPLITS
    }
    images = [index.image_shape, index.class_names, index.label, index.resize]
    content = [index.order_version, *images, splits]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def with_fingerprint(index: DatasetIndex) -> DatasetIndex:
    """The same index with its fingerprint filled in."""
    return replace(index, fingerprint=fingerprint(index))


def save(index: DatasetIndex, folder: str | os.PathLike[str]) -> None:
    """Write index.json into the folder and flush it to disk."""
    with open(Path(folder) / INDEX_NAME, "w", encoding="utf-8") as file:
        json.dump({"index_version": INDEX_VERSION, **asdict(index)}, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def prepare_again(root: str | os.PathLike[str]) -> str:
    """What an error about the dataset at `root` advises, since preparing replaces no folder."""
    if is_remote(str(root)):
        return "prepare or index the dataset again"
    return f"remove {root} (rm -r {shlex.quote(str(root))}) and prepare the dataset again"


def made_by(make: Callable[[], DatasetIndex], out: str, interrupted: str) -> int:
    """Makes a dataset for a command line and says what it holds: an exit code.

    0 when made, 2 (an error) or 130 (Ctrl-C, after which `interrupted` holds) with a line on stderr.
    """
    try:
        index = make()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"interrupted: {interrupted}", file=sys.stderr)
        return 130
    for name in SPLITS:
        split = index.split(name)
        print(f"{name:>10}: {split.samples} samples in {len(split.shards)} shard(s), {split.order}")
    print(f"{out}: {index.source}, fingerprint {index.fingerprint[:12]}")
    return 0


def sidecar_name(split: str, number: int) -> str:
    """Where, below the root, the record offsets of a split's shard lie, whosever tar it is."""
    return f"{split}/{number:06d}.tar.offsets.npy"


def load_index(root: str | os.PathLike[str], transport: Transport = DEFAULT) -> DatasetIndex:
    """Read and check a dataset's index; sizes of local shards are checked, contents are not.

    Raises UserError where the dataset is absent, damaged, or of another version.
    """
    root = os.fspath(root)
    path = join(root, INDEX_NAME)
    where, there = shown(root), shown(path)  # a signed URL's secret is not printed
    text = _read_local(root, path) if not is_remote(path) else read(path, transport)
    if text is None:
        raise UserError(
            f"no dataset at {where}: prepare one with "
            "`python launch/prepare_shards.py --source ... --out DIR`"
        )
    try:
        content = json.loads(text)
    except ValueError as error:
        raise UserError(f"{there} is not valid JSON ({error}): {prepare_again(root)}") from None
    version = content.get("index_version") if isinstance(content, dict) else None
    if version != INDEX_VERSION:
        raise UserError(
            f"{there} has index version {version}, this program reads version {INDEX_VERSION}: "
            f"{prepare_again(root)}"
        )
    try:
        index = _from_json(content)
        actual = fingerprint(index)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{there} lacks or garbles a field ({error!r}): {prepare_again(root)}"
        ) from None
    if actual != index.fingerprint:
        raise UserError(
            f"{there} was changed by hand or damaged: its contents give fingerprint {actual[:12]}, "
            f"it says {index.fingerprint[:12]}; {prepare_again(root)}"
        )
    if index.order_version != ORDER_VERSION:
        raise UserError(
            f"{there} was made for order version {index.order_version}, this program has version "
            f"{ORDER_VERSION}: {prepare_again(root)}"
        )
    for name in ("labeled", "validation", "test"):
        if index.split(name).samples == 0:
            raise UserError(f"the dataset at {where} has no {name} samples: {prepare_again(root)}")
    _check_shards(root, index)
    return index


def _read_local(root: str, path: str) -> bytes | None:
    try:
        return Path(path).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def _from_json(content: dict[str, Any]) -> DatasetIndex:
    fields = {name: value for name, value in content.items() if name != "index_version"}
    for name in SPLITS:
        split = dict(fields[name])
        split["shards"] = tuple(Shard(**shard) for shard in split["shards"])
        split["label_histogram"] = tuple(split["label_histogram"])
        fields[name] = _consistent(name, SplitIndex(**split))
    height, width, channels = fields["image_shape"]
    fields["image_shape"] = (height, width, channels)
    fields["class_names"] = tuple(fields["class_names"])
    return DatasetIndex(**fields)


def _consistent(name: str, split: SplitIndex) -> SplitIndex:
    if split.layout not in LAYOUTS or split.order not in ORDERS or split.block < 1:
        raise ValueError(f"{name}: layout, order or block")
    if sum(shard.samples for shard in split.shards) != split.samples:
        raise ValueError(f"{name}: samples is not the sum over its shards")
    return split


def _check_shards(root: str, index: DatasetIndex) -> None:
    """Local shards are there and of the right size; remote ones are checked as they arrive."""
    for shard in (shard for name in SPLITS for shard in index.split(name).shards):
        location = join(root, shard.name)
        outside = shard.name.startswith(("pipe:", "/")) or ".." in shard.name.split("/")
        if outside and is_remote(root) and not root.startswith("pipe:"):
            # what was downloaded must neither run commands nor read this machine's own files
            raise UserError(
                f"the index at {shown(root)} names the shard {shard.name}, which is not below it: copy"
                " the index to a folder of this machine if you trust it"
            )
        if is_remote(location):
            continue
        try:
            size = Path(location).stat().st_size
        except OSError as error:
            raise UserError(
                f"shard {shard.name} of the dataset at {root} cannot be found "
                f"({error.strerror}): copy it back, or {prepare_again(root)}"
            ) from None
        if size != shard.bytes:
            raise UserError(
                f"shard {shard.name} of the dataset at {root} has {size} bytes, its index says "
                f"{shard.bytes}: copy it again, or {prepare_again(root)}"
            )
