"""WebDataset tars, to be packed; `index` leaves them where they are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sgan_dist.data.prepare.patterns import expand
from sgan_dist.data.prepare.sources.source import (
    CHUNK,
    Chunk,
    Columns,
    Encoded,
    Part,
    Source,
    content_of,
    file_states,
    number_classes,
)
from sgan_dist.data.records import Place, image_of, label_of, list_records
from sgan_dist.data.remote.urls import is_remote
from sgan_dist.errors import UserError


def read(pattern: str, columns: Columns) -> Source:
    """Reads local tars: images by `columns.image`, an extension, labels by `columns.label`, `cls` or as
    `records.label_of` says; records without an image are passed over."""
    paths = [Path(location) for location in expand([pattern], "source") if not is_remote(location)]
    if not paths:
        raise UserError(f"{pattern} is not on this machine: sgan-dist index reads remote tars")
    chunks, names, labels = list[Chunk](), list[str](), list[object]()
    for path in paths:
        try:
            places = _read(path, columns, names, labels)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise UserError(f"cannot read {path}: {reason}") from None
        for start in range(0, len(places), CHUNK):
            some = tuple(places[start : start + CHUNK])
            chunks.append(Chunk(len(some), _Images(path, some)))
    class_names, numbers = number_classes({"train": labels})
    states = (state for path in paths for state in file_states(path.parent, [path.name]))
    content = content_of([str(columns.image), str(columns.label), *states])
    encoded = Encoded(tuple(chunks), content)
    return Source(class_names, Part(encoded, numbers["train"], numbers["train"], names))


@dataclass(frozen=True)
class _Images:
    path: Path
    places: tuple[Place, ...]

    def __call__(self) -> Iterator[bytes]:
        with open(self.path, "rb") as file:
            for offset, size in self.places:
                file.seek(offset)
                yield file.read(size)


def _read(path: Path, columns: Columns, names: list[str], labels: list[object]) -> list[Place]:
    """Returns the places of a tar's images, and appends their names and labels."""
    places = []
    with open(path, "rb") as file:
        for key, files in list_records(file).records:
            extension = image_of(files, columns.image)
            if extension is not None:
                places.append(files[extension])
                names.append(f"{path.name}/{key}.{extension}")
                labels.append(label_of(key, files, columns.label or "cls", file))
    return places
