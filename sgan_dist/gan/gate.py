"""The gate: tries the networks of a config on two images a part before anything long begins.

It checks what networks do, not what they are named or made of. Each failure is one sentence with what
to use instead; an error inside a network's own code keeps its traceback.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import json
import logging
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from sgan_dist.config import Config
from sgan_dist.errors import UserError
from sgan_dist.gan.models import build_generator
from sgan_dist.gan.networks import DiscriminatorSpec
from sgan_dist.parallel.agreement import run_on_all
from sgan_dist.parallel.batchnorm import GlobalBatchNorm
from sgan_dist.parallel.engine import Backend
from sgan_dist.parallel.random import GlobalRandom

IMAGES = 2  # of each part
TOLERANCE = 1e-4  # relative and absolute, of outputs that should be equal

log = logging.getLogger(__name__)


def check_networks(
    config: Config, image_hwc: tuple[int, int, int], classes: int, backend: Backend
) -> None:
    """Builds and tries D and, where the config has one, G, on random images (H, W, C).

    All ranks call it.

    Raises:
        UserError: on every rank, if a network cannot be trained as it is.
    """
    spec = DiscriminatorSpec.of(config, image_hwc, classes)
    parts = list(config.batches) + ["fake"] * config.uses_generator
    torch.manual_seed(config.seed)
    run_on_all(lambda: _check_discriminator(spec, parts, config, backend))
    if config.uses_generator:
        run_on_all(lambda: _check_generator(spec, config, backend))


@dataclass(frozen=True)
class _Trial:
    """A network, and one way to call it."""

    network: nn.Module
    call: Callable[[Tensor], tuple[Tensor, ...]]
    """inputs (n, ...) -> all outputs, each (n, ...); the same random numbers in every call"""
    advice: str
    """on random numbers, for messages"""

    @property
    def name(self) -> str:
        return type(self.network).__name__

    def outputs(self, inputs: Tensor) -> tuple[Tensor, ...]:
        """Returns what `call` does, without gradient; the network's state stays as it is."""
        with _state_restored(self.network), torch.no_grad():
            return self.call(inputs)


def _check_discriminator(
    spec: DiscriminatorSpec, parts: list[str], config: Config, backend: Backend
) -> None:
    network = _prepared(spec.build(), backend)
    name, n, accumulation = type(network).__name__, IMAGES * len(parts), config.batch.accumulation
    if accumulation > 1 and any(isinstance(m, GlobalBatchNorm) for m in network.modules()):
        raise UserError(
            f"batch.accumulation is {accumulation}, and the discriminator has batch norm, whose"
            " statistics over a micro-batch are not those of the batch: use more processes instead, or"
            " a discriminator without batch norm"
        )
    _check_signature(network.forward, f"{name}.forward", "images", "rng")
    _check_signature(network.forward, f"{name}.forward", "images")

    def call(images: Tensor, train: bool = True) -> tuple[Tensor, ...]:
        rng = _random(config, "gate", parts, backend) if train else None
        with backend.autocast():
            output = network(images, rng) if train else network(images)
        _check_output(name, output, len(images), spec.outputs, config.loss.form)
        return output.logits, output.features

    images = torch.rand(n, *spec.image_chw, device=backend.device, dtype=backend.dtype) * 2 - 1
    trial = _Trial(
        network,
        call,
        "take them from the `rng` of forward, as sgan_dist.gan.models.base.dropout does",
    )
    _check_randomness(trial, images)
    _check_neighbors(trial, images)
    _check_gradients(trial, images)
    if _smallest_share(config, backend) == 0:
        rng = _random(config, "gate", parts, backend, images=0)
        _check_empty(network, lambda: network(images[:0], rng))
    network.eval()
    advice = "leave them out in evaluation, where `rng` is None"
    evaluation = _Trial(network, lambda x: call(x, train=False), advice)
    _check_randomness(evaluation, images)
    _check_neighbors(evaluation, images)


def _check_generator(spec: DiscriminatorSpec, config: Config, backend: Backend) -> None:
    assert config.model.generator is not None
    built = build_generator(config.model.generator, spec.image_chw, config.model.generator_args)
    network = _prepared(built, backend)
    name = type(network).__name__
    if not callable(getattr(network, "latent", None)):
        raise UserError(
            f"{name} has no method latent(rng), which returns latent vectors (n, Z): for normal ones,"
            " `return rng.normal(Z)`"
        )
    _check_signature(network.latent, f"{name}.latent", "rng")  # type: ignore[arg-type]
    _check_signature(network.forward, f"{name}.forward", "z")

    def latent(_: Tensor) -> tuple[Tensor, ...]:
        rng = _random(config, "gate/latent", ["fake"], backend)
        z = network.latent(rng)  # type: ignore[operator]
        if not isinstance(z, Tensor) or z.dim() < 2 or len(z) != IMAGES:
            raise UserError(
                f"{name}.latent returns {_describe(z)}, and must return a tensor (n, Z), with a row"
                f" for each of the n = {IMAGES} rows of `rng`"
            )
        return (z.to(backend.dtype),)

    def call(z: Tensor) -> tuple[Tensor, ...]:
        with backend.autocast():
            images = network(z)
        _check_images(name, images, (len(z), *spec.image_chw))
        return (images,)

    nothing = torch.empty(IMAGES, device=backend.device)
    _check_randomness(_Trial(network, latent, "take them from the `rng` of latent"), nothing)
    (z,) = latent(nothing)
    trial = _Trial(network, call, "draw them in latent(rng), and pass them on in z")
    _check_randomness(trial, z)
    _check_neighbors(trial, z)
    _check_gradients(trial, z)
    if _smallest_share(config, backend) == 0:
        _check_empty(network, lambda: network(z[:0]))


