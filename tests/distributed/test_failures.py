"""One rank's failure is raised on all ranks, before the next collective, and none hangs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sgan_dist import checkpoint, evaluate, train
from sgan_dist.config import Config
from sgan_dist.data.index import load_index
from sgan_dist.errors import NonFiniteLoss, UserError
from tests.conftest import small_config
from tests.ranks import REPOSITORY, environment, free_port, run_ranks

pytestmark = pytest.mark.process


def message_of_train(rank: int, configs: list[Config]) -> str:
    try:
        train(configs[rank])
    except UserError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def test_a_shard_damaged_on_one_rank_stops_all(digits: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(digits, damaged)
    shard = next((damaged / "unlabeled").glob("*.tar"))
    data = bytearray(shard.read_bytes())
    data[:1024] = b"\xff" * 1024
    shard.write_bytes(data)
    configs = [small_config(root, tmp_path / "run") for root in (digits, damaged)]
    first, second = run_ranks(2, message_of_train, configs)
    assert first == second and shard.name in first and first.startswith("UserError")


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_non_finite_loss_stops_before_its_update(
    world_size: int, digits: Path, tmp_path: Path
) -> None:
    bad = ("--optim.name=sgd", "--optim.lr=3", "--checkpoint.every=1", "--checkpoint.keep=99")
    config = small_config(digits, tmp_path, *bad)
    messages = run_ranks(world_size, message_of_train, [config] * world_size)
    assert len(set(messages)) == 1 and messages[0].startswith(NonFiniteLoss.__name__)
    step = int(messages[0].split("at step ")[1].split(",")[0])
    path, damaged_checkpoints = checkpoint.latest(tmp_path)
    assert path is not None and not damaged_checkpoints
    assert checkpoint.read_meta(path)["step"] == step
    state = checkpoint.read_state(path)
    for network in (state["generator"]["network"], state["discriminator"]["network"]):
        assert all(tensor.isfinite().all() for tensor in network.values())
    written = json.loads((tmp_path / f"nonfinite-step-{step:08d}.json").read_text())
    assert [len(ids["labeled"]) for ids in written["ranks"]] == [12 // world_size] * world_size


def test_what_rank_zero_cannot_write_stops_all(digits: Path, tmp_path: Path) -> None:
    (tmp_path / "samples").write_text("a file is in the way")
    config = small_config(digits, tmp_path, "--train.sample_every=2")
    messages = run_ranks(2, message_of_train, [config] * 2)
    assert len(set(messages)) == 1 and "samples" in messages[0]


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_forgotten_parameter_is_named(world_size: int, digits: Path, tmp_path: Path) -> None:
    own = "--model.discriminator=tests.own_models:WithUnusedParameter"
    config = small_config(digits, tmp_path, own, "--model.discriminator_args={}")
    messages = run_ranks(world_size, message_of_train, [config] * world_size)
    assert len(set(messages)) == 1 and "forgotten.weight" in messages[0]


def test_a_checkpoint_of_other_code_is_refused(digits: Path, tmp_path: Path) -> None:
    assert run_ranks(1, message_of_train, [small_config(digits, tmp_path)]) == ["no error"]
    path, _ = checkpoint.latest(tmp_path)
    assert path is not None
    state, meta = checkpoint.read_state(path), checkpoint.read_meta(path)
    del state["save_seconds"]
    checkpoint.save(tmp_path, meta["step"], state, meta, keep=2)
    longer = small_config(digits, tmp_path, "--train.steps=30")
    messages = run_ranks(2, message_of_train, [longer] * 2)
    assert len(set(messages)) == 1
    assert "UserError" in messages[0] and "'save_seconds'" in messages[0]


def errors_of(rank: int, root: str, run: Path) -> tuple[float, list[list[int]]]:
    metrics = evaluate(run, "test", root)
    return metrics.error, metrics.confusion


@pytest.mark.parametrize("dataset", ["digits", "windowed"])
def test_ranks_share_an_evaluation(
    dataset: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    root = request.getfixturevalue(dataset)
    shards = len(load_index(root).test.shards)
    assert shards == (1 if dataset == "digits" else 2)  # so that one of three ranks reads none
    assert run_ranks(1, message_of_train, [small_config(root, tmp_path)]) == ["no error"]
    (alone,) = run_ranks(1, errors_of, str(root), tmp_path)
    assert run_ranks(3, errors_of, str(root), tmp_path) == [alone] * 3
    assert sum(map(sum, alone[1])) == 1000


# The first function registered is the last one to be called.
LEAVE = """
import atexit, os, signal, sys
import torch.distributed as dist
from sgan_dist.cli import main
atexit.register(lambda: print("in a group at the end:", dist.is_initialized(), flush=True))
code = main(sys.argv[2:])
assert dist.is_initialized()
if os.environ["RANK"] == sys.argv[1]:
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(code)
"""


@pytest.mark.parametrize(
    ("killed", "option", "codes"),
    [
        ("none", "--seed=0", [0, 0]),
        ("none", "--machine.world_size=3", [2, 2]),
        ("1", "--seed=0", [0, -9]),
    ],
    ids=["done", "refused", "peer killed"],
)
def test_a_command_leaves_its_process_group(
    killed: str, option: str, codes: list[int], digits: Path, tmp_path: Path
) -> None:
    command = ("plan", f"--data.root={digits}", f"--run_dir={tmp_path}", option)
    port = str(free_port())
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", LEAVE, killed, *command],
            cwd=REPOSITORY,
            env=environment(
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE="2",
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=port,
                ACCELERATE_USE_CPU="true",
            ),
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=100)[0] for process in ranks]
    assert [process.returncode for process in ranks] == codes
    for code, output in zip(codes, outputs, strict=True):
        assert output.endswith("in a group at the end: False\n") == (code >= 0)
