"""How fast our streams and those of other libraries deliver images, as one table.

MosaicML Streaming is not in it: its last release needs numpy < 2.2 and transformers < 5, and cannot
be installed with the versions in constraints.txt.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib import util
from io import BytesIO
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from images import Kind, draw, encode, make
from PIL import Image
from pipelines import (
    FULL,
    LITDATA,
    MANY_LANES,
    PER_SAMPLE,
    PLAIN,
    USUAL,
    WINDOWED,
    Pipeline,
    pipelines,
)

KINDS = (
    Kind("28x28x1", (28, 28, 1), packed=2**19, encoded=2**13, batch=1024),
    Kind("32x32x3", (32, 32, 3), packed=2**17, encoded=2**13, batch=1024),
    Kind("224x224x3", (224, 224, 3), packed=0, encoded=2**11, batch=64),
)
QUICK = (Kind("28x28x1", (28, 28, 1), packed=2**17, encoded=2**12, batch=1024),)
CELLS = tuple((cold, workers) for cold in (False, True) for workers in (0, 1, 2))
QUICK_CELLS = CELLS[:2]
VERDICT = CELLS[0]
VERDICT_ROUNDS = 3
MISSING = "not installed (pip install 'sgan_dist[bench]')"

Cell = tuple[bool, int]  # cold, workers
Rates = dict[str, dict[Cell, float]]  # samples a second and core, of each row

HEADER = """\
Samples per second and core, and (x) the ratio to webdataset's usual per-sample pipeline in the same
column. {batches}.
core    a busy process: a worker, or this process if there are none; 1 torch thread each
warm    the files are in the page cache; without workers, one epoch is read first, so that buffers
        exist as well
cold    the files are dropped from it after the first batches, by fsync and
        posix_fadvise(DONTNEED); at most one epoch is read then
-       the pipeline has no workers, or holds its images in memory
{seconds} s or more each. "Warm without workers", on which the verdicts are based, is the best of
{rounds} alternating rounds, in processor time, which other programs disturb least."""


def measure(pipeline: Pipeline, cold: bool, workers: int, seconds: float) -> float:
    """Returns samples per second and core, over whole epochs unless these take too long."""
    cycle = pipeline.cycle(workers)
    with contextlib.closing(pipeline.batches(workers)) as batches:
        first = pipeline.epoch if (cold, workers) == VERDICT else 1
        while first > 0:
            for _ in range(cycle):
                first -= len(next(batches))
        if cold and pipeline.files:
            drop(pipeline.files)
        seen, elapsed, done = 0, 0.0, False
        clock = time.process_time if (cold, workers) == VERDICT else time.perf_counter
        start = clock()
        while not done:
            for _ in range(cycle):
                seen += len(next(batches))
            elapsed = clock() - start
            # a window is read at once, so only whole epochs count all of the reading
            whole = seen % pipeline.epoch == 0 and (cold or elapsed >= seconds)
            done = whole or elapsed >= 3 * seconds
    return seen / elapsed / max(workers, 1)


def drop(folder: Path) -> None:
    """Drops the pages of a folder's files from the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def compare(rows: Sequence[Pipeline], cells: Sequence[Cell], seconds: float) -> Rates:
    """Returns the rate of every row and cell; of several rounds' best in the verdicts' cell."""
    rates: Rates = {row.name: {} for row in rows}
    for cold, workers in cells:
        able = [row for row in rows if workers <= row.max_workers and (row.files or not cold)]
        for number in range(VERDICT_ROUNDS if (cold, workers) == VERDICT else 1):
            for row in able[:: -1 if number % 2 else 1]:
                rate = measure(row, cold, workers, seconds)
                rates[row.name][cold, workers] = max(rate, rates[row.name].get((cold, workers), 0))
    return rates


def table(kind: Kind, rates: Rates, cells: Sequence[Cell]) -> list[str]:
    """Returns the lines of one kind of images."""
    usual = rates[f"{USUAL}, {kind.format}"]
    lines = []
    for name, row in rates.items():
        texts = [
            f"{_short(row[cell]):>7} {_short(row[cell] / usual[cell]) + 'x':>7}"
            if cell in row
            else f"{'-':>7} {'':>7}"
            for cell in cells
        ]
        lines.append(f"{kind.name:10} {name:33}{'  '.join(texts)}".rstrip())
    if not util.find_spec("litdata"):
        lines.append(f"{kind.name:10} {LITDATA:33}{MISSING}")
    return lines


