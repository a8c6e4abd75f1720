"""Short trainings of D and G by the calls that `sgan_dist.gan.steps` makes, on any engine."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sgan_dist.config import Config, parse
from sgan_dist.gan import losses
from sgan_dist.gan.models import build_discriminator, build_generator
from sgan_dist.gan.models.base import data_dependent_init
from sgan_dist.parallel.ddp import AccelerateBackend
from sgan_dist.parallel.deepspeed_config import read
from sgan_dist.parallel.engine import Backend, Engine, frozen
from tests.ranks import REPOSITORY, run_ranks

CONFIGS = REPOSITORY / "configs" / "deepspeed"
LABELED, UNLABELED, FAKE, LATENT, SHAPE = 12, 24, 12, 8, (1, 12, 12)
State = dict[str, Any]


@dataclass(frozen=True)
class Training:
    """What to train, and on which engine."""

    zero: str | None = None
    """a file of configs/deepspeed; None: DDP"""
    options: tuple[str, ...] = ()
    """of the config"""
    matching: bool = True
    """feature matching, else the non-saturating loss"""
    parts: int = 1
    begin: int = 0
    end: int = 20
    round_robin: bool = False
    diagnose: bool = False
    """take a gradient with respect to D's logits before the backward, as D's step does"""
    poison: int | None = None
    """the step at which the last rank's loss is NaN"""


def train_all(
    world_size: int, *trainings: Training, state: State | None = None
) -> list[list[State]]:
    """Each rank's results of all trainings, which continue from `state`; the ranks start once."""
    results = run_ranks(world_size, _train_all, trainings, _packed(state), timeout=240)
    return [_unpacked(data) for data in results]


def _train_all(rank: int, trainings: tuple[Training, ...], state: bytes) -> bytes:
    return _packed([train(rank, training, _unpacked(state)) for training in trainings])


def _packed(value: Any) -> bytes:
    """For a pipe: tensors as such would not outlive the process that made them."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _unpacked(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=True)


def config_of(training: Training) -> Config:
    options = (f"--batch.accumulation={training.parts}", *training.options)
    sizes = (f"--batch.labeled={LABELED}", f"--batch.unlabeled={UNLABELED}")
    return parse([*sizes, f"--batch.fake={FAKE}", *options])


def make_backend(training: Training) -> Backend:
    config = config_of(training)
    if training.zero is None:
        return AccelerateBackend(config)
    from sgan_dist.parallel.deepspeed import DeepSpeedBackend

    zero = read(CONFIGS / f"{training.zero}.json")
    if training.round_robin:
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


def train(rank: int, training: Training, state: State | None = None) -> State:
    """The networks' state after a training, and what it showed on the way."""
    warnings.simplefilter("ignore")
    config, backend = config_of(training), make_backend(training)
    world = backend.world_size
    torch.manual_seed(0)
    width = {"width": 4}
    d = backend.prepare(
        build_discriminator("dcgan", SHAPE, 10, width), config.optim.lr, config.optim
    )
    network = build_generator("dcgan", SHAPE, width | {"latent_size": LATENT})
    g = backend.prepare(network, config.optim.generator_lr, config.optim)
    with backend.autocast():
        d.warm_up(torch.zeros(2, *SHAPE))
        g.warm_up(torch.zeros(2, LATENT))
    if state is not None:
        d.load(state["discriminator"])
        g.load(state["generator"])
    else:
        images = torch.randn(32, *SHAPE, generator=torch.Generator().manual_seed(99))
        data_dependent_init(d.network.eval(), images)
        d.network.train()
    first = {k: v.clone() for k, v in d.network.state_dict().items()}
    norms, polluted = [], 0.0
    for step in range(training.begin, training.end):
        whole = batch(step, rank, world, 0, 1)
        with torch.no_grad(), backend.autocast():
            fakes = g.network(whole["z"]).float()  # whole: its batch norm mixes them
        for part in range(training.parts):
            b = batch(step, rank, world, part, training.parts)
            with d.accumulate(sync=part == training.parts - 1):
                with backend.autocast():
                    fake = fakes.chunk(training.parts)[part]
                    out = d.forward(torch.cat([b["labeled"], b["unlabeled"], fake]))
                sizes = [len(b["labeled"]), len(b["unlabeled"]), len(fake)]
                labeled, unlabeled, generated = out.logits.split(sizes)
                loss = losses.supervised(labeled, b["labels"], LABELED)
                loss = loss + losses.real(losses.log_odds_real(unlabeled, "implied"), UNLABELED)
                loss = loss + losses.fake(losses.log_odds_real(generated, "implied"), FAKE)
                if training.diagnose:
                    (gradient,) = torch.autograd.grad(loss, out.logits, retain_graph=True)
                    assert gradient.shape == out.logits.shape
                if step == training.poison and rank == world - 1:
                    loss = loss * float("nan")
                d.backward(loss)
        norms.append(_update(d, config.optim.lr * (1 - step / 40)))
        if not torch.isfinite(norms[-1]):
            break

        before = _snapshot(d) if step == training.end - 1 else None
        with g.accumulate(sync=True):
            with backend.autocast():
                fake = g.forward(whole["z"])
            leaf = fake.detach().float().requires_grad_()
            with frozen(d.network), backend.autocast():
                out = d.network(leaf)
            if training.matching:
                with torch.no_grad(), frozen(d.network), backend.autocast():
                    real = d.network(whole["unlabeled"])
                real_mean = losses.feature_means(([real.features], UNLABELED))[0]
                mean = losses.feature_means(([out.features], FAKE))[0]
                loss = losses.feature_matching(real_mean, out.features, mean, FAKE, world)
            else:
                odds = losses.log_odds_real(out.logits, "implied")
                loss = losses.non_saturating(odds, FAKE)
            torch.autograd.backward(loss)
            assert leaf.grad is not None
            g.backward((fake * leaf.grad).sum())
        norms.append(_update(g, config.optim.generator_lr * (1 - step / 40)))
        if before is not None:
            polluted = max(difference(a, b) for a, b in zip(before, _snapshot(d), strict=True))
    return {
        "discriminator": d.state(),
        "generator": g.state(),
        "norms": torch.stack(norms).tolist(),
        "polluted": polluted,
        "first": first,
    }


