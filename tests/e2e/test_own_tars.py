"""Foreign tars on a server, from their images to a trained classifier."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from webdataset.writer import TarWriter

from sgan_dist.cli import main
from sgan_dist.data.prepare.sources import load_source
from sgan_dist.run.trainer import train
from tests.conftest import small_config
from tests.ranks import run
from tests.servers import http_server


def write(path: Path, first: int, count: int, labeled: bool) -> None:
    """Writes enlarged digits as JPEGs of several sizes; some unlabeled ones are cut off."""
    source = load_source("digits")
    with TarWriter(str(path), encoder=False) as tar:
        for number in range(first, first + count):
            picture = Image.fromarray(source.train.array[number * 421 % 5000, ..., 0])
            size = (40 + number % 5, 36 + number % 3)
            buffer = io.BytesIO()
            picture.resize(size).save(buffer, format="JPEG", quality=90)
            data = buffer.getvalue()
            if not labeled and number % 50 == 7:
                data = data[: len(data) // 2]
            label = {"cls": str(source.train.labels[number * 421 % 5000]).encode()}
            other = {"json": b'{"caption": "a digit"}', "txt": b"a digit"}
            tar.write({"__key__": f"{number:08d}", "jpg": data, **(label if labeled else other)})


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tars")
    for number in range(4):
        write(folder / f"web-{number:05d}.tar", number * 150, 150, labeled=False)
    for number, name in enumerate(("labeled", "val", "test")):
        write(folder / f"{name}.tar", 1000 + number * 200, 60, labeled=True)
    return folder


@pytest.mark.slow
def test_from_tars_on_a_server_to_a_classifier(tars: Path, tmp_path: Path) -> None:
    with http_server(tars) as server:
        out, url = tmp_path / "index", server.url
        options = ["--image_size", "28", "--gray", "--order", "windowed", "--out", str(out)]
        splits = ["--labeled", f"{url}/labeled.tar", "--validation", f"{url}/val.tar"]
        patterns = [f"{url}/web-{{00000..00003}}.tar", *splits, "--test", f"{url}/test.tar"]
        assert main(["index", *patterns, *options, "--jobs", "2"]) == 0
        summaries = []
        for run_dir, workers in (("a", 0), ("b", 2)):
            config = small_config(
                out,
                tmp_path / run_dir,
                f"--stream.workers={workers}",
                f"--remote.cache={tmp_path / 'cache'}",
                "--train.steps=60",
            )
            train(config)
            summaries.append(json.loads((tmp_path / run_dir / "summary.json").read_text()))
        # every damaged image was left out and named when it was indexed
        assert len((out / "skipped.tsv").read_text().splitlines()) == 12
        assert [s["skipped_images"] for s in summaries] == [0, 0]
        assert summaries[0]["weights_sha256"] == summaries[1]["weights_sha256"]
        assert np.isfinite(summaries[0]["test_error"])
        options = [f"--data.root={out}", "--data.source=null", f"--run_dir={tmp_path}/c"]
        code, output = run("python", "-m", "sgan_dist", "plan", *options)
        assert code == 0 and "unlabeled  8 lanes of about 73 samples" in output, output