def _short(value: float) -> str:
    """Returns three digits, with k for thousands and M for millions."""
    for unit, letter in ((1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:#.3g}".rstrip(".") + letter
    return f"{value:#.3g}".rstrip(".")


def decoders(kind: Kind, images: np.ndarray, rates: Rates, seconds: float) -> list[str]:
    """Returns the rates of the decoders alone, and our per-sample path's share of them."""
    files = [encode(image, kind.suffix) for image in images[: kind.encoded // 4]]

    def pillow(file: bytes) -> np.ndarray:
        return np.asarray(Image.open(BytesIO(file)))

    def turbo(file: bytes) -> np.ndarray:
        return simplejpeg.decode_jpeg(file)

    libraries = {"Pillow": pillow} | ({"simplejpeg": turbo} if kind.suffix == "jpg" else {})
    alone = {name: _decoding_rate(decode, files, seconds) for name, decode in libraries.items()}
    list_of_rates = ", ".join(f"{name} {_short(rate)}/s" for name, rate in alone.items())
    line = f"{kind.name} {kind.format} decoded alone: {list_of_rates}"
    if len(libraries) > 1:
        gaps = np.concatenate([(pillow(f).astype(int) - turbo(f)).ravel() for f in files[:64]])
        equal = "equal" if not gaps.any() else f"up to {abs(gaps).max()} of 255 apart"
        line += f"; their pixels are {equal}"
    ours = rates[f"{PER_SAMPLE}, {kind.format}"][VERDICT]
    return [f"{line}; {PER_SAMPLE}: {ours / max(alone.values()):.2f} of the faster"]


def _decoding_rate(
    decode: Callable[[bytes], np.ndarray], files: Sequence[bytes], seconds: float
) -> float:
    seen, start = 0, time.process_time()
    while time.process_time() < start + seconds:
        for file in files:
            decode(file)
        seen += len(files)
    return seen / (time.process_time() - start)


def verdicts(kind: Kind, rates: Rates) -> list[str]:
    """Returns whether the packed path reaches its goals, warm and without workers."""
    rate = {name: row[VERDICT] for name, row in rates.items()}
    usual = f"{USUAL}, {kind.format}"

    def line(what: str, goal: float, *pairs: tuple[str, str]) -> str:
        ratios = [rate[above] / rate[below] for above, below in pairs]
        met = "met" if min(ratios) >= goal else "MISSED"
        figures = ", ".join(f"{ratio:.3g}" for ratio in ratios)
        return f"{kind.name} {what}: {figures} (goal {goal:g}): {met}"

    lanes = (WINDOWED, MANY_LANES)
    return [
        line(f"{WINDOWED} / {PLAIN}, few and many lanes", 0.5, *((row, PLAIN) for row in lanes)),
        line(f"{WINDOWED} / {usual}, few and many lanes", 50, *((row, usual) for row in lanes)),
        line(f"{FULL} / {WINDOWED}", 1, *((FULL, row) for row in lanes)),
    ]


def main(argv: Sequence[str]) -> int:
    """Makes the data, runs the pipelines and prints the table; returns the exit code."""
    parser = argparse.ArgumentParser(prog="streams.py", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="under a minute: 28x28 images only")
    parser.add_argument("--data", type=Path, help="a folder for the data, to use it again")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    kinds, cells, seconds = (QUICK, QUICK_CELLS, 0.5) if args.quick else (KINDS, CELLS, 0.8)
    batches = ", ".join(f"{kind.name}: batches of {kind.batch}" for kind in kinds)
    print(HEADER.format(batches=batches, rounds=VERDICT_ROUNDS, seconds=seconds))
    titles = (f"{'cold' if cold else 'warm'}, {workers} w" for cold, workers in cells)
    print(f"\n{'images':10} {'pipeline':33}{'  '.join(f'{title:>15}' for title in titles)}")
    closing: list[str] = []
    with contextlib.ExitStack() as stack:
        data = args.data or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for kind in kinds:
            if kind.shape[2] == 3 and not util.find_spec("sklearn"):
                print(f"{kind.name:10} {MISSING}")
                continue
            images = draw(kind)
            folder = data.resolve() / f"{kind.name}-{kind.packed}-{kind.encoded}"
            make(folder, kind, images, optional=not args.quick)
            rows = pipelines(folder, kind, images[: kind.packed or kind.encoded])
            rates = compare(rows, cells, seconds)
            print("\n".join(table(kind, rates, cells)), flush=True)
            closing += decoders(kind, images, rates, seconds)
            closing += verdicts(kind, rates) if kind.packed else []
    print("\n" + "\n".join(closing))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
