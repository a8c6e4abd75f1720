"""Each recipe's step on fake CUDA tensors: no mixed devices, no waits, no cost of the world size."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import REPOSITORY, environment

pytestmark = pytest.mark.process

START = (
    "import ctypes, sys; ctypes.CDLL(sys.argv[1]);"  # before torch is loaded
    " from tests.cuda.fake import main; main()"
)
# Recipe -> collectives of a step, beside those of the gradients. Batch norm: one a layer and
# direction, in G's two passes and in D of mnist_tutorial. Two sums of losses; with consistency one for
# the targets' mean, with feature matching one for both means.
COLLECTIVES = {
    "digits": 10,
    "digits_supervised": 1,
    "fashion_mnist": 10,
    "fashion_mnist_supervised": 1,
    "mnist": 10,
    "mnist_improved_gan": 9,
    "mnist_supervised": 1,
    "mnist_tutorial": 16,
}
MEMORY = ("digits", "mnist_tutorial")
WORLDS = (1, 8, 512, 4096)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """guard.cpp, compiled: without a compiler these tests fail, so that nobody skips them unnoticed."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or "g++"
    path = tmp_path_factory.mktemp("cuda") / "libguard.so"
    folder = Path(torch.__file__).parent
    include = [f"-I{folder}/include", f"-I{folder}/include/torch/csrc/api/include"]
    libraries = [f"-L{folder}/lib", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{folder}/lib"]
    source = str(REPOSITORY / "tests" / "cuda" / "guard.cpp")
    options = ["-std=c++20", "-O0", "-fPIC", "-shared", *include]
    subprocess.run([compiler, *options, source, "-o", str(path), *libraries], check=True)
    return path


def observe(library: Path, *cases: tuple[str, int, int]) -> list[dict[str, Any]]:
    """Cases are recipe, world size, and images of a part and rank."""
    process = subprocess.run(
        [sys.executable, "-c", START, str(library), json.dumps(cases)],
        cwd=REPOSITORY,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert process.returncode == 0, process.stderr
    observed: list[dict[str, Any]] = json.loads(process.stdout.splitlines()[-1])
    return observed


def test_a_step_runs_on_cuda_without_a_wait_and_by_few_collectives(library: Path) -> None:
    assert {path.stem for path in (REPOSITORY / "configs").glob("*.yaml")} == COLLECTIVES.keys()
    results = observe(library, *((recipe, 8, 2) for recipe in COLLECTIVES))
    for (recipe, collectives), seen in zip(COLLECTIVES.items(), results, strict=True):
        assert seen["devices"] == ["cuda:0"], recipe
        assert seen["equal_traces"], recipe
        assert seen["blocking_copies"] == [], recipe
        assert seen["syncs"] == [], recipe
        assert seen["collectives"] == collectives, recipe


def test_memory_does_not_depend_on_the_world_size(library: Path) -> None:
    results = observe(library, *((recipe, n, 64) for recipe in MEMORY for n in WORLDS))
    for number, recipe in enumerate(MEMORY):
        one, eight, many, most = results[4 * number : 4 * number + 4]
        assert many["step_bytes"] <= 1.1 * one["step_bytes"], recipe
        assert most["initialize_bytes"] <= 1.1 * eight["initialize_bytes"], recipe
