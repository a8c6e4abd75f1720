"""The DeepSpeed backend: an engine each for D and G, ZeRO stages 0 to 2, on CPU and GPU.

Written against deepspeed 0.19.8. Parameters stay in fp32 and whole on every rank, so that the
averaged D and a frozen D can read them; checkpoints have the same form as DDP's.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import accelerate
import torch
import torch.distributed as dist
from torch import Tensor, nn

from sgan_dist.config import Config, OptimConfig
from sgan_dist.errors import UserError
from sgan_dist.parallel import launcher
from sgan_dist.parallel.collectives import gather, rank, world_size
from sgan_dist.parallel.deepspeed_config import fill_auto, lookup
from sgan_dist.parallel.engine import Backend, Engine, Phase, make_optimizer


class DeepSpeedEngine(Engine):
    """A phase in a DeepSpeed engine of its own.

    ZeRO keeps the optimizer's moments split over ranks: each rank holds its slice of one flat buffer
    of all trained parameters. A checkpoint holds them whole, parameter by parameter.
    """

    skips_on_device = False

    def __init__(self, phase: Phase, engine: Any, clip_norm: float | None) -> None:
        super().__init__(phase, engine.optimizer, clip_norm)
        self._engine = engine
        self._trained = {i: p for i, p in enumerate(self._parameters) if p.requires_grad}
        self._zero = bool(engine.zero_optimization())  # stage 1 or 2
        self._parameters_changed = True

    def forward(self, *inputs: Any) -> Any:
        """Returns the output of DeepSpeed's engine."""
        return self._engine(*inputs)

    @contextlib.contextmanager
    def accumulate(self, sync: bool) -> Iterator[None]:
        """Marks the last micro-batch of a step for DeepSpeed."""
        if self._parameters_changed and self._zero:
            # ZeRO updates a copy of the parameters that it took at construction; initial values or a
            # checkpoint may have been written into the network since.
            self._optimizer.refresh_fp32_params()
        self._parameters_changed = False
        self._engine.set_gradient_accumulation_boundary(sync)
        yield

    def backward(self, loss_share: Tensor) -> None:
        """Adds the gradient as it is: DeepSpeed is configured to sum over micro-batches and ranks."""
        # A view: at stage 0 the hooks of the engine's own output would divide by the accumulation,
        # before DeepSpeed's hook on the loss marks the backward as its own.
        self._engine.backward(loss_share.view_as(loss_share), scale_wrt_gas=False)

    def clip_gradients(self) -> Tensor | None:
        """Under ZeRO, does nothing and returns None: `step` clips, and returns the norm."""
        return None if self._zero else super().clip_gradients()

    def _step(self, skip: Tensor) -> Tensor | None:
        """Under ZeRO, returns the global norm before clipping; infinite if it was not finite."""
        self._engine.step()
        if not self._zero:
            return None
        norm = self._engine.get_global_grad_norm()
        return torch.as_tensor(norm, device=self._parameters[0].device)

    def load(self, state: dict[str, Any]) -> None:
        super().load(state)
        self._parameters_changed = True

    def _optimizer_state(self) -> dict[str, Any]:
        """Under ZeRO, gathers the moments of all ranks and cuts them into those of each parameter."""
        if not self._zero:
            return super()._optimizer_state()
        optimizer = self._optimizer.optimizer
        (local,) = optimizer.param_groups[0]["params"]
        state: dict[int, dict[str, Any]] = {i: {} for i in self._trained}
        for key, value in optimizer.state.get(local, {}).items():
            if isinstance(value, Tensor) and value.dim():
                whole = gather(value.to(self._parameters[0].device))
                for i, (start, parameter) in self._offsets().items():
                    moment = whole[start : start + parameter.numel()]
                    state[i][key] = moment.view_as(parameter).clone()
            else:  # the step count, one for all parameters
                for values in state.values():
                    values[key] = copy.deepcopy(value)
        all_parameters = {"params": list(range(len(self._parameters)))}
        return {
            "state": {i: values for i, values in state.items() if values},
            "param_groups": [
                group | all_parameters for group in optimizer.state_dict()["param_groups"]
            ],
        }

    def _load_optimizer(self, state: dict[str, Any]) -> None:
        """Under ZeRO, takes this rank's slice of the moments.

        Rates and betas stay the config's, which a resumed run must share.
        """
        if not self._zero:
            super()._load_optimizer(state)
            return
        optimizer, saved = self._optimizer.optimizer, state["state"]
        (local,) = optimizer.param_groups[0]["params"]
        optimizer.state.pop(local, None)
        for key, example in saved[min(saved)].items() if saved else ():
            if isinstance(example, Tensor) and example.dim():
                whole = torch.zeros(local.numel() * world_size(), dtype=local.dtype)
                for i, (start, parameter) in self._offsets().items():
                    whole[start : start + parameter.numel()] = saved[i][key].reshape(-1)
                value = whole.chunk(world_size())[rank()]
            else:
                value = copy.deepcopy(example)
            if isinstance(value, Tensor):
                value = value.to(local.device, copy=True)
            optimizer.state[local][key] = value

    def _offsets(self) -> dict[int, tuple[int, nn.Parameter]]:
        """Index of a trained parameter -> its start in ZeRO's flat buffer, and the parameter."""
        base = self._optimizer.bit16_groups_flat[0].storage_offset()
        return {i: (p.storage_offset() - base, p) for i, p in self._trained.items()}


