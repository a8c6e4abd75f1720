"""The DeepSpeed form of the backend: two engines, ZeRO stages 0 to 2, on CPU and GPU.

Written against deepspeed 0.19.8. Parameters stay in fp32 and whole on every rank, so the averaged D
and a frozen D read them as they are, and a checkpoint is the one that DDP writes.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import warnings
from collections.abc import Iterator
from typing import Any

import accelerate
import torch
import torch.distributed as dist
from torch import Tensor, nn

from sgan_dist import launcher
from sgan_dist.config import Config, OptimConfig
from sgan_dist.errors import UserError
from sgan_dist.players import autocast, describe, make_optimizer, refuse_unused
from sgan_dist.zero_config import Filling, at, fill


class DeepSpeedPlayer:
    """A network in an engine of its own; see `sgan_dist.backend.Player`."""

    def __init__(self, network: nn.Module, engine: Any, clip_norm: float | None) -> None:
        self.network = network
        self._engine = engine
        self._clip_norm = clip_norm
        self._parameters = list(network.parameters())
        self._trained = {i: p for i, p in enumerate(self._parameters) if p.requires_grad}
        self._split = bool(engine.zero_optimization())
        self._changed = True

    def wrapped(self, *inputs: Any) -> Any:
        """The forward pass whose backward updates the network."""
        out = self._engine(*inputs)
        # The engine hooks its outputs: a gradient with respect to one of them, as a diagnostic
        # takes, would count as a backward pass. Nothing passes the views.
        if isinstance(out, Tensor):
            return out.view_as(out)
        return type(out)(*(tensor.view_as(tensor) for tensor in out))

    def settle(self, example: Tensor) -> None:
        """Checks that every parameter has a part in the output; an engine has nothing to settle.

        Raises:
            UserError: one has none.
        """
        kept = copy.deepcopy(self.network.state_dict())
        out = self.network(example)
        total = (out if isinstance(out, Tensor) else out[0]).sum()
        # Not backward(), which would set off the engine's hooks.
        trained = list(self._trained.values())
        found = torch.autograd.grad(total, trained, allow_unused=True)
        used = [p for p, gradient in zip(trained, found, strict=True) if gradient is not None]
        refuse_unused(self.network, used)
        self.network.load_state_dict(kept)

    @contextlib.contextmanager
    def part(self, last: bool) -> Iterator[None]:
        """A forward and backward over one part of this rank's batch."""
        if self._changed and self._split:
            # ZeRO steps a copy of the parameters that it took at construction: first values, or a
            # checkpoint, may have been written into the network since.
            self._engine.optimizer.refresh_fp32_params()
        self._changed = False
        self._engine.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss_share: Tensor) -> None:
        """Adds the gradient of this rank's share of the loss; shares add up over parts and ranks."""
        self._engine.backward(loss_share, scale_wrt_gas=False)

    def clipped(self) -> Tensor | None:
        """The norm of the global gradient, which is then clipped; None under ZeRO, see `step`."""
        if self._split:
            return None
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self._clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self._parameters, self._clip_norm, norm)
        return norm

    def step(self, lr: float) -> Tensor | None:
        """One optimizer step at the rate `lr`, gradients cleared.

        Under ZeRO it returns the norm of the global gradient before clipping. Where that is not
        finite it is infinite, and the step was left out: parameters and moments are as before.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        self._engine.step()
        if not self._split:
            return None
        norm = self._engine.get_global_grad_norm()
        return torch.as_tensor(norm, device=self._parameters[0].device)

    def state(self) -> dict[str, Any]:
        """Network and optimizer as an unsplit optimizer has them. All ranks call it."""
        optimizer = self._engine.optimizer
        if self._split:
            # The optimizer's one parameter is this rank's slice of all parameters, laid end to end.
            (mine,) = optimizer.optimizer.param_groups[0]["params"]
            state: dict[int, dict[str, Any]] = {i: {} for i in self._trained}
            for key, value in optimizer.optimizer.state.get(mine, {}).items():
                whole = self._gathered(value) if isinstance(value, Tensor) and value.dim() else None
                for i, (begin, parameter) in self._places().items():
                    if whole is None:
                        state[i][key] = copy.deepcopy(value)
                        continue
                    part = whole[begin : begin + parameter.numel()]
                    state[i][key] = part.view_as(parameter).clone()
            kept = {
                "state": {i: values for i, values in state.items() if values},
                "param_groups": [
                    group | {"params": list(range(len(self._parameters)))}
                    for group in optimizer.optimizer.state_dict()["param_groups"]
                ],
            }
        else:
            kept = optimizer.state_dict()
        return {"network": self.network.state_dict(), "optimizer": kept}

    def load(self, state: dict[str, Any]) -> None:
        """Takes over what `state` gave, on this form or another, at this world size or another."""
        self.network.load_state_dict(state["network"])
        self._changed = True
        optimizer = self._engine.optimizer
        if not self._split:
            optimizer.load_state_dict(state["optimizer"])
            return
        # Rates and betas are the config's, which a resumed run must share.
        (mine,) = optimizer.optimizer.param_groups[0]["params"]
        saved = state["optimizer"]["state"]
        optimizer.optimizer.state.pop(mine, None)
        for key, example in saved[min(saved)].items() if saved else ():
            if not isinstance(example, Tensor) or not example.dim():
                value = example.to(mine.device) if isinstance(example, Tensor) else example
                optimizer.optimizer.state[mine][key] = copy.deepcopy(value)
                continue
            whole = torch.zeros(mine.numel() * dist.get_world_size(), dtype=mine.dtype)
            for i, (begin, parameter) in self._places().items():
                whole[begin : begin + parameter.numel()] = saved[i][key].reshape(-1)
            begin = mine.numel() * dist.get_rank()
            value = whole[begin : begin + mine.numel()].to(mine.device, copy=True)
            optimizer.optimizer.state[mine][key] = value

    def _places(self) -> dict[int, tuple[int, nn.Parameter]]:
        """Index of a trained parameter -> where it begins in ZeRO's flat buffer, and itself."""
        base = self._engine.optimizer.bit16_groups_flat[0].storage_offset()
        return {i: (p.storage_offset() - base, p) for i, p in self._trained.items()}

    def _gathered(self, mine: Tensor) -> Tensor:
        """All ranks' slices end to end, on the parameters' device."""
        mine = mine.to(self._parameters[0].device)
        parts = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, mine)
        return torch.cat(parts)


