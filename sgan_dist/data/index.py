"""The dataset index (`index.json`): splits, shards, counts, checksums and the fingerprint."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shlex
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from sgan_dist.config import RemoteConfig
from sgan_dist.data.images import Resize
from sgan_dist.data.order import ORDER_VERSION
from sgan_dist.data.remote.transfer import read
from sgan_dist.data.remote.urls import is_remote, join, redact_url
from sgan_dist.errors import UserError
from sgan_dist.files import write_whole

INDEX_NAME = "index.json"
INDEX_VERSION = 2
SPLITS = ("labeled", "unlabeled", "validation", "test")
LAYOUTS = ("packed", "per-sample")
ORDERS = ("full", "windowed")
DEFAULT = RemoteConfig()
FULL_ORDER_BYTES = 2**30  # a split of at most this decoded size is held in memory


@dataclass(frozen=True, slots=True)
class Shard:
    """One tar: its name, samples, file size in bytes, and sha256; and those of its sidecar.

    The name is relative to the dataset's root, an absolute path, or a URL without its secrets. The
    sidecar, of per-sample tars, holds int64 (samples, 3): place and size of each image in bytes, and
    its class number or -1. Those of 0.1.0 have none.
    """

    name: str
    samples: int
    bytes: int
    sha256: str
    sidecar_bytes: int = 0
    sidecar_sha256: str = ""


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
    """What a dataset holds. `request` describes in words what it was prepared from.

    `label` is the place of the class in a per-sample record: `cls`, or `json:KEY`. `resize` says how
    images of another size become `image_hwc`, see `images.fit`; with `none` they are damaged.
    `decode_version` is that of the rules by which per-sample images are decoded.
    """

    labeled: SplitIndex
    unlabeled: SplitIndex
    validation: SplitIndex
    test: SplitIndex
    image_hwc: tuple[int, int, int]
    class_names: tuple[str, ...]
    label: str
    resize: Resize
    source: str
    request: str
    label_seed: int
    labels_per_class: int
    order_version: int
    fingerprint: str
    decode_version: int = 1

    def split(self, name: str) -> SplitIndex:
        """Returns the split of that name, one of SPLITS."""
        split: SplitIndex = getattr(self, name)
        return split


def order_for(samples: int, image_hwc: tuple[int, int, int]) -> str:
    """Returns the order for a split of this decoded size: full up to 1 GiB, else windowed."""
    return "full" if samples * math.prod(image_hwc) <= FULL_ORDER_BYTES else "windowed"


def fingerprint(index: DatasetIndex) -> str:
    """Returns the sha256 of everything that training and evaluation depend on; not of file names."""
    splits = {
        name: {
            **asdict(replace(index.split(name), shards=())),
            "shards": [_shard_content(index, shard) for shard in index.split(name).shards],
        }
        for name in SPLITS
    }
    # as 0.1.0 wrote them, whose fingerprints stay valid
    resize = {"none": False, "shorter": True}.get(index.resize, index.resize)
    images = [index.image_hwc, index.class_names, index.label, resize]
    content: list[Any] = [index.order_version, *images, splits]
    if index.decode_version != 1:
        content.append(index.decode_version)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _shard_content(index: DatasetIndex, shard: Shard) -> tuple[int | str, ...]:
    if index.decode_version == 1:
        return shard.samples, shard.sha256
    return shard.samples, shard.sha256, shard.sidecar_sha256  # which of its samples these are


def with_fingerprint(index: DatasetIndex) -> DatasetIndex:
    """Returns the same index with its fingerprint filled in."""
    return replace(index, fingerprint=fingerprint(index))


def save(index: DatasetIndex, folder: str | os.PathLike[str]) -> None:
    """Writes index.json into the folder and flushes it to disk."""
    text = json.dumps({"index_version": INDEX_VERSION, **asdict(index)}, indent=1)
    write_whole(Path(folder) / INDEX_NAME, f"{text}\n", fsync=True)


def prepare_again(root: str | os.PathLike[str]) -> str:
    """Returns the advice of errors about the dataset at `root`; preparing replaces no folder."""
    if is_remote(str(root)):
        return "prepare or index the dataset again"
    return f"remove {root} (rm -r {shlex.quote(str(root))}) and prepare the dataset again"


def sidecar_name(split: str, number: int) -> str:
    """Returns where, below the root, the sidecar of a shard lies, also of a foreign one."""
    return f"{split}/{number:06d}.tar.samples.npy"


def load_index(root: str | os.PathLike[str], remote: RemoteConfig = DEFAULT) -> DatasetIndex:
    """Reads and checks a dataset's index, and the sizes of local shards, but not their contents.

    Raises UserError if the dataset is absent, damaged, or of another version.
    """
    root = os.fspath(root)
    path = join(root, INDEX_NAME)
    dataset, file = redact_url(root), redact_url(path)  # a signed URL's secret is not printed
    text = read(path, remote) if is_remote(path) else _read_local(path)
    if text is None:
        raise UserError(
            f"no dataset at {dataset}: prepare one with `sgan-dist prepare --source ... --out DIR`"
        )

    def unusable(why: str) -> UserError:
        return UserError(f"{file} {why}: {prepare_again(root)}")

    try:
        content = json.loads(text)
    except ValueError as error:
        raise unusable(f"is not valid JSON ({error})") from None
    version = content.get("index_version") if isinstance(content, dict) else None
    if version != INDEX_VERSION:
        raise unusable(f"has index version {version}, this program reads version {INDEX_VERSION}")
    try:
        index = _from_json(content)
    except ValueError as error:
        raise unusable(f"has a missing or invalid field ({error})") from None
    actual = fingerprint(index)
    if actual != index.fingerprint:
        raise unusable(
            f"was changed by hand or damaged: its contents give fingerprint {actual[:12]}, and it"
            f" states {index.fingerprint[:12]}"
        )
    if index.order_version != ORDER_VERSION:
        raise unusable(
            f"was made for order version {index.order_version}, this program has version"
            f" {ORDER_VERSION}"
        )
    for name in ("labeled", "validation", "test"):
        if index.split(name).samples == 0:
            raise UserError(
                f"the dataset at {dataset} has no {name} samples: {prepare_again(root)}"
            )
    _check_shards(root, index)
    return index


def _read_local(path: str) -> bytes | None:
    try:
        return Path(path).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def _from_json(content: dict[str, Any]) -> DatasetIndex:
    if "image_shape" in content:  # the key before it was renamed
        content["image_hwc"] = content.pop("image_shape")
    if isinstance(content.get("resize"), bool):  # of 0.1.0
        content["resize"] = "shorter" if content["resize"] else "none"
    try:
        index = TypeAdapter(DatasetIndex).validate_python(content)
    except ValidationError as errors:
        error = errors.errors()[0]
        raise ValueError(f"{'.'.join(map(str, error['loc']))}: {error['msg']}") from None
    for name in SPLITS:
        split = index.split(name)
        if split.layout not in LAYOUTS or split.order not in ORDERS or split.block < 1:
            raise ValueError(f"{name}: layout, order or block")
        if sum(shard.samples for shard in split.shards) != split.samples:
            raise ValueError(f"{name}: samples is not the sum over its shards")
    return index


def _check_shards(root: str, index: DatasetIndex) -> None:
    """Checks that local shards exist and have the right size; remote ones are checked on arrival."""
    for shard in (shard for name in SPLITS for shard in index.split(name).shards):
        location = join(root, shard.name)
        outside = shard.name.startswith(("pipe:", "/"))
        if outside and is_remote(root) and not root.startswith("pipe:"):
            # a downloaded index must neither run commands nor read this machine's own files
            raise UserError(
                f"the index at {redact_url(root)} names the shard {shard.name}, which is not below"
                " it: copy the index to a folder of this machine if you trust it"
            )
        if is_remote(location):
            continue
        try:
            size = Path(location).stat().st_size
        except OSError as error:
            problem = f"cannot be found ({error.strerror})"
        else:
            if size == shard.bytes:
                continue
            problem = f"has {size} bytes, its index says {shard.bytes}"
        raise UserError(
            f"shard {shard.name} of the dataset at {root} {problem}: copy it again, or"
            f" {prepare_again(root)}"
        )
