"""One SLURM cluster for all tests of this folder, which carry the marker `slurm`."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, unavailable
from tests.slurm.training import Training, write_config

FOLDER = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if FOLDER in item.path.parents:
            item.add_marker(pytest.mark.slurm)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Two nodes, n1 and n2. Without SLURM the tests are skipped; in CI they fail."""
    reason = unavailable()
    if reason and os.environ.get("CI"):
        pytest.fail(reason)
    if reason:
        print(reason)
        pytest.skip(reason)
    directory = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # short, for sockets
    directory.chmod(0o755)
    cluster = Cluster(directory)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="session")
def config(windowed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config file of a small run, on shards in windowed order."""
    return write_config(tmp_path_factory.mktemp("configs") / "small.yaml", windowed)


@pytest.fixture(scope="session")
def straight(cluster: Cluster, config: Path, tmp_path_factory: pytest.TempPathFactory) -> Training:
    """A run on both nodes that nothing interrupted."""
    run = Training(cluster, config, tmp_path_factory.mktemp("runs") / "straight")
    run.finish()
    return run
