"""DeepSpeed engines against plain training, on real gloo ranks: numbers, checkpoints, refusals."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sgan_dist import losses
from sgan_dist.backend import AccelerateBackend
from sgan_dist.config import Config, check, parse
from sgan_dist.errors import UserError
from sgan_dist.models import build_discriminator, build_generator
from sgan_dist.models.base import data_dependent_init
from sgan_dist.players import frozen
from sgan_dist.trainer import fit
from sgan_dist.zero_config import Filling, fill, from_environment, read
from tests.conftest import small_config
from tests.distributed.test_world_size import TERMS, largest_difference, parameters
from tests.ranks import REPOSITORY, free_port, run, run_ranks

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="the deepspeed extra is not installed"
)

CONFIGS = REPOSITORY / "configs" / "deepspeed"
LABELED, UNLABELED, FAKE, LATENT, SHAPE = 12, 24, 12, 8, (1, 12, 12)


@dataclass(frozen=True)
class Play:
    """A short training of D and G by the calls that `sgan_dist.step` makes."""

    zero: str | None = None
    """a file of configs/deepspeed; None: the Accelerate form"""
    options: tuple[str, ...] = ()
    """of the config"""
    matching: bool = True
    """feature matching, else the non-saturating loss"""
    parts: int = 1
    begin: int = 0
    end: int = 20
    round_robin: bool = False
    diagnose: bool = False
    """take a gradient with respect to D's logits before the backward, as the step's alarms do"""
    poison: int | None = None
    """the step at which the last rank's loss is NaN"""


def config_of(play: Play) -> Config:
    options = (f"--train.accumulation={play.parts}", *play.options)
    sizes = (f"--data.labeled_batch={LABELED}", f"--data.unlabeled_batch={UNLABELED}")
    return check(parse([*sizes, f"--train.fake_batch={FAKE}", *options])[0])


def make_backend(play: Play) -> Any:
    config = config_of(play)
    if play.zero is None:
        return AccelerateBackend(config)
    from sgan_dist.zero import DeepSpeedBackend

    zero = read(CONFIGS / f"{play.zero}.json")
    if play.round_robin:
        zero["zero_optimization"] |= {"round_robin_gradients": True, "parameter_alignment": True}
    return DeepSpeedBackend(config, zero)


def batch(step: int, rank: int, world_size: int, part: int, parts: int) -> dict[str, Tensor]:
    """One part of this rank's rows of the global batch of a step."""
    g = torch.Generator().manual_seed(step)
    whole = {
        "labeled": torch.randn(LABELED, *SHAPE, generator=g),
        "labels": torch.randint(10, (LABELED,), generator=g),
        "unlabeled": torch.randn(UNLABELED, *SHAPE, generator=g),
        "z": torch.rand(FAKE, LATENT, generator=g),
    }
    return {k: v.chunk(world_size)[rank].chunk(parts)[part] for k, v in whole.items()}


def training(rank: int, play: Play, state: dict[str, Any] | None = None) -> dict[str, Any]:
    """The state after the play, and what was seen on the way."""
    warnings.simplefilter("ignore")
    config, backend = config_of(play), make_backend(play)
    world = backend.world_size
    torch.manual_seed(0)
    width = {"width": 4}
    d = backend.prepare(
        build_discriminator("dcgan", SHAPE, 10, width), config.optim.lr, config.optim
    )
    network = build_generator("dcgan", SHAPE, width | {"latent_size": LATENT})
    g = backend.prepare(network, config.optim.generator_lr, config.optim)
    with backend.autocast():
        d.settle(torch.zeros(2, *SHAPE))
        g.settle(torch.zeros(2, LATENT))
    if state is not None:
        d.load(state["discriminator"])
        g.load(state["generator"])
    else:
        images = torch.randn(32, *SHAPE, generator=torch.Generator().manual_seed(99))
        data_dependent_init(d.network.eval(), images)
        d.network.train()
    first = {k: v.clone() for k, v in d.network.state_dict().items()}
    norms, polluted = [], 0.0
    for step in range(play.begin, play.end):
        whole = batch(step, rank, world, 0, 1)
        with torch.no_grad(), backend.autocast():
            fakes = g.network(whole["z"]).float()  # whole: its batch norm mixes them
        for part in range(play.parts):
            b = batch(step, rank, world, part, play.parts)
            with d.part(part == play.parts - 1):
                with backend.autocast():
                    fake = fakes.chunk(play.parts)[part]
                    out = d.wrapped(torch.cat([b["labeled"], b["unlabeled"], fake]))
                sizes = [len(b["labeled"]), len(b["unlabeled"]), len(fake)]
                labeled, unlabeled, generated = out.logits.split(sizes)
                loss = losses.supervised(labeled, b["labels"], LABELED)
                loss = loss + losses.real(losses.log_odds_real(unlabeled, "implied"), UNLABELED)
                loss = loss + losses.fake(losses.log_odds_real(generated, "implied"), FAKE)
                if play.diagnose:
                    (found,) = torch.autograd.grad(loss, out.logits, retain_graph=True)
                    assert found.shape == out.logits.shape
                if step == play.poison and rank == world - 1:
                    loss = loss * float("nan")
                d.backward(loss)
        norms.append(update(d, config.optim.lr * (1 - step / 40)))
        if not torch.isfinite(norms[-1]):
            break

        before = snapshot(d) if step == play.end - 1 else None
        with g.part(True):
            with backend.autocast():
                fake = g.wrapped(whole["z"])
            leaf = fake.detach().float().requires_grad_()
            with frozen(d.network), backend.autocast():
                out = d.network(leaf)
            if play.matching:
                with torch.no_grad(), frozen(d.network), backend.autocast():
                    real = d.network(whole["unlabeled"])
                real_mean = losses.feature_mean([real.features], UNLABELED)
                mean = losses.feature_mean([out.features], FAKE)
                loss = losses.feature_matching(real_mean, out.features, mean, FAKE, world)
            else:
                odds = losses.log_odds_real(out.logits, "implied")
                loss = losses.non_saturating(odds, FAKE)
            torch.autograd.backward(loss)
            assert leaf.grad is not None
            g.backward((fake * leaf.grad).sum())
        norms.append(update(g, config.optim.generator_lr * (1 - step / 40)))
        if before is not None:
            polluted = max(difference(a, b) for a, b in zip(before, snapshot(d), strict=True))
    return {
        "discriminator": d.state(),
        "generator": g.state(),
        "norms": torch.stack(norms).tolist(),
        "polluted": polluted,
        "first": first,
        "said": backend.describe(),
    }