class DeepSpeedBackend:
    """The processes of this run, with a DeepSpeed engine for each network."""

    def __init__(self, config: Config, zero: dict[str, Any]) -> None:
        """`zero` is DeepSpeed's JSON; see `sgan_dist.zero_config`."""
        self.precision = launcher.precision(config.train.precision, os.environ)
        self.dtype = torch.float32
        self._zero = zero
        asked = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes")
        on_cpu = asked or not torch.cuda.is_available()
        os.environ.setdefault("DS_ACCELERATOR", "cpu" if on_cpu else "cuda")
        self._deepspeed = _import_deepspeed(on_cpu)
        # Not deepspeed.init_distributed, which looks for MPI where there is no launcher. And
        # accelerate's state would forget the ranks of a CPU run under ACCELERATE_USE_DEEPSPEED
        # unless told that this is one.
        state = accelerate.PartialState(cpu=on_cpu)
        self.rank: int = state.process_index
        self.world_size: int = state.num_processes
        self.device: torch.device = state.device
        if not dist.is_initialized():  # a lone process: engines want a group all the same
            os.environ.setdefault("LOCAL_RANK", "0")
            backend = "gloo" if on_cpu else "nccl"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
        self._filling = Filling(
            batch=config.data.labeled_batch + config.data.unlabeled_batch,
            parts=config.train.accumulation,
            world_size=self.world_size,
            precision=self.precision,
            clip_norm=config.optim.clip_norm,
        )
        fill(zero, self._filling, parameters=0)  # refuses before anything is built

    def prepare(self, network: nn.Module, lr: float, config: OptimConfig) -> DeepSpeedPlayer:
        """The network, moved to the device, in an engine with its optimizer.

        First values may be written into it until its first step. It can't be copied any more.
        """
        network.to(self.device, self.dtype)
        optimizer = make_optimizer(network, lr, config)
        filled = fill(self._zero, self._filling, sum(p.numel() for p in network.parameters()))
        if filled["zero_optimization"]["stage"] == 0:
            filled["gradient_clipping"] = 0.0  # `clipped` has done it
        try:
            engine, *_ = self._deepspeed.initialize(
                model=network, optimizer=optimizer, config=filled
            )
        except (ValueError, AssertionError) as error:
            said = " ".join(str(error).split())
            raise UserError(f"DeepSpeed does not take its configuration: {said}") from error
        return DeepSpeedPlayer(network, engine, config.clip_norm)

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        """Mixed precision for the networks, where the config asks for it."""
        return autocast(self)

    def describe(self) -> str:
        zero = f"DeepSpeed ZeRO stage {at(self._zero, 'zero_optimization.stage') or 0}"
        if at(self._zero, "zero_optimization.offload_optimizer.device") == "cpu":
            zero += " with the optimizer on the CPU"
        return describe(self, zero)

    def close(self) -> None:
        """Leaves the process group; without it a multi-process run ends with a warning."""
        dist.destroy_process_group()


def _import_deepspeed(on_cpu: bool) -> Any:
    try:
        import deepspeed
    except ImportError as error:
        raise UserError(
            "DeepSpeed is asked for and not installed: pip install 'sgan_dist[deepspeed]'"
        ) from error
    if on_cpu:
        # Its shared-memory all-reduce serves tensor-parallel inference alone. Left on, the first
        # start compiles it for minutes, and a killed build leaves a lock that hangs every later one.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # DeepSpeed calls it; nothing that a user could mend
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.*deprecated")
    # torch's SGD works on a slice as on a whole; DeepSpeed warns that it hasn't tried.
    logging.getLogger("DeepSpeed").addFilter(lambda line: "untested" not in line.getMessage())
    return deepspeed
