"""CSV files and JSON lines that name image files and their labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from sgan_dist.data.prepare.sources.source import (
    Columns,
    Encoded,
    Part,
    Source,
    content_of,
    file_chunks,
    file_states,
    number_classes,
)
from sgan_dist.errors import UserError

IMAGE_COLUMNS = ("file_name", "filename", "file", "path", "image", "img", "name", "id")
LABEL_COLUMNS = ("label", "labels", "class", "category", "target", "fine_label")


def read(file: str, columns: Columns) -> Source:
    """Reads a table whose rows name a file each, from the table's folder on, and its label, if any."""
    path = Path(file).expanduser()
    try:
        if path.suffix in (".jsonl", ".json", ".ndjson"):
            table = pd.read_json(path, lines=True, dtype=False)
        else:
            separator = "\t" if path.suffix == ".tsv" else ","
            table = pd.read_csv(path, sep=separator, dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(f"cannot read {path}: {reason}; give a .csv or .jsonl file") from None
    if not len(table):
        raise UserError(f"{path} has no rows")
    image = choose_column(str(path), list(table), columns.image, IMAGE_COLUMNS, "image")
    label = choose_column(str(path), list(table), columns.label, LABEL_COLUMNS, "label")
    names = [str(name) for name in table[image]]
    class_names, numbers = number_classes({"train": table[label].tolist()})
    states = content_of(file_states(path.parent, names))
    part = Part(
        Encoded(file_chunks(path.parent, names), states), numbers["train"], numbers["train"], names
    )
    return Source(class_names, part)


def choose_column(
    place: str, present: Sequence[str], wanted: str | None, usual: Sequence[str], kind: str
) -> str:
    """Returns the column of images or labels: the one that is wanted, or the one of a usual name."""
    matching = [wanted] if wanted is not None else [name for name in usual if name in present]
    if matching and matching[0] in present:
        return matching[0]
    raise UserError(
        f"{place} has the columns {', '.join(present)}: name the {kind} column with --{kind}_column"
    )
