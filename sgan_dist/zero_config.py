"""DeepSpeed's JSON: where it comes from, and how our config fills what it leaves open."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sgan_dist.errors import UserError
from sgan_dist.launcher import by_deepspeed

OPTIMIZER_SECTIONS = ("optimizer", "scheduler")
# DeepSpeed ignores a section that it doesn't know, and some that it does know change the training.
SECTIONS = {
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
    "gradient_clipping", "gradient_allreduce_op", "bf16", "fp16", "torch_autocast",
    "zero_optimization", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer",
    "steps_per_print", "wall_clock_breakdown", "timers", "comms_logger", "flops_profiler",
}  # fmt: skip


@dataclass(frozen=True)
class Filling:
    """What `"auto"` is filled from."""

    batch: int
    """labeled + unlabeled images a step, over all ranks"""
    parts: int
    """forward and backward passes that a step is cut into"""
    world_size: int
    precision: str
    clip_norm: float | None


def requested(path: str | None, environ: Mapping[str, str]) -> dict[str, Any] | None:
    """The DeepSpeed configuration that `train.deepspeed` names, else the launcher's; None: neither.

    The `deepspeed` launcher alone, which can't name one, asks for ZeRO stage 1.
    """
    if path is not None:
        return read(Path(path))
    if by_deepspeed(environ):
        return {"zero_optimization": {"stage": 1}}
    return from_environment(environ)


def from_environment(environ: Mapping[str, str]) -> dict[str, Any] | None:
    """The JSON that `accelerate launch --use_deepspeed` names or stands for; None without it."""
    if environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() != "true":
        return None
    said = {key: value for key, value in environ.items() if value.lower() != "none"}
    stage = said.get("ACCELERATE_DEEPSPEED_ZERO_STAGE")
    if "ACCELERATE_DEEPSPEED_CONFIG_FILE" in said:
        config = read(Path(said["ACCELERATE_DEEPSPEED_CONFIG_FILE"]))
    else:
        config = {"zero_optimization": {"stage": int(stage or 2)}}  # accelerate's own default
        device = said.get("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE")
        if device is not None:
            config["zero_optimization"]["offload_optimizer"] = {"device": device}
    if stage is not None and int(stage) != config.get("zero_optimization", {}).get("stage", 0):
        raise UserError(
            f"accelerate was given --zero_stage {stage}, and the DeepSpeed file has another stage:"
            " take out one of them"
        )
    if "ACCELERATE_GRADIENT_CLIPPING" in said:
        config["gradient_clipping"] = float(said["ACCELERATE_GRADIENT_CLIPPING"])
    if said.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1") != "1":  # 1 is what its files write
        config["gradient_accumulation_steps"] = int(said["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"])
    return config


def read(path: Path) -> dict[str, Any]:
    """A DeepSpeed JSON file."""
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"can't read the DeepSpeed configuration {path}: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"the DeepSpeed configuration {path} is not a JSON object")
    return config


def fill(config: dict[str, Any], filling: Filling, parameters: int) -> dict[str, Any]:
    """`config` with each "auto", and what is left out, filled for a network of so many parameters.

    Raises:
        UserError: a value contradicts our config, can't be filled, or asks for what can't work.
    """
    for name in OPTIMIZER_SECTIONS:
        if name in config:
            raise UserError(
                f'DeepSpeed\'s "{name}" section is not used: take it out, and set optim.name,'
                " optim.lr, optim.betas and optim.decay"
            )
    unknown = sorted(config.keys() - SECTIONS)
    if unknown:
        raise UserError(
            f"the DeepSpeed configuration has {', '.join(unknown)}, which this program does not"
            f" take: leave only {', '.join(sorted(SECTIONS))}"
        )
    zero = config.get("zero_optimization", {})
    if zero.get("stage", 0) not in (0, 1, 2):
        raise UserError(
            f"zero_optimization.stage is {zero['stage']}, and must be 0, 1 or 2: stage 3 splits the"
            " parameters, which G's step through a frozen D, data-dependent first values and the"
            " averaged D need whole"
        )
    if filling.precision == "fp64":
        raise UserError(
            "DeepSpeed sums gradients in fp32 at most: for train.precision=fp64 run without it"
        )
    if at(config, "fp16.enabled") is True:
        raise UserError(
            "fp16 is not supported, its loss scale skips steps: set train.precision=bf16, and"
            ' fp16.enabled to "auto"'
        )
    if at(config, "bf16.enabled") is True:
        raise UserError(
            "bf16.enabled makes the parameters bf16, unlike a run without DeepSpeed: set it to"
            ' "auto" and train.precision=bf16, which keeps them in fp32 and computes in bf16'
        )
    if "offload_param" in zero or "zenflow" in zero:
        raise UserError(
            "zero_optimization.offload_param and zenflow are not supported: take them out"
            " (offload_optimizer is)"
        )
    if at(config, "zero_optimization.offload_optimizer.device") not in (None, "none", "cpu"):
        raise UserError("zero_optimization.offload_optimizer.device must be cpu or none")

    per_rank = filling.batch // filling.world_size // filling.parts
    must = {  # name -> value, and the setting of ours that decides it
        "train_batch_size": (filling.batch, "data.labeled_batch + data.unlabeled_batch"),
        "train_micro_batch_size_per_gpu": (per_rank, "the batch, the world size and the parts"),
        "gradient_accumulation_steps": (filling.parts, "train.accumulation"),
        "gradient_clipping": (filling.clip_norm or 0.0, "optim.clip_norm"),
        "gradient_allreduce_op": ("sum", "the losses, whose shares add up over ranks"),
        "fp16.enabled": (False, "train.precision"),
        "bf16.enabled": (False, "train.precision"),
        "torch_autocast.enabled": (filling.precision == "bf16", "train.precision"),
        "torch_autocast.dtype": ("bfloat16", "train.precision"),
        # Left to DeepSpeed, gradients of these layers would travel in bf16, unlike DDP's.
        "torch_autocast.lower_precision_safe_modules": ([], "the exchange of gradients in fp32"),
        "zero_allow_untested_optimizer": (True, "optim.name"),
        "zero_force_ds_cpu_optimizer": (False, "optim.name"),
        "zero_optimization.stage": (zero.get("stage", 0), "itself"),
        "zero_optimization.compute_grad_norm": (True, "the check for non-finite gradients"),
    }
    # One bucket for all gradients: DeepSpeed allocates its size, 5e8 by default, at each backward.
    may = {
        "zero_optimization.reduce_bucket_size": parameters,
        "zero_optimization.allgather_bucket_size": parameters + parameters % 2,
        "zero_optimization.overlap_comm": False,
        "timers.throughput.enabled": False,  # waits for the GPU twice a step
        "steps_per_print": None,
    }
    filled = copy.deepcopy(config)
    for name, (value, source) in must.items():
        given = at(config, name)
        if given not in (None, "auto", value):
            raise UserError(
                f"the DeepSpeed configuration sets {name} to {given}, and {source} makes it"
                f' {value}: set it to "auto"'
            )
        _put(filled, name, value)
    for name, default in may.items():
        if at(config, name) in (None, "auto"):
            _put(filled, name, default)
    left = sorted(_autos(filled))
    if left:
        raise UserError(f'"auto" can\'t be filled for {", ".join(left)}: give a value')
    return filled


def at(config: dict[str, Any], name: str) -> Any:
    """The value at a dotted name; None where there is none."""
    for key in name.split("."):
        if not isinstance(config, dict) or key not in config:
            return None
        config = config[key]
    return config


def _put(config: dict[str, Any], name: str, value: Any) -> None:
    *folders, last = name.split(".")
    for key in folders:
        config = config.setdefault(key, {})
    config[last] = value


def _autos(config: Any, name: str = "") -> Iterator[str]:
    if isinstance(config, dict):
        for key, value in config.items():
            yield from _autos(value, f"{name}.{key}" if name else key)
    elif config == "auto":
        yield name