def _update(engine: Engine, lr: float) -> Tensor:
    before, after = engine.clip_gradients(), engine.step(lr, torch.zeros(()))
    assert (before is None) != (after is None)
    norm = before if before is not None else after
    assert norm is not None
    return norm.float().cpu()


def _snapshot(engine: Engine) -> list[Tensor]:
    """An engine's parameters, moments and gradients."""
    state = engine.state()
    gradients = [p.grad for p in engine.network.parameters() if p.grad is not None]
    tensors = [*state["network"].values(), *moments(state), *gradients]
    return [tensor.detach().clone() for tensor in tensors]


def moments(state: State) -> list[Tensor]:
    return [v for values in state["optimizer"]["state"].values() for v in values.values()]


def difference(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / (b.double().norm() + 1e-30))


def flat(state: State, what: str) -> Tensor:
    """Both networks' parameters, or their optimizers' moments, as one vector."""
    tensors: list[Tensor] = []
    for name in ("discriminator", "generator"):
        tensors += state[name]["network"].values() if what == "network" else moments(state[name])
    return torch.cat([tensor.double().reshape(-1) for tensor in tensors])


def distance(a: State, b: State) -> float:
    """Largest relative difference of parameters and of moments."""
    assert forms_of(a) == forms_of(b)
    return max(difference(flat(a, what), flat(b, what)) for what in ("network", "moments"))


def forms_of(state: State) -> list[Any]:
    """Names, types, shapes and options of everything in a checkpoint."""
    forms: list[Any] = []
    for name in ("discriminator", "generator"):
        network, optimizer = state[name]["network"], state[name]["optimizer"]
        forms.append({k: (v.dtype, v.shape) for k, v in network.items()})
        for i, values in optimizer["state"].items():
            forms.append((i, {k: (v.dtype, v.shape) for k, v in values.items()}))
        # as text: a list and a tuple are the same here
        forms += [{k: str(v) for k, v in group.items()} for group in optimizer["param_groups"]]
    return forms


def relative_shift(result: State, expected: State) -> float:
    """The difference of D's parameters, relative to their change in training."""
    first, last = expected["first"], expected["discriminator"]["network"]
    network = result["discriminator"]["network"]
    error = torch.cat([(network[name] - last[name]).reshape(-1) for name in first])
    change = torch.cat([(last[name] - first[name]).reshape(-1) for name in first])
    return float(error.norm() / change.norm())
