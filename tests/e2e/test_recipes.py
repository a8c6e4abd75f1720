"""Each shipped recipe, run as users run it: its first 50 steps lower what they should."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from sgan_dist.config import check, parse
from sgan_dist.data.prepare import prepare
from tests.ranks import REPOSITORY, run

RECIPES = sorted((REPOSITORY / "configs").glob("*.yaml"))
STEPS, WINDOW = 50, 5


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Path]:
    """Datasets by source and labels a class; the digits stand in where $SGAN_DATA is not set."""
    folder = tmp_path_factory.mktemp("recipes")

    def make(source: str, labels: int) -> Path:
        source = source if "SGAN_DATA" in os.environ else "digits"
        out = folder / f"{source}-{labels}"
        if not out.exists():
            prepare(source, str(out), labels_per_class=labels, label_seed=0, progress=False)
        return out

    return make


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_first_steps_lower_the_losses(
    path: Path, prepared: Callable[[str, int], Path], tmp_path: Path
) -> None:
    config = check(parse([f"--config={path}"])[0])
    assert config.data.source is not None
    code, said = run(
        "accelerate", "launch", "launch/train.py", f"--config={path}", f"--run_dir={tmp_path}/run",
        f"--data.root={prepared(config.data.source, config.data.labels_per_class)}",
        "--data.source=null", f"--train.steps={STEPS}", "--train.log_every=1",
        "--train.baseline_steps=0", "--train.evaluate_every=0", "--train.sample_every=0",
    )  # fmt: skip
    assert code == 0, said
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "d/supervised" in line]
    assert len(steps) == STEPS

    def falls(*names: str) -> bool:
        losses = [sum(line[name] for name in names) for line in steps]
        return sum(losses[-WINDOW:]) < sum(losses[:WINDOW])

    assert falls("d/supervised")
    if config.model.generator is not None:
        assert falls("d/unlabeled", "d/fake")  # -log p of the right side of real or fake