def update(player: Any, lr: float) -> Tensor:
    before, after = player.clipped(), player.step(lr)
    assert (before is None) != (after is None)
    norm = before if before is not None else after
    assert norm is not None
    return norm.float().cpu()


def snapshot(player: Any) -> list[Tensor]:
    """A player's parameters, moments and gradients."""
    state = player.state()
    gradients = [p.grad for p in player.network.parameters() if p.grad is not None]
    tensors = [*state["network"].values(), *moments(state), *gradients]
    return [tensor.detach().clone() for tensor in tensors]


def moments(state: dict[str, Any]) -> list[Tensor]:
    return [v for values in state["optimizer"]["state"].values() for v in values.values()]


def difference(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / (b.double().norm() + 1e-30))


def flat(state: dict[str, Any], what: str) -> Tensor:
    """Both networks' parameters, or their optimizers' moments, end to end."""
    found: list[Tensor] = []
    for name in ("discriminator", "generator"):
        found += state[name]["network"].values() if what == "network" else moments(state[name])
    return torch.cat([tensor.double().reshape(-1) for tensor in found])


def distance(a: dict[str, Any], b: dict[str, Any]) -> float:
    """Largest relative difference of parameters and of moments."""
    assert forms(a) == forms(b)
    return max(difference(flat(a, what), flat(b, what)) for what in ("network", "moments"))


def forms(state: dict[str, Any]) -> list[Any]:
    """Names, types, shapes and options of everything in a checkpoint."""
    found = []
    for name in ("discriminator", "generator"):
        network, optimizer = state[name]["network"], state[name]["optimizer"]
        found.append({k: (v.dtype, v.shape) for k, v in network.items()})
        for i, values in optimizer["state"].items():
            found.append((i, {k: (v.dtype, v.shape) for k, v in values.items()}))
        # Lists and tuples alike: JSON and torch.save keep either.
        found += [{k: str(v) for k, v in group.items()} for group in optimizer["param_groups"]]
    return found


def play_all(
    world_size: int, *given: Play, state: dict[str, Any] | None = None
) -> list[list[dict[str, Any]]]:
    """Each rank's results; one start of the ranks for all plays, which go on from `state`."""
    found = run_ranks(world_size, _played, given, packed(state), timeout=240)
    return [unpacked(data) for data in found]


def _played(rank: int, given: tuple[Play, ...], state: bytes) -> bytes:
    return packed([training(rank, play, unpacked(state)) for play in given])


