"""W&B in real runs: offline without a key, one online run over resumes, and failures in between."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.commands import settings, training, wait_for_step
from tests.ranks import REPOSITORY, environment, launch, run
from tests.wandb_server import WandbServer

pytestmark = pytest.mark.process


@pytest.fixture
def server() -> Iterator[WandbServer]:
    server = WandbServer()
    yield server
    server.close()


def online(server: WandbServer) -> dict[str, Any]:
    return {"WANDB_MODE": "online", "WANDB_BASE_URL": server.url, "WANDB_API_KEY": "0" * 40}


def test_without_a_key_it_is_offline(digits: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    arguments = training(digits, tmp_path / "run", "--train.steps=20")
    code, output = run("python", *arguments, WANDB_MODE=None, HOME=str(home))
    assert code == 0, output
    written = list((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(written) == 1
    assert written[0].stem == "run-" + (tmp_path / "run" / "wandb_id").read_text()
    pictures = {path.name.split("_")[0] for path in written[0].parent.glob("files/media/*/*")}
    assert {"samples", "confusion", "mistakes"} <= pictures
    (table,) = written[0].parent.glob("files/media/table/mistakes_*")
    assert len(json.loads(table.read_text())["data"]) == 24


@pytest.mark.parametrize(
    ("mode", "written"),
    [("offline", True), pytest.param("disabled", False, marks=pytest.mark.slow)],
)
def test_the_users_own_setting_decides(
    mode: str, written: bool, digits: Path, tmp_path: Path, server: WandbServer
) -> None:
    """`wandb offline` and `wandb disabled` in the working folder, with a key."""
    variables = environment(**online(server) | {"WANDB_MODE": None, "PYTHONPATH": str(REPOSITORY)})
    program = str(Path(sys.executable).parent / "wandb")
    subprocess.run([program, mode], cwd=tmp_path, env=variables, check=True, timeout=60)
    command = [sys.executable, "-m", "sgan_dist", "train", *settings(digits, tmp_path / "run")]
    subprocess.run(
        [*command, "--train.steps=10"], cwd=tmp_path, env=variables, check=True, timeout=120
    )
    assert not server.run_ids and not server.history
    assert any((tmp_path / "run").glob("wandb/offline-run-*")) == written


def test_a_broken_key_is_one_line_and_the_run_goes_on(digits: Path, tmp_path: Path) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine api.wandb.ai login user password YOUR_KEY_HERE\n")
    netrc.chmod(0o600)
    arguments = training(digits, tmp_path / "run", "--train.steps=10")
    code, output = run("python", *arguments, WANDB_MODE=None, NETRC=str(netrc), HOME=str(tmp_path))
    assert code == 0 and output.count("W&B could not start online (") == 1, output
    assert "Traceback" not in output and "YOUR_KEY_HERE" not in output
    assert any((tmp_path / "run").glob("wandb/offline-run-*"))


def test_one_run_over_resumes(digits: Path, tmp_path: Path, server: WandbServer) -> None:
    for steps in (20, 40):
        arguments = training(digits, tmp_path, f"--train.steps={steps}", "--optim.decay=0")
        code, output = run("python", *arguments, **online(server))
        assert code == 0, output
    assert set(server.run_ids) == {(tmp_path / "wandb_id").read_text()}
    assert [line["_step"] for line in server.history if "d/supervised" in line] == [10, 20, 30, 40]
    assert any("samples" in line for line in server.history)


@pytest.mark.slow
def test_an_alert_reaches_the_run(digits: Path, tmp_path: Path, server: WandbServer) -> None:
    arguments = training(digits, tmp_path / "run", "--train.steps=20")
    assert run("python", *arguments, **online(server))[0] == 0
    alert = ("sgan-dist", "alert", str(tmp_path / "run"), "two requeues made no checkpoint")
    code, output = run(*alert, **online(server))
    assert code == 0 and "the run is done" in output and not server.alerts, output
    (tmp_path / "run" / "DONE").unlink()
    code, output = run(*alert, **online(server))
    assert code == 0 and "ALERT" in output and "not sent" not in output, output
    run_id = (tmp_path / "run" / "wandb_id").read_text()
    assert server.alerts == [(run_id, "run has stopped", "two requeues made no checkpoint")]
    code, output = run(*alert, WANDB_MODE="offline")
    assert code == 0 and "not sent" in output, output


@pytest.mark.slow
def test_an_outage_does_not_stop_training(
    digits: Path, tmp_path: Path, server: WandbServer
) -> None:
    process = launch("python", *training(digits, tmp_path), **online(server))
    wait_for_step(process, tmp_path, 20)
    server.broken = True
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    logged = [json.loads(line) for line in lines]
    assert [line["step"] for line in logged if "d/fake" in line] == list(range(10, 151, 10))


@pytest.mark.slow
def test_with_an_unreachable_server_it_is_offline(
    digits: Path, tmp_path: Path, server: WandbServer
) -> None:
    server.broken = True
    arguments = training(digits, tmp_path, "--train.steps=20")
    code, output = run("python", *arguments, **online(server))
    assert code == 0 and "W&B could not start online" in output, output
    assert list((tmp_path / "wandb").glob("offline-run-*")), output
