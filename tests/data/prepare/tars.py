"""Small WebDataset tars as other programs write them, and requests to index them."""

from __future__ import annotations

import functools
import io
import json
import tarfile
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from tests.data.prepare.commands import SGAN_DIST

Files = Sequence[tuple[str, bytes]]


@functools.cache
def image(number: int, size: tuple[int, int] = (12, 8), mode: str = "RGB") -> bytes:
    """A JPEG of one color."""
    buffer = io.BytesIO()
    color = number * 7 % 256 if mode == "L" else (number * 7 % 256, number % 256, 99)
    Image.new(mode, size, color).save(buffer, "JPEG")
    return buffer.getvalue()


def write_tar(path: Path, files: Files) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as out:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            out.addfile(info, io.BytesIO(content))


def downloaded(first: int, count: int, failed: Collection[int] = ()) -> Files:
    """As img2dataset writes them: jpg, json and txt; of failed downloads the json alone."""
    files = []
    for number in range(first, first + count):
        key = f"{number:09d}"
        if number not in failed:
            files.append((f"{key}.jpg", image(number)))
        content = {"key": key, "status": "success", "meta": {"class": number % 3}}
        files.append((f"{key}.json", json.dumps(content).encode()))
        if number not in failed:
            files.append((f"{key}.txt", b"a caption"))
    return files


def classified(first: int, count: int, classes: int = 3) -> Files:
    """Records of jpg and cls."""
    return [
        file
        for number in range(first, first + count)
        for file in (
            (f"img/{number:05d}.jpg", image(number)),
            (f"img/{number:05d}.cls", str(number % classes).encode()),
        )
    ]


def request(root: Path | str, out: Path, **options: Any) -> dict[str, Any]:
    """Arguments of index_shards for the fixture `tars`; `root` is its folder or URL."""
    arguments = {
        "unlabeled": [f"{root}/web-{{000..002}}.tar"],
        "labeled": [f"{root}/train-{{0,1}}.tar"],
        "validation": [f"{root}/val.tar"],
        "test": [f"{root}/test.tar"],
        "out": out,
        "jobs": 1,
        "progress": False,
    }
    return arguments | options


def arguments(root: Path | str, out: Path, *options: str) -> list[str]:
    """The same request for the command line."""
    patterns = request(root, out)
    words = ["index", *patterns["unlabeled"], "--out", str(out)]
    for split in ("labeled", "validation", "test"):
        words += [f"--{split}", *patterns[split]]
    return [*words, *options]


def command(root: Path | str, out: Path, *options: str) -> list[str]:
    return [*SGAN_DIST, *arguments(root, out, *options)]


def scanned(out: Path) -> set[str]:
    """The names of the shards whose scan is stored."""
    paths = (out / ".scanned").glob("*.json")
    return {Path(json.loads(path.read_text())[0]).name for path in paths}


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