def packed(value: Any) -> bytes:
    """For a pipe: tensors as such would not outlive the process that made them."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def unpacked(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=True)


SGD = ("--optim.name=sgd", "--optim.lr=0.02", "--optim.generator_lr=0.02")
CLIP = ("--optim.clip_norm=0.3",)
PLAYS = (
    Play(options=CLIP),
    Play(options=(*SGD, *CLIP), matching=False, parts=2),
    Play(options=SGD, end=10),
)
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def alone() -> list[dict[str, Any]]:
    """The plays on one process, without DeepSpeed."""
    return play_all(1, *PLAYS)[0]


@pytest.fixture(scope="module")
def ddp() -> list[dict[str, Any]]:
    """The plays on two ranks in the Accelerate form."""
    return play_all(2, *PLAYS)[0]


@pytest.mark.parametrize(
    "zero",
    [
        "zero1",
        "zero2",
        pytest.param("zero0", marks=slow),
        pytest.param("zero2_offload", marks=slow),
    ],
)
def test_engines_train_as_ddp_does(
    zero: str, alone: list[dict[str, Any]], ddp: list[dict[str, Any]]
) -> None:
    # A gradient with respect to the logits, before the backward, must change nothing.
    given = [replace(play, zero=zero, diagnose=i != 1) for i, play in enumerate(PLAYS)]
    for results in play_all(2, *given):
        for mine, theirs, one in zip(results, ddp, alone, strict=True):
            assert distance(mine, theirs) < 1e-6
            assert mine["norms"] == pytest.approx(theirs["norms"], rel=1e-5)
            assert mine["polluted"] == 0
            assert shift(mine, one) < 1e-4
        assert distance(results[2], ddp[2]) == 0  # two ranks, no clipping: the same sums


@slow
@pytest.mark.parametrize("zero", ["zero0", "zero1", "zero2"])
def test_engines_train_as_one_process_on_three_ranks(
    zero: str, alone: list[dict[str, Any]]
) -> None:
    results = play_all(3, *[replace(play, zero=zero) for play in PLAYS])[0]
    for mine, one in zip(results, alone, strict=True):
        assert shift(mine, one) < 1e-4


@slow
def test_any_layout_of_the_flat_buffer_is_read_back(ddp: list[dict[str, Any]]) -> None:
    (mine,) = play_all(2, replace(PLAYS[2], zero="zero2", round_robin=True))[0]
    assert distance(mine, ddp[2]) < 1e-6


def shift(mine: dict[str, Any], one: dict[str, Any]) -> float:
    """Difference of D's parameters, relative to the way they came."""
    names = list(one["first"])
    network, other = mine["discriminator"]["network"], one["discriminator"]["network"]
    apart = torch.cat([(network[n] - other[n]).reshape(-1) for n in names])
    way = torch.cat([(other[n] - one["first"][n]).reshape(-1) for n in names])
    return float(apart.norm() / way.norm())


@slow
def test_a_checkpoint_goes_on_anywhere(ddp: list[dict[str, Any]]) -> None:
    whole, half = PLAYS[0], replace(PLAYS[0], zero="zero2", end=10)
    (straight, begun) = play_all(2, replace(whole, zero="zero2"), half)[0]
    state = {name: begun[name] for name in ("discriminator", "generator")}
    assert forms(straight) == forms(ddp[0])  # names, types, shapes and options: DDP's
    rest = replace(whole, begin=10)
    same, one, none = play_all(
        2,
        replace(rest, zero="zero2"),
        replace(rest, zero="zero1"),
        rest,
        state=state,
    )[0]
    assert distance(same, straight) == 0
    assert distance(one, straight) == 0
    assert distance(none, straight) < 1e-6
    (back,) = play_all(1, replace(rest, zero="zero2"), state=state)[0]
    assert distance(back, straight) < 1e-5
    steps = {float(v["step"]) for v in back["discriminator"]["optimizer"]["state"].values()}
    assert steps == {20.0}  # DeepSpeed takes no step of its own


@slow
def test_a_ddp_checkpoint_goes_on_under_zero(ddp: list[dict[str, Any]]) -> None:
    for index in (0, 1):
        (begun,) = play_all(2, replace(PLAYS[index], end=10))[0]
        state = {name: begun[name] for name in ("discriminator", "generator")}
        rest = replace(PLAYS[index], begin=10)
        given = [replace(rest, zero=zero) for zero in ("zero0", "zero1", "zero2_offload")]
        for world_size in (2, 3):
            for mine in play_all(world_size, *given, state=state)[0]:
                assert distance(mine, ddp[index]) < 1e-5


def test_a_non_finite_gradient_is_told_and_steps_nothing() -> None:
    given = [Play(zero=zero, end=6, poison=3) for zero in ("zero0", "zero1", "zero2_offload")]
    for results in play_all(2, *given):
        for zero0, mine in enumerate(results):
            assert len(mine["norms"]) == 7
            assert not torch.tensor(mine["norms"][-1]).isfinite()
            if zero0:  # without ZeRO `clipped` tells, before the step that was made here
                assert flat(mine, "network").isfinite().all()
                assert flat(mine, "moments").isfinite().all()


