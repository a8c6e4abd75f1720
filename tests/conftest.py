"""What tests share: the embedded digits, prepared once per session, and a small run."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import matplotlib.font_manager  # noqa: F401 - its cache of fonts is made by a process, before any test
import pytest

from sgan_dist.config import Config, parse
from sgan_dist.data.prepare.shards import prepare
from sgan_dist.data.prepare.splits import Labels

TESTS = Path(__file__).parent
PROCESS_ROOMS = ("distributed", "e2e", "slurm")  # all their tests start processes
_process_marked = True  # whether the running test may start processes


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if any(item.path.is_relative_to(TESTS / room) for room in PROCESS_ROOMS):
            item.add_marker(pytest.mark.process)


@pytest.fixture(autouse=True)
def _only_marked_tests_start_processes(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Keeps `make check` fast: a test that starts a process must be marked `process`."""
    global _process_marked
    _process_marked = request.node.get_closest_marker("process") is not None
    if not _process_marked:
        # multiprocessing starts its servers without an audit event
        monkeypatch.setattr(BaseProcess, "start", lambda self: _refuse())
    yield
    _process_marked = True


@pytest.fixture(autouse=True)
def _the_log_is_as_a_program_finds_it() -> Iterator[None]:
    """Undoes what `sgan_dist.cli.main`, called in a test, does to the package's logger."""
    logger = logging.getLogger("sgan_dist")
    before = logger.handlers, logger.propagate, logger.level
    yield
    logger.handlers, logger.propagate, logger.level = before


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """The package's log of this process."""
    caplog.set_level(logging.INFO, "sgan_dist")
    return caplog


def _refuse() -> None:
    raise AssertionError("this test starts a process: mark it with @pytest.mark.process")


def _audit(event: str, arguments: object) -> None:
    if event in ("subprocess.Popen", "os.fork", "os.posix_spawn") and not _process_marked:
        _refuse()


sys.addaudithook(_audit)


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded digits as `make train` prepares them: packed, held in memory."""
    out = tmp_path_factory.mktemp("data") / "digits"
    prepare("digits", str(out), labels=Labels(10), progress=False)
    return out


@pytest.fixture(scope="session")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded digits in several shards, streamed in the windowed order."""
    out = tmp_path_factory.mktemp("data") / "windowed"
    prepare(
        "digits",
        str(out),
        labels=Labels(30),
        order="windowed",
        samples_per_shard=512,
        progress=False,
    )
    return out


def small_config(root: Path, run: Path, *overrides: str) -> Config:
    """The config of a run of a few seconds: small networks, every source of randomness on."""
    return parse(
        [
            f"--data.root={root}",
            f"--run_dir={run}",
            "--name=small",
            "--batch.labeled=12",
            "--batch.unlabeled=24",
            "--stream.lanes=12",
            "--batch.fake=12",
            '--model.discriminator_args={"width": 4, "noise": 0.2, "dropout": 0.3}',
            '--model.generator_args={"width": 4, "latent_size": 8}',
            "--augment.rotation=10",
            "--augment.translate=2",
            "--train.steps=20",
            "--train.log_every=4",
            "--train.evaluate_every=0",
            "--train.sample_every=0",
            "--checkpoint.every=1000",
            "--tracking.wandb=false",
            *overrides,
        ]
    )
