"""DeepSpeed's configuration: what fills it, what is refused, and where it comes from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sgan_dist.config import parse
from sgan_dist.errors import UserError
from sgan_dist.parallel.deepspeed_config import fill_auto, from_environment, read
from sgan_dist.parallel.launcher import Precision
from tests.ranks import REPOSITORY, free_port, run

CONFIGS = REPOSITORY / "configs" / "deepspeed"
ACCELERATE = REPOSITORY / "configs" / "accelerate"


def filled(
    settings: dict[str, Any], parameters: int = 1, precision: Precision = "fp32"
) -> dict[str, Any]:
    """The settings filled for a batch of 36 on 3 ranks, in two micro-batches, clipped to 0.5."""
    batches = ("--batch.labeled=12", "--batch.unlabeled=24", "--batch.accumulation=2")
    config = parse([*batches, "--optim.clip_norm=0.5"])
    return fill_auto(settings, config, precision, world_size=3, parameters=parameters)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_the_ready_files_are_filled(path: Path) -> None:
    settings = read(path)
    result = filled(settings, parameters=1001)
    assert '"auto"' not in json.dumps(result)
    assert result["train_batch_size"] == 36
    assert result["train_micro_batch_size_per_gpu"] == 6
    assert result["gradient_accumulation_steps"] == 2
    assert result["gradient_clipping"] == 0.5
    assert result["zero_optimization"]["reduce_bucket_size"] == 1001
    assert result["zero_optimization"]["allgather_bucket_size"] == 1002
    assert result == filled(result, parameters=1001)
    assert settings == read(path)


def test_unequal_shares_count_as_the_largest() -> None:
    config = parse(["--batch.labeled=4", "--batch.unlabeled=11"])
    for world_size, per_rank in ((2, 8), (4, 4), (20, 1)):
        result = fill_auto({}, config, "fp32", world_size, parameters=1)
        assert result["train_micro_batch_size_per_gpu"] == per_rank
        assert result["train_batch_size"] == per_rank * world_size


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"zero_optimization": {"stage": 3}}, "stage 3 splits the parameters"),
        ({"optimizer": {"type": "Adam"}}, "optim.lr"),
        ({"scheduler": {}}, "optim.decay"),
        ({"fp16": {"enabled": True}}, "machine.precision=bf16"),
        ({"bf16": {"enabled": True}}, "keeps them in fp32"),
        ({"torch_autocast": {"enabled": True}}, "machine.precision makes it False"),
        ({"gradient_clipping": 1.0}, "optim.clip_norm makes it 0.5"),
        ({"train_batch_size": 64}, "makes it 36"),
        ({"gradient_accumulation_steps": 1}, "batch.accumulation makes it 2"),
        ({"zero_optimisation": {"stage": 2}}, "zero_optimisation"),
        ({"zero_optimization": {"stage": 2, "sub_group_size": "auto"}}, "sub_group_size"),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "offload_param"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}},
            "must be cpu or none",
        ),
    ],
    ids=lambda value: None if isinstance(value, str) else next(iter(value)),
)
def test_contradictions_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        filled(settings)


def test_fp64_is_refused() -> None:
    with pytest.raises(UserError, match="run without it"):
        filled({}, precision="fp64")


def test_accelerates_variables_stand_for_a_file(tmp_path: Path) -> None:
    on = {"ACCELERATE_USE_DEEPSPEED": "true"}
    assert from_environment({}) is None
    assert from_environment(on) == {"zero_optimization": {"stage": 2}}
    assert from_environment(
        on
        | {
            "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1",
            "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu",
            "ACCELERATE_GRADIENT_CLIPPING": "0.5",
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
        }
    ) == {
        "zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}},
        "gradient_clipping": 0.5,
    }
    auto = {
        "ACCELERATE_GRADIENT_CLIPPING": "auto",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "auto",
    }
    assert from_environment(on | auto) == {"zero_optimization": {"stage": 2}}
    file = on | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(CONFIGS / "zero1.json")}
    assert from_environment(file) == read(CONFIGS / "zero1.json")
    with pytest.raises(UserError, match="remove one"):
        from_environment(file | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"})
    with pytest.raises(UserError, match="cannot read"):
        from_environment(on | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(tmp_path / "absent.json")})


# a file for each process: the output of two may be mixed
SHOW = """
import os, pathlib
rank = pathlib.Path(__file__).with_name("rank" + os.environ["RANK"])
rank.write_text(os.environ["WORLD_SIZE"])
"""


@pytest.mark.parametrize("path", sorted(ACCELERATE.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerates_files_are_loaded(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    file = (config.deepspeed_config or {}).get("deepspeed_config_file")
    assert file is None or (REPOSITORY / file).is_file()


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize("name", ["cpu_two_ranks", "deepspeed_zero1", "deepspeed_zero2"])
def test_accelerates_files_start_two_ranks(name: str, tmp_path: Path) -> None:
    script = tmp_path / "show.py"
    script.write_text(SHOW)
    config, port = f"configs/accelerate/{name}.yaml", str(free_port())
    command = ("accelerate", "launch", "--config_file", config, "--main_process_port", port)
    code, output = run(*command, str(script))
    assert code == 0, output
    world_sizes = {path.name: path.read_text() for path in tmp_path.glob("rank*")}
    assert world_sizes == {"rank0": "2", "rank1": "2"}, output