@slow
def test_bf16_computes_in_bf16_and_keeps_fp32_as_ddp_does() -> None:
    # From one state: accelerate's wrapper computes data-dependent first values in bf16 too.
    (begun,) = play_all(2, Play(end=2))[0]
    state = {name: begun[name] for name in ("discriminator", "generator")}
    full = Play(begin=2, end=5)
    given = replace(full, options=("--train.precision=bf16",))
    (in_fp32,) = play_all(2, full, state=state)[0]
    (expected,) = play_all(2, given, state=state)[0]
    kinds = [replace(given, zero=zero) for zero in ("zero0", "zero1", "zero2")]
    for mine in play_all(2, *kinds, state=state)[0]:
        assert distance(mine, expected) < 1e-6 < distance(mine, in_fp32)
        assert forms(mine) == forms(in_fp32)


def test_the_cpu_op_is_neither_built_nor_waited_for(tmp_path: Path) -> None:
    lock = tmp_path / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir()
    lock.touch()  # as a killed build leaves it
    run_ranks(2, _one_engine, str(tmp_path), timeout=60)
    assert list(tmp_path.rglob("*")) == [lock.parent, lock]


def _one_engine(rank: int, extensions: str) -> None:
    os.environ["TORCH_EXTENSIONS_DIR"] = extensions
    training(rank, Play(zero="zero2", end=1))


FILLING = Filling(batch=36, parts=2, world_size=3, precision="fp32", clip_norm=0.5)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_the_ready_files_are_filled(path: Path) -> None:
    config = read(path)
    filled = fill(config, FILLING, parameters=1001)
    assert '"auto"' not in json.dumps(filled)
    assert filled["train_batch_size"] == 36
    assert filled["train_micro_batch_size_per_gpu"] == 6
    assert filled["gradient_accumulation_steps"] == 2
    assert filled["gradient_clipping"] == 0.5
    assert filled["zero_optimization"]["reduce_bucket_size"] == 1001
    assert filled["zero_optimization"]["allgather_bucket_size"] == 1002
    assert filled == fill(filled, FILLING, parameters=1001)
    assert config == read(path)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"zero_optimization": {"stage": 3}}, "stage 3 splits the parameters"),
        ({"optimizer": {"type": "Adam"}}, "optim.lr"),
        ({"scheduler": {}}, "optim.decay"),
        ({"fp16": {"enabled": True}}, "train.precision=bf16"),
        ({"bf16": {"enabled": True}}, "keeps them in fp32"),
        ({"torch_autocast": {"enabled": True}}, "train.precision makes it False"),
        ({"gradient_clipping": 1.0}, "optim.clip_norm makes it 0.5"),
        ({"train_batch_size": 64}, "makes it 36"),
        ({"gradient_accumulation_steps": 1}, "train.accumulation makes it 2"),
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
def test_contradictions_are_refused(config: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        fill(config, FILLING, parameters=1)


def test_fp64_is_refused() -> None:
    with pytest.raises(UserError, match="run without it"):
        fill({}, replace(FILLING, precision="fp64"), parameters=1)


def fitted(rank: int, config: Config) -> int:
    warnings.simplefilter("ignore")
    return fit(config)


def test_every_term_trains_as_without_deepspeed(digits: Path, tmp_path: Path) -> None:
    options = ("--optim.name=sgd", *TERMS, "--train.accumulation=2")
    for name, more in (("plain", ()), ("zero", (f"--train.deepspeed={CONFIGS}/zero2.json",))):
        config = small_config(digits, tmp_path / name, *options, *more, "--train.steps=2")
        assert run_ranks(2, fitted, config) == [0, 0]
    assert largest_difference(parameters(tmp_path / "plain"), parameters(tmp_path / "zero")) < 1e-6


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
    file = on | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(CONFIGS / "zero1.json")}
    assert from_environment(file) == read(CONFIGS / "zero1.json")
    with pytest.raises(UserError, match="take out one"):
        from_environment(file | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"})
    with pytest.raises(UserError, match="can't read"):
        from_environment(on | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(tmp_path / "absent.json")})


ACCELERATE = REPOSITORY / "configs" / "accelerate"
# a file each: what two processes print at once may be mixed
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


@slow
@pytest.mark.parametrize("name", ["cpu_two_ranks", "deepspeed_zero1", "deepspeed_zero2"])
def test_accelerates_files_start_two_ranks(name: str, tmp_path: Path) -> None:
    script = tmp_path / "show.py"
    script.write_text(SHOW)
    config, port = f"configs/accelerate/{name}.yaml", str(free_port())
    command = ("accelerate", "launch", "--config_file", config, "--main_process_port", port)
    code, output = run(*command, str(script))
    assert code == 0, output
    said = {path.name: path.read_text() for path in tmp_path.glob("rank*")}
    assert said == {"rank0": "2", "rank1": "2"}, output
