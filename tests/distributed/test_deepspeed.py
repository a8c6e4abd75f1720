"""DeepSpeed engines against DDP and one process, on gloo ranks: numbers, checkpoints, errors."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.conftest import small_config
from tests.distributed.engines import (
    State,
    Training,
    distance,
    flat,
    forms_of,
    relative_shift,
    train,
    train_all,
)
from tests.distributed.runs import TERMS, largest_difference, parameters, train_rank
from tests.ranks import run_ranks

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None,
        reason="the deepspeed extra is not installed",
    ),
]
slow = pytest.mark.slow

SGD = ("--optim.name=sgd", "--optim.lr=0.02", "--optim.generator_lr=0.02")
CLIP = ("--optim.clip_norm=0.3",)
TRAININGS = (
    Training(options=CLIP),
    Training(options=(*SGD, *CLIP), matching=False, parts=2),
    Training(options=SGD, end=10),
)


@pytest.fixture(scope="module")
def alone() -> list[State]:
    """The trainings on one process, without DeepSpeed."""
    return train_all(1, *TRAININGS)[0]


@pytest.fixture(scope="module")
def ddp() -> list[State]:
    """The trainings on two ranks under DDP."""
    return train_all(2, *TRAININGS)[0]


@pytest.mark.parametrize(
    "zero",
    [
        "zero1",
        "zero2",
        pytest.param("zero0", marks=slow),
        pytest.param("zero2_offload", marks=slow),
    ],
)
def test_engines_train_as_ddp_does(zero: str, alone: list[State], ddp: list[State]) -> None:
    # A gradient with respect to the logits, before the backward, must change nothing.
    trainings = [
        replace(training, zero=zero, diagnose=i != 1) for i, training in enumerate(TRAININGS)
    ]
    for results in train_all(2, *trainings):
        for result, expected, one in zip(results, ddp, alone, strict=True):
            assert distance(result, expected) < 1e-6
            assert result["norms"] == pytest.approx(expected["norms"], rel=1e-5)
            assert result["polluted"] == 0
            assert relative_shift(result, one) < 1e-4
        assert distance(results[2], ddp[2]) == 0  # two ranks, no clipping: the same sums


@slow
@pytest.mark.parametrize("zero", ["zero0", "zero1", "zero2"])
def test_engines_train_as_one_process_on_three_ranks(zero: str, alone: list[State]) -> None:
    results = train_all(3, *[replace(training, zero=zero) for training in TRAININGS])[0]
    for result, one in zip(results, alone, strict=True):
        assert relative_shift(result, one) < 1e-4


@slow
def test_any_layout_of_the_flat_buffer_is_read_back(ddp: list[State]) -> None:
    (result,) = train_all(2, replace(TRAININGS[2], zero="zero2", round_robin=True))[0]
    assert distance(result, ddp[2]) < 1e-6


@slow
def test_a_checkpoint_continues_on_any_engine(ddp: list[State]) -> None:
    whole, half = TRAININGS[0], replace(TRAININGS[0], zero="zero2", end=10)
    (straight, halfway) = train_all(2, replace(whole, zero="zero2"), half)[0]
    state = {name: halfway[name] for name in ("discriminator", "generator")}
    assert forms_of(straight) == forms_of(ddp[0])  # names, types, shapes and options: DDP's
    rest = replace(whole, begin=10)
    same, one, none = train_all(
        2,
        replace(rest, zero="zero2"),
        replace(rest, zero="zero1"),
        rest,
        state=state,
    )[0]
    assert distance(same, straight) == 0
    assert distance(one, straight) == 0
    assert distance(none, straight) < 1e-6
    (back,) = train_all(1, replace(rest, zero="zero2"), state=state)[0]
    assert distance(back, straight) < 1e-5
    steps = {float(v["step"]) for v in back["discriminator"]["optimizer"]["state"].values()}
    assert steps == {20.0}  # DeepSpeed takes no step of its own


@slow
def test_a_ddp_checkpoint_continues_under_zero(ddp: list[State]) -> None:
    for index in (0, 1):
        (halfway,) = train_all(2, replace(TRAININGS[index], end=10))[0]
        state = {name: halfway[name] for name in ("discriminator", "generator")}
        rest = replace(TRAININGS[index], begin=10)
        trainings = [replace(rest, zero=zero) for zero in ("zero0", "zero1", "zero2_offload")]
        for world_size in (2, 3):
            for result in train_all(world_size, *trainings, state=state)[0]:
                assert distance(result, ddp[index]) < 1e-5


@slow
@pytest.mark.parametrize("zero", ["zero0", "zero2"])
def test_unequal_shares_train_as_under_ddp(zero: str, digits: Path, tmp_path: Path) -> None:
    batches = ("--batch.labeled=4", "--batch.unlabeled=11", "--batch.fake=5", "--train.steps=8")
    sgd = ("--optim.name=sgd", "--optim.lr=0.005", "--optim.generator_lr=0.005")
    for name, more in (("ddp", ()), (zero, (f"--machine.deepspeed=deepspeed/{zero}",))):
        config = small_config(digits, tmp_path / name, *batches, *sgd, *more)
        assert run_ranks(3, train_rank, config) == [8] * 3
    assert largest_difference(parameters(tmp_path / "ddp"), parameters(tmp_path / zero)) < 1e-5


def test_a_non_finite_gradient_is_reported_and_changes_nothing() -> None:
    trainings = [
        Training(zero=zero, end=6, poison=3) for zero in ("zero0", "zero1", "zero2_offload")
    ]
    for results in train_all(2, *trainings):
        for training, result in zip(trainings, results, strict=True):
            assert len(result["norms"]) == 7
            assert not torch.tensor(result["norms"][-1]).isfinite()
            if (
                training.zero != "zero0"
            ):  # there the norm is known before the step, which `train` takes
                assert flat(result, "network").isfinite().all()
                assert flat(result, "moments").isfinite().all()


@slow
def test_bf16_computes_in_bf16_and_keeps_fp32_as_ddp_does() -> None:
    # From one state: accelerate's wrapper computes data-dependent initial values in bf16 too.
    (halfway,) = train_all(2, Training(end=2))[0]
    state = {name: halfway[name] for name in ("discriminator", "generator")}
    full = Training(begin=2, end=5)
    trainings = replace(full, options=("--machine.precision=bf16",))
    (in_fp32,) = train_all(2, full, state=state)[0]
    (expected,) = train_all(2, trainings, state=state)[0]
    kinds = [replace(trainings, zero=zero) for zero in ("zero0", "zero1", "zero2")]
    for result in train_all(2, *kinds, state=state)[0]:
        assert distance(result, expected) < 1e-6 < distance(result, in_fp32)
        assert forms_of(result) == forms_of(in_fp32)


def test_the_cpu_operator_is_neither_built_nor_waited_for(tmp_path: Path) -> None:
    lock = tmp_path / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir()
    lock.touch()  # as a killed build leaves it
    run_ranks(2, _one_engine, str(tmp_path), timeout=60)
    assert list(tmp_path.rglob("*")) == [lock.parent, lock]


def _one_engine(rank: int, extensions: str) -> None:
    os.environ["TORCH_EXTENSIONS_DIR"] = extensions
    train(rank, Training(zero="zero2", end=1))


def test_every_term_trains_as_without_deepspeed(digits: Path, tmp_path: Path) -> None:
    options = ("--optim.name=sgd", *TERMS, "--batch.accumulation=2")
    for name, more in (("plain", ()), ("zero", ("--machine.deepspeed=deepspeed/zero2",))):
        config = small_config(digits, tmp_path / name, *options, *more, "--train.steps=2")
        assert run_ranks(2, train_rank, config) == [2, 2]
    assert largest_difference(parameters(tmp_path / "plain"), parameters(tmp_path / "zero")) < 1e-6
