"""Each shipped recipe, run as users run it: its first 50 steps lower what they should."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from sgan_dist.config import parse
from sgan_dist.data.prepare.shards import prepare
from sgan_dist.data.prepare.splits import Labels
from tests.ranks import REPOSITORY, run

pytestmark = pytest.mark.process

RECIPES = [
    # where the CPU computes bf16 in software, such a recipe takes minutes
    pytest.param(path, id=path.stem, marks=[pytest.mark.slow] * ("bf16" in path.read_text()))
    for path in sorted((REPOSITORY / "configs").glob("*.yaml"))
]
STEPS, WINDOW = 50, 5


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Path]:
    """Datasets by source and labels per class; without $SGAN_DATA the digits stand in."""
    folder = tmp_path_factory.mktemp("recipes")

    def make(source: str, labels: int) -> Path:
        source = source if "SGAN_DATA" in os.environ else "digits"
        out = folder / f"{source}-{labels}"
        if not out.exists():
            prepare(source, str(out), labels=Labels(labels), progress=False)
        return out

    return make


@pytest.mark.parametrize("path", RECIPES)
def test_the_first_steps_lower_the_losses(
    path: Path, prepared: Callable[[str, int], Path], tmp_path: Path
) -> None:
    config = parse([f"--config={path}"])
    assert config.data.source is not None
    code, output = run(
        "accelerate", "launch", "launch/train.py", f"--config={path}", f"--run_dir={tmp_path}/run",
        f"--data.root={prepared(config.data.source, config.data.labels_per_class)}",
        "--data.source=null", f"--train.steps={STEPS}", "--train.log_every=1",
        "--train.evaluate_every=0", "--train.sample_every=0", timeout=280,
    )  # fmt: skip
    assert code == 0, output
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "d/supervised" in line]
    assert len(steps) == STEPS

    def fall(*names: str) -> bool:
        losses = [sum(line[name] for name in names) for line in steps]
        return sum(losses[-WINDOW:]) < sum(losses[:WINDOW])

    assert fall("d/supervised")
    if config.uses_generator:
        assert fall("d/unlabeled", "d/fake")  # -log p of the right side of real or fake