def _smallest_share(config: Config, backend: Backend) -> int:
    """How many images of a kind the rank with the fewest has."""
    batches = [*config.batches.values(), *[config.batch.fake] * config.uses_generator]
    return min(batches) // backend.world_size


def _check_empty(network: nn.Module, forward: Callable[[], object]) -> None:
    """Raises UserError unless the network takes 0 images, as a rank has of a small batch."""
    try:
        with _state_restored(network), torch.no_grad():
            forward()
    except (RuntimeError, ValueError, IndexError, ZeroDivisionError) as error:
        raise UserError(
            f"{type(network).__name__} fails on a batch of 0 images ({error}), which a rank has where a"
            " batch is smaller than the number of processes: start fewer processes, give larger"
            " batches, or let the network take 0 images"
        ) from error


def _prepared(network: nn.Module, backend: Backend) -> nn.Module:
    """Returns the network on the device, in the dtype in which it is trained."""
    name = type(network).__name__
    if any(is_lazy(tensor) for tensor in (*network.parameters(), *network.buffers())):
        raise UserError(
            f"{name} has lazy layers, whose parameters have no shape before the first images: give"
            " their sizes, as nn.Linear and nn.Conv2d take them"
        )
    try:
        copy.deepcopy(network)
    except (RuntimeError, TypeError) as error:
        raise UserError(
            f"{name} cannot be copied, as the averaged D is ({error}): use"
            " torch.nn.utils.parametrizations.weight_norm in place of torch.nn.utils.weight_norm, and"
            " keep no result of a computation, lock or open file in the network"
        ) from error
    for module in network.modules():
        own, base = type(module), nn.Module
        gets = own.get_extra_state is not base.get_extra_state
        if gets and own.set_extra_state is base.set_extra_state:
            raise UserError(
                f"{own.__name__} has get_extra_state but no set_extra_state, so that a run could not be"
                " resumed: write both"
            )
    for key, value in network.state_dict().items():
        if not isinstance(value, Tensor) and _as_json(value) != value:
            raise UserError(
                f"{name}: get_extra_state gives {_describe(value)} as {key}, which a checkpoint cannot"
                " hold without pickle: return a tensor, or lists and dicts of text and numbers"
            )
    half = {p.dtype for p in network.parameters()} & {torch.float16, torch.bfloat16}
    if half:
        log.warning(
            f"{name} has parameters of {half.pop()}: they are trained in {backend.dtype}; for bf16 in"
            " the networks' arithmetic set machine.precision to bf16"
        )
    return network.to(backend.device, backend.dtype)


def _check_signature(function: Callable[..., Any], name: str, *arguments: str) -> None:
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError as error:
        raise UserError(
            f"{name} must take ({', '.join(arguments)}), and does not ({error}): see"
            " sgan_dist.gan.models.base"
        ) from None


def _check_output(name: str, output: Any, n: int, outputs: int, form: str) -> None:
    """Raises UserError unless D returns logits (n, outputs) and features (n, F)."""
    logits, features = getattr(output, "logits", None), getattr(output, "features", None)
    if not isinstance(logits, Tensor) or not isinstance(features, Tensor):
        raise UserError(
            f"{name} returns {_describe(output)}, and must return"
            " sgan_dist.gan.models.base.DiscriminatorOutput(logits, features), two tensors"
        )
    if logits.shape != (n, outputs):
        extra = ", the last one for fake, as loss.form is explicit" if form == "explicit" else ""
        raise UserError(
            f"{name} returns logits {tuple(logits.shape)} for {n} images, and must return"
            f" {(n, outputs)}: `outputs` of them an image, one for each class{extra}"
        )
    if features.dim() != 2 or len(features) != n:
        raise UserError(
            f"{name} returns features {tuple(features.shape)} for {n} images, and must return"
            f" ({n}, F): average or flatten the other axes"
        )


def _check_images(name: str, images: Any, shape: tuple[int, ...]) -> None:
    if not isinstance(images, Tensor) or images.shape != shape:
        raise UserError(
            f"{name} returns {_describe(images)} for {shape[0]} latent vectors, and must return images"
            f" {shape}, as image_chw says"
        )
    if not bool((images.detach().abs() <= 1 + TOLERANCE).all()):
        raise UserError(
            f"{name} returns values that are not in [-1, 1], the range of real images: end it with tanh"
        )


