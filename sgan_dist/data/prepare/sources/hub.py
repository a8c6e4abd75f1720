"""Datasets of the Hugging Face hub, or of a folder that `datasets` can load."""

from __future__ import annotations

from pathlib import Path

from sgan_dist.data.prepare.sources.parquet import read_parts
from sgan_dist.data.prepare.sources.source import Columns, Source
from sgan_dist.errors import UserError


def read(name: str, columns: Columns) -> Source:
    """Loads `name` by the library `datasets`, into its cache, and reads the Arrow files from there."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError("reading the hub takes datasets: pip install 'sgan_dist[hub]'") from None
    try:
        loaded = load_dataset(name)
    except Exception as error:  # noqa: BLE001 - each way to load has its own errors
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"cannot load the dataset {name}: {reason}; check its name") from None
    files = {
        str(part): [Path(file["filename"]) for file in dataset.cache_files]
        for part, dataset in loaded.items()
    }
    return read_parts(files, columns)
