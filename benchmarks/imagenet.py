"""A simulated ImageNet: rates of indexing and preparing, memory in training, the cost of an order.

    python benchmarks/imagenet.py FOLDER [--images 1281167] [--size 64]

Writes FOLDER/tars: JPEG images of 1,000 classes, a class number for a tenth of them, 10,000 a tar. Then
`index` cuts validation and test off, `prepare` packs a part of the images as 64 x 64 pixels, and a run
trains on the tars; each in a process of its own, whose largest resident memory is printed.
"""

from __future__ import annotations

import argparse
import io
import json
import resource
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES, SHARD, LABELED = 1000, 10_000, 10
BATCH = 64

TRAIN = """
import resource, sys, time
from sgan_dist import load_config
from sgan_dist.data.index import load_index
from sgan_dist.data.loader import SemiSupervisedLoader

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 2**20

config = load_config("digits", *sys.argv[1:])
index = load_index(config.data.root)
with SemiSupervisedLoader(index, config, 0, 1) as loader:
    batches = loader.batches(0)
    for step in range(1, 101):
        if step == 11:
            start = time.perf_counter()
        next(batches)
        if step in (1, 10, 100):
            print(f"step {step}: {resident():,.0f} MiB resident")
    rate = 90 * (config.batch.labeled + config.batch.unlabeled) / (time.perf_counter() - start)
    print(f"{rate:,.0f} images/s, steps 11 to 100")
"""
ORDER = """
import sys, time
import numpy as np
from sgan_dist.data.order import BalancedOrder, WindowedOrder
shards = [10_000] * 128
order = WindowedOrder(shards, 64, 2000, 0, "unlabeled")
start = time.perf_counter()
for lane in range(64):
    epoch, window, _ = order.locate(lane, 50_000)
    order.pieces(epoch, *order.window_line(lane, epoch, window))
    order.window_permutation(lane, epoch, window)
print(f"windowed order, a window of each of 64 lanes: {1e3 * (time.perf_counter() - start):.1f} ms")
labels = np.random.default_rng(0).integers(0, 1000, 128_000)
order = BalancedOrder(labels, 0, "labeled", 64)
order.take(0, 0, 64)
start = time.perf_counter()
for step in range(100):
    order.take(step, 0, 64)
print(f"balanced order of 1,000 classes, a step of 64: {10 * (time.perf_counter() - start):.2f} ms")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=1_281_167)
    parser.add_argument("--size", type=int, default=64)
    arguments = parser.parse_args()
    folder, tars = arguments.folder, arguments.folder / "tars"
    shards = -(-arguments.images // SHARD)
    if not (tars / f"{shards - 1:06d}.tar").exists():
        start = time.perf_counter()
        write(tars, arguments.images, arguments.size)
        size = sum(path.stat().st_size for path in tars.iterdir()) / 2**30
        print(
            f"{arguments.images:,} images written, {size:.2f} GiB, {time.perf_counter() - start:.0f} s"
        )
    every = f"{tars}/{{{0:06d}..{shards - 1:06d}}}.tar"
    index = [
        "index", every, "--labeled", every, "--validation_fraction=0.05", "--test_fraction=0.05",
        f"--image_size={arguments.size}", f"--out={folder / 'index'}",
    ]  # fmt: skip
    report("index", arguments.images, ["-m", "sgan_dist", *index])
    images = folder / "images"
    some = min(arguments.images, 20 * SHARD)
    if not images.exists():
        unpack(tars, images, some)
    prepare = [
        "prepare", f"--source=folder:{images}", f"--image_size={arguments.size}",
        f"--out={folder / 'packed'}",
    ]  # fmt: skip
    report("prepare", some, ["-m", "sgan_dist", *prepare])
    options = [
        "--data.source=null", f"--batch.labeled={BATCH}", f"--batch.unlabeled={BATCH}",
        "--stream.lanes=64", "--batch.balanced=false",
    ]  # fmt: skip
    for name in ("index", "packed"):
        print(f"loading from {name}:", flush=True)
        run(["-c", TRAIN, *options, f"--data.root={folder / name}"])
    run(["-c", ORDER])


def write(tars: Path, images: int, size: int) -> None:
    """Writes tars of JPEG images with some structure, and labels of every tenth of them."""
    tars.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:size, :size] / size
    pictures = []
    for _ in range(4096):  # the pixels repeat, the files do not: each has its own number inside
        a, b, c = rng.uniform(1, 9, (3, 3, 1, 1))
        waves = np.sin(a * x + b * y + c) * 90 + 128 + rng.normal(0, 12, (3, size, size))
        buffer = io.BytesIO()
        pixels = waves.clip(0, 255).astype(np.uint8).transpose(1, 2, 0)
        Image.fromarray(pixels).save(buffer, "JPEG", quality=75)
        pictures.append(buffer.getvalue())
    for shard in range(-(-images // SHARD)):
        with tarfile.open(tars / f"{shard:06d}.tar", "w") as tar:
            for number in range(shard * SHARD, min(images, (shard + 1) * SHARD)):
                comment = b"\xff\xfe\x00\x0a%08d" % number
                data = pictures[number % len(pictures)]
                add(tar, f"{number:08d}.jpg", data[:2] + comment + data[2:])
                if number % LABELED == 0:
                    add(tar, f"{number:08d}.cls", b"%d" % (number // LABELED % CLASSES))


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def unpack(tars: Path, images: Path, count: int) -> None:
    """Writes the first images as a folder: those with a label in that of their class."""
    for shard in range(count // SHARD):
        with tarfile.open(tars / f"{shard:06d}.tar") as tar:
            for member in tar:
                number = int(member.name[:8])
                if member.name.endswith(".jpg"):
                    file = tar.extractfile(member)
                    assert file is not None
                    part = (
                        f"class-{number // LABELED % CLASSES:04d}"
                        if number % LABELED == 0
                        else "unlabeled"
                    )
                    (images / part).mkdir(parents=True, exist_ok=True)
                    (images / part / member.name).write_bytes(file.read())


def report(name: str, images: int, command: list[str]) -> None:
    start = time.perf_counter()
    run(command)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**10
    print(
        json.dumps(
            {name: {"images/s": round(images / seconds), "s": round(seconds), "MiB": round(peak)}}
        )
    )
    sys.stdout.flush()


def run(command: list[str]) -> None:
    subprocess.run([sys.executable, *command], check=True)


if __name__ == "__main__":
    main()