def _check_randomness(trial: _Trial, inputs: Tensor) -> None:
    """Raises UserError if torch's, numpy's or Python's generator moves, or two outputs differ."""
    before = _generator_states(inputs.device)
    first = trial.outputs(inputs)
    after = _generator_states(inputs.device)
    moved = [name for name, value in after.items() if value != before[name]]
    if moved:
        raise UserError(
            f"{trial.name} draws random numbers from {moved[0]}, as nn.Dropout and stochastic depth do,"
            " so that a resumed run or another number of processes would train another network:"
            f" {trial.advice}"
        )
    if not all(map(_close, first, trial.outputs(inputs))):
        raise UserError(
            f"{trial.name} gives two outputs for the same inputs and random numbers: keep no state in"
            f" it but parameters and buffers; if it draws random numbers, {trial.advice}"
        )


def _check_neighbors(trial: _Trial, inputs: Tensor) -> None:
    """Raises UserError if the outputs for one half of the inputs change when the other half does.

    `GlobalBatchNorm` mixes samples exactly at any number of processes: it is in eval mode here.
    """
    half, noise = len(inputs) // 2, torch.Generator(inputs.device).manual_seed(0)
    changed = inputs.flip(-1) * 0.5
    first, second = (
        torch.cat([inputs[:half], changed[half:]]),
        torch.cat([changed[:half], inputs[half:]]),
    )
    with _state_restored(trial.network), _fixed_batch_norm(trial.network):
        with torch.no_grad():
            # layers that start at zero would hide what lies before them
            for p in trial.network.parameters():
                step = torch.randn(p.shape, generator=noise, device=p.device, dtype=p.dtype)
                p.add_(step, alpha=0.1)
        expected, kept_first, kept_second = map(trial.outputs, (inputs, first, second))
    for whole, a, b in zip(expected, kept_first, kept_second, strict=True):
        if not (_close(whole[:half], a[:half]) and _close(whole[half:], b[half:])):
            raise UserError(
                f"{trial.name}: the output for an image depends on the other images of the batch, as"
                " with nn.BatchNorm2d, so that another number of processes would train another"
                " network: use sgan_dist.parallel.batchnorm.GlobalBatchNorm, weight norm or"
                " nn.GroupNorm"
            )


def _check_gradients(trial: _Trial, inputs: Tensor) -> None:
    """Raises UserError unless the first output, logits or images, has a gradient everywhere."""
    inputs = inputs.detach().requires_grad_()
    named = {name: p for name, p in trial.network.named_parameters() if p.requires_grad}
    gradients: list[Tensor | None] = [None] * (len(named) + 1)
    with _state_restored(trial.network):
        output = trial.call(inputs)[0]
        if output.requires_grad:
            targets = [*named.values(), inputs]
            gradients = list(torch.autograd.grad(output.sum(), targets, allow_unused=True))
    unused = [name for name, gradient in zip(named, gradients, strict=False) if gradient is None]
    if unused:
        raise UserError(
            f"{trial.name} does not use its parameters {', '.join(unused)}: remove them, or freeze"
            " them with requires_grad_(False)"
        )
    if gradients[-1] is None:
        raise UserError(
            f"{trial.name} passes no gradient to its inputs, through which the generator learns:"
            " compute its output without detach() and torch.no_grad()"
        )


@contextlib.contextmanager
def _state_restored(network: nn.Module) -> Iterator[None]:
    """Undoes what the block does to the state: averages and spectral norm move with each call."""
    state = copy.deepcopy(network.state_dict())
    try:
        yield
    finally:
        network.load_state_dict(state)


@contextlib.contextmanager
def _fixed_batch_norm(network: nn.Module) -> Iterator[None]:
    layers = [m for m in network.modules() if isinstance(m, GlobalBatchNorm) and m.training]
    for layer in layers:
        layer.eval()
    try:
        yield
    finally:
        for layer in layers:
            layer.train()


def _random(
    config: Config, purpose: str, parts: list[str], backend: Backend, images: int = IMAGES
) -> GlobalRandom:
    rows = {part: range(images) for part in parts}
    return GlobalRandom(config.seed, purpose, 0, rows, backend.device)


def _generator_states(device: torch.device) -> dict[str, Any]:
    states = {
        "torch's own generator": torch.get_rng_state().tolist(),
        "numpy's own generator": _numpy_state(),
        "Python's own generator": random.getstate(),
    }
    if device.type == "cuda":
        states["torch's own generator on the GPU"] = torch.cuda.get_rng_state(device).tolist()
    return states


def _numpy_state() -> Any:
    state: dict[str, Any] = np.random.get_state(legacy=False)
    return state["state"]["key"].tolist(), state["state"]["pos"]


def _close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a.float(), b.float(), TOLERANCE, TOLERANCE, equal_nan=True)


def _as_json(value: Any) -> Any:
    """Returns `value` as it comes back from JSON; None where that cannot hold it."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError):
        return None


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)}"
    return f"a {type(value).__name__}"