class DeepSpeedBackend(Backend):
    """The processes of this run, with a DeepSpeed engine for each network."""

    def __init__(
        self, config: Config, zero: dict[str, Any], resumed: launcher.Precision | None = None
    ) -> None:
        """Joins the process group. `zero` is DeepSpeed's JSON, with its values "auto"."""
        super().__init__(config, resumed)
        self.wrapper = f"DeepSpeed ZeRO stage {lookup(zero, 'zero_optimization.stage') or 0}"
        if lookup(zero, "zero_optimization.offload_optimizer.device") == "cpu":
            self.wrapper += " with the optimizer on the CPU"
        on_cpu = launcher.uses_cpu(os.environ) or not torch.cuda.is_available()
        os.environ.setdefault("DS_ACCELERATOR", "cpu" if on_cpu else "cuda")
        self._deepspeed = _import_deepspeed(on_cpu)
        # Not deepspeed.init_distributed, which looks for MPI where there is no launcher. Without
        # `cpu`, Accelerate would lose the ranks of a CPU run under ACCELERATE_USE_DEEPSPEED.
        with launcher.joining(os.environ):
            state = accelerate.PartialState(cpu=on_cpu)
        self.rank = state.process_index
        self.world_size = state.num_processes
        self.device = state.device
        if not dist.is_initialized():  # DeepSpeed needs a process group in a single process too
            os.environ.setdefault("LOCAL_RANK", "0")
            name = "gloo" if on_cpu else "nccl"
            dist.init_process_group(name, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
        self._filled = partial(fill_auto, zero, config, self.precision, self.world_size)
        self._filled(parameters=0)  # raises before anything is built

    def prepare(self, phase: Phase, lr: float, config: OptimConfig) -> DeepSpeedEngine:
        """Moves a phase into an engine; its network cannot be copied (deepcopy) any more.

        Values may be written into the network until its first step.
        """
        network = phase.network
        network.to(self.device, self.dtype)
        optimizer = make_optimizer(network, lr, config)
        settings = self._filled(sum(p.numel() for p in network.parameters()))
        if settings["zero_optimization"]["stage"] == 0:
            settings["gradient_clipping"] = 0.0  # `clip_gradients` does it
        try:
            engine, *_ = self._deepspeed.initialize(
                model=phase, optimizer=optimizer, config=settings
            )
        except (ValueError, AssertionError) as error:
            message = " ".join(str(error).split())
            raise UserError(f"DeepSpeed refuses its configuration: {message}") from error
        return DeepSpeedEngine(phase, engine, config.clip_norm)


def _import_deepspeed(on_cpu: bool) -> Any:
    """The module, without its warnings that no user can fix.

    Raises:
        UserError: it is not installed.
    """
    try:
        import deepspeed
    except ImportError as error:
        raise UserError(
            "the run uses DeepSpeed, which is not installed: pip install 'sgan_dist[deepspeed]'"
        ) from error
    if on_cpu:
        # Its shared-memory all-reduce is for tensor-parallel inference. Left on, the first start
        # compiles it for minutes, and a killed build leaves a lock that hangs every later start.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.*deprecated")
    # torch's optimizers work on a slice as on a whole tensor; DeepSpeed has not tested each.
    logging.getLogger("DeepSpeed").addFilter(lambda line: "untested" not in line.getMessage())
    return deepspeed
