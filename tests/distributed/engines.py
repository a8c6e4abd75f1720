"""Short trainings of D and G by the calls that `sgan_dist.gan.steps` makes, on any engine."""

from __future__ import annotations

import copy
import io
import warnings
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

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


class Loss(NamedTuple):
    loss: Tensor


class DiscriminatorLoss(nn.Module):
    """D and its losses, as an engine takes them."""

    def __init__(self, network: nn.Module, training: Training, backend: Backend) -> None:
        super().__init__()
        self.network = network
        self._diagnose, self._backend = training.diagnose, backend

    def forward(self, images: dict[str, Tensor], labels: Tensor, factor: float) -> Loss:
        with self._backend.autocast():
            out = self.network(torch.cat(list(images.values())))
        labeled, unlabeled, generated = out.logits.split([len(x) for x in images.values()])
        loss = losses.supervised(labeled, labels, LABELED)
        loss = loss + losses.real(losses.log_odds_real(unlabeled, "implied"), UNLABELED)
        loss = loss + losses.fake(losses.log_odds_real(generated, "implied"), FAKE)
        if self._diagnose:
            (gradient,) = torch.autograd.grad(loss, out.logits, retain_graph=True)
            assert gradient.shape == out.logits.shape
        return Loss(loss * factor)


class GeneratorLoss(nn.Module):
    """G, the frozen D, and G's loss, as an engine takes them."""

    def __init__(
        self, network: nn.Module, d: nn.Module, training: Training, backend: Backend
    ) -> None:
        super().__init__()
        self.network, self._d = network, (d,)
        self._matching, self._backend = training.matching, backend

    def forward(self, z: Tensor, unlabeled: Tensor) -> Loss:
        (d,), backend = self._d, self._backend
        with backend.autocast():
            fake = self.network(z)
        leaf = fake.detach().float().requires_grad_()
        with frozen(d), backend.autocast():
            out = d(leaf)
        if self._matching:
            with torch.no_grad(), frozen(d), backend.autocast():
                real = d(unlabeled)
            real_mean = losses.feature_means(([real.features], UNLABELED))[0]
            mean = losses.feature_means(([out.features], FAKE))[0]
            shares = backend.world_size
            loss = losses.feature_matching(real_mean, out.features, mean, FAKE, shares)
        else:
            loss = losses.non_saturating(losses.log_odds_real(out.logits, "implied"), FAKE)
        (gradient,) = torch.autograd.grad(loss, leaf)
        return Loss((fake * gradient).sum())


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
    network = build_discriminator("dcgan", SHAPE, 10, width)
    phase = DiscriminatorLoss(network, training, backend)
    d = backend.prepare(phase, config.optim.lr, config.optim)
    generator = build_generator("dcgan", SHAPE, width | {"latent_size": LATENT})
    generator_phase = GeneratorLoss(generator, network, training, backend)
    g = backend.prepare(generator_phase, config.optim.generator_lr, config.optim)
    blank = [copy.deepcopy(n.state_dict()) for n in (network, generator)]
    images = dict.fromkeys(("labeled", "unlabeled", "fake"), torch.zeros(2, *SHAPE))
    d.warm_up(images, torch.zeros(2, dtype=torch.int64), 1.0)
    g.warm_up(torch.zeros(2, LATENT), torch.zeros(2, *SHAPE))
    network.load_state_dict(blank[0])
    generator.load_state_dict(blank[1])
    if state is not None:
        d.load(state["discriminator"])
        g.load(state["generator"])
    else:
        examples = torch.randn(32, *SHAPE, generator=torch.Generator().manual_seed(99))
        data_dependent_init(d.network.eval(), examples)
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
                fake = fakes.chunk(training.parts)[part]
                images = {"labeled": b["labeled"], "unlabeled": b["unlabeled"], "fake": fake}
                poisoned = step == training.poison and rank == world - 1
                factor = float("nan") if poisoned else 1.0
                d.backward(d.forward(images, b["labels"], factor).loss)
        norms.append(_update(d, config.optim.lr * (1 - step / 40)))
        if not torch.isfinite(norms[-1]):
            break

        before = _snapshot(d) if step == training.end - 1 else None
        with g.accumulate(sync=True):
            g.backward(g.forward(whole["z"], whole["unlabeled"]).loss)
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
