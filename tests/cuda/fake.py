"""A training step on fake CUDA tensors: what a GPU would be asked to do, on a torch without CUDA.

The command line is LIBRARY CASES. LIBRARY is guard.cpp, compiled, which must be loaded before torch;
CASES is a JSON list of [recipe, world size, images of a part and rank]. Prints a JSON list of what was
observed. Fake tensors have no values: nothing is said of numbers and times.
"""

from __future__ import annotations

import contextlib
import json
import sys
import traceback
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sgan_dist.config import Config, load_config
from sgan_dist.data.loader import SemiSupervisedBatch
from sgan_dist.gan.networks import assemble, build, initialize
from sgan_dist.gan.steps import train_step
from sgan_dist.parallel import random
from sgan_dist.parallel.ddp import DDPEngine
from sgan_dist.parallel.engine import Backend, Phase, make_optimizer
from sgan_dist.parallel.random import share

IMAGE_HWC, HISTOGRAM = (28, 28, 1), (10,) * 10
CUDA = torch.device("cuda", 0)
STEPS = (1, 2, 50)  # none of them logs


class Unwrapped:
    """In place of an Accelerator: DDP cannot run on a fake process group."""

    def __init__(self, world_size: int) -> None:
        self.num_processes = world_size

    def prepare_model(self, network: nn.Module) -> nn.Module:
        return network

    def no_sync(self, network: nn.Module) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


class FakeBackend(Backend):
    """Rank 0 of `world_size` on a device."""

    def __init__(self, config: Config, device: torch.device, world_size: int) -> None:
        super().__init__(config)
        self.rank, self.world_size, self.device = 0, world_size, device

    def prepare(self, phase: Phase, lr: float, config: Any) -> DDPEngine:
        optimizer = make_optimizer(phase.network, lr, config)
        accelerator: Any = Unwrapped(self.world_size)
        return DDPEngine(phase, accelerator, optimizer, config.clip_norm)


class Observer(TorchDispatchMode):
    """Records each operation, and of those on CUDA tensors: syncs, copies, collectives, peak bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.trace: list[str] = []
        self.syncs: list[str] = []
        self.blocking_copies: list[str] = []
        self.collectives = 0
        self.peak = self._bytes = 0
        self._storages: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        kwargs = kwargs or {}
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        result = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        space, name = func._schema.name.split("::")
        shapes = [(tuple(t.shape), str(t.dtype), str(t.device)) for t in (*inputs, *outputs)]
        self.trace.append(f"{name} {shapes}")
        if "c10d" in space:
            self.collectives += 1
        elif name in ("_to_copy", "copy_"):
            source, target = (inputs[-1], inputs[0]) if name == "copy_" else (inputs[0], outputs[0])
            asynchronous = kwargs.get("non_blocking") or (name == "copy_" and args[2:] == (True,))
            if source.device.type != target.device.type and not asynchronous:
                self.blocking_copies.append(caller())
        for tensor in outputs:
            if tensor.device.type == "cuda":
                self._count(tensor)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._storages:
            self._storages[key] = storage.nbytes()
            self._bytes += storage.nbytes()
            self.peak = max(self.peak, self._bytes)
            weakref.finalize(storage, self._freed, key)

    def _freed(self, key: int) -> None:
        self._bytes -= self._storages.pop(key)


def caller() -> str:
    """The innermost line of the package that is being executed."""
    frames = [f for f in traceback.extract_stack() if "/sgan_dist/" in f.filename]
    return f"{Path(frames[-1].filename).name}:{frames[-1].name}" if frames else "?"


observers: list[Observer] = []


def note_sync(self: FakeTensor, *_: object) -> Any:
    """In place of what reads a value: it has none, and on a GPU the host would wait for it."""
    if self.device.type == "cuda":
        observers[-1].syncs.append(caller())
    return [1.0] * self.numel() if self.dim() else 1.0


def on_fake_cuda(module: nn.Module) -> nn.Module:
    """Replaces parameters and buffers by fake ones on CUDA."""
    for part in module.modules():
        for name, parameter in list(part._parameters.items()):
            if parameter is not None:
                value = torch.empty_strided(
                    parameter.shape, parameter.stride(), dtype=parameter.dtype, device=CUDA
                )
                part._parameters[name] = nn.Parameter(value, parameter.requires_grad)
        for name, buffer in list(part._buffers.items()):
            if buffer is not None:
                part._buffers[name] = torch.empty_like(buffer, device=CUDA)
    return module


def batch(config: Config, step: int, world_size: int) -> SemiSupervisedBatch:
    """This rank's share, on the CPU."""
    rows = {name: share(total, 0, world_size) for name, total in config.batches.items()}
    labeled, unlabeled = len(rows["labeled"]), len(rows.get("unlabeled", ()))
    images = [torch.empty(n, *IMAGE_HWC, dtype=torch.uint8) for n in (labeled, unlabeled)]
    labels = torch.zeros(labeled, dtype=torch.int64)
    return SemiSupervisedBatch(
        step, rows, images[0], labels, images[1], labels, images[1][:, 0, 0, 0]
    )


@contextlib.contextmanager
def process_group(world_size: int) -> Iterator[None]:
    if world_size > 1:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    yield
    if world_size > 1:
        dist.destroy_process_group()


def observe(work: Callable[[], object]) -> Observer:
    observer = Observer()
    observers.append(observer)
    with observer:
        work()
    return observer


def run(name: str, world_size: int, images: int) -> dict[str, Any]:
    """First values, and some steps of a recipe."""
    total = world_size * images
    sizes = [f"--batch.{part}={total}" for part in ("labeled", "unlabeled", "fake")]
    config = load_config(name, *sizes)
    real = build(config, IMAGE_HWC, HISTOGRAM, FakeBackend(config, torch.device("cpu"), 1))
    backend = FakeBackend(config, CUDA, world_size)
    with FakeTensorMode(allow_non_fake_inputs=True), process_group(world_size):
        networks = {name: on_fake_cuda(network) for name, network in real.networks().items()}
        sgan = assemble(
            networks["discriminator"],
            networks.get("generator"),
            networks["average"],
            HISTOGRAM,
            config,
            backend,
        )

        def start() -> None:
            initialize(sgan, batch(config, 0, world_size), config, backend)

        def step(number: int) -> None:
            data = batch(config, number, world_size)
            train_step(sgan, data, config, backend, {"stop": False, "damage": True})

        first = observe(start)
        step(0)  # makes the optimizers' moments
        steps = [observe(partial(step, number)) for number in STEPS]
        tensors = [t for network in sgan.networks().values() for t in network.state_dict().values()]
    return {
        "devices": sorted({str(t.device) for t in tensors}),
        "equal_traces": all(observed.trace == steps[0].trace for observed in steps),
        "syncs": steps[0].syncs,
        "blocking_copies": steps[0].blocking_copies,
        "collectives": steps[0].collectives,
        "initialize_bytes": first.peak,
        "step_bytes": max(observed.peak for observed in steps),
    }


def main() -> None:
    FakeTensor.tolist = FakeTensor.item = FakeTensor.__float__ = note_sync  # type: ignore[method-assign, assignment]
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    torch.cuda.is_bf16_supported = lambda including_emulation=True: True
    random.normal_quantiles()  # with values
    print(json.dumps([run(*case) for case in json.loads(sys.argv[2])]))
