"""Hugging Face datasets as parquet or Arrow files, by column names."""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sgan_dist.data.prepare.sources.source import (
    Chunk,
    Columns,
    Encoded,
    Part,
    Source,
    content_of,
    file_states,
    number_classes,
)
from sgan_dist.data.prepare.sources.table import IMAGE_COLUMNS, LABEL_COLUMNS, choose_column
from sgan_dist.errors import UserError

SUFFIXES = (".parquet", ".arrow")
_PART = re.compile(r"(?:^|[/_.-])(train|validation|valid|val|test|unlabeled)(?=[/_.-])")
_PARTS = {"valid": "validation", "val": "validation"}


def read(place: str, columns: Columns) -> Source:
    """Reads a file, a folder or a pattern; `train`, `validation` and `test` in names are parts.

    Images are structs of `bytes` and `path`, as `datasets` writes them, or binary; labels are class
    numbers or names, null for an image without a label.
    """
    path = Path(place).expanduser()
    if path.is_dir():
        files = [file for file in sorted(path.rglob("*")) if file.suffix in SUFFIXES]
    else:
        files = [Path(file) for file in sorted(glob.glob(str(path), recursive=True))]  # noqa: PTH207
    if not files:
        raise UserError(f"there are no .parquet or .arrow files at {path}: check the path")
    parts: dict[str, list[Path]] = {}
    root = path if path.is_dir() else path.parent
    for file in files:
        below = str(file.relative_to(root)) if file.is_relative_to(root) else file.name
        match = _PART.search(below)
        part = match[1] if match else "train"
        parts.setdefault(_PARTS.get(part, part), []).append(file)
    return read_parts(parts, columns)


def read_parts(files: Mapping[str, Sequence[Path]], columns: Columns) -> Source:
    """Reads the files of each part; `train` must be among them."""
    if "train" not in files:
        raise UserError(f"there are the parts {', '.join(files)}, and no train: rename the files")
    first = _Tables(files["train"][0])
    place = str(files["train"][0])
    features = first.features()
    image = columns.image or next((k for k, v in features.items() if v == "Image"), None)
    image = choose_column(place, first.names, image, IMAGE_COLUMNS, "image")
    classes = [key for key, value in features.items() if isinstance(value, list)]
    label = columns.label or (classes[0] if len(classes) == 1 else None)
    label = choose_column(place, first.names, label, LABEL_COLUMNS, "label")
    if first.kind(image) not in ("binary", "struct"):
        raise UserError(f"{place}: the column {image} is {first.kind(image)}: images are bytes")
    known = features.get(label)
    values: dict[str, Sequence[object]] = {}
    encoded = {}
    for part, paths in files.items():
        chunks, labels = [], list[object]()
        for path in paths:
            table = _Tables(path)
            for batch, rows in enumerate(table.rows):
                chunks.append(Chunk(rows, _Images(path, batch, image)))
            labels += table.column(label) if label in table.names else [None] * sum(table.rows)
        values[part] = labels
        states = (state for path in paths for state in file_states(path.parent, [path.name]))
        encoded[part] = Encoded(tuple(chunks), content_of([image, label, *states]))
    names, numbers = number_classes(values, known if isinstance(known, list) else None)
    parts = {part: Part(encoded[part], numbers[part], numbers[part]) for part in files}
    return Source(
        names,
        parts["train"],
        parts.get("test"),
        parts.get("validation"),
        parts.get("unlabeled"),
    )


@dataclass(frozen=True)
class _Images:
    """The images of one row group or record batch."""

    path: Path
    batch: int
    column: str

    def __call__(self) -> Iterator[bytes | str]:
        for value in _Tables(self.path).column(self.column, self.batch):
            data = value["bytes"] if isinstance(value, dict) else value
            yield data if isinstance(data, bytes) else "no bytes: the table only names a file"


class _Tables:
    """A parquet file's row groups, or the record batches of an Arrow file or stream."""

    def __init__(self, path: Path) -> None:
        try:
            import pyarrow as pa
            from pyarrow import ipc, parquet
        except ImportError:
            raise UserError(
                "reading parquet and Arrow files takes pyarrow: pip install 'sgan_dist[parquet]'"
            ) from None
        self._batches: Any = None
        try:
            if path.suffix == ".parquet":
                self._file: Any = parquet.ParquetFile(path)
                self._schema = self._file.schema_arrow
                groups = range(self._file.num_row_groups)
                self.rows = [self._file.metadata.row_group(n).num_rows for n in groups]
                return
            source = pa.memory_map(str(path))
            try:
                file = ipc.open_file(source)
                self._batches = [file.get_batch(n) for n in range(file.num_record_batches)]
            except pa.ArrowInvalid:
                source.seek(0)
                file = ipc.open_stream(source)
                self._batches = list(file)
            self._schema = file.schema
            self.rows = [batch.num_rows for batch in self._batches]
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"cannot read {path}: {str(error).splitlines()[0]}") from None

    @property
    def names(self) -> list[str]:
        """Of the columns."""
        return list(self._schema.names)

    def kind(self, column: str) -> str:
        """Returns `binary`, `struct`, or another type."""
        text = str(self._schema.field(column).type)
        return next((kind for kind in ("struct", "binary") if kind in text.partition("<")[0]), text)

    def features(self) -> dict[str, str | list[str]]:
        """Returns what `datasets` noted of its columns: `Image`, or the names of classes."""
        text = (self._schema.metadata or {}).get(b"huggingface", b"{}")
        features = json.loads(text).get("info", {}).get("features", {})
        noted: dict[str, Any] = {}
        for name, feature in features.items():
            if isinstance(feature, dict) and feature.get("_type") in ("Image", "ClassLabel"):
                noted[name] = feature.get("names", feature["_type"])
        return noted

    def column(self, name: str, batch: int | None = None) -> list[Any]:
        """Returns the values of a column, of all rows or of one batch."""
        if self._batches is None:
            groups = range(len(self.rows)) if batch is None else [batch]
            values = [self._file.read_row_group(n, [name]).column(0).to_pylist() for n in groups]
        else:
            batches = self._batches if batch is None else [self._batches[batch]]
            values = [some.column(name).to_pylist() for some in batches]
        return [value for some in values for value in some]
