"""DeepSpeed's JSON configuration: where it comes from, and what fills its values "auto"."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sgan_dist.config import Config, find_config
from sgan_dist.errors import UserError
from sgan_dist.parallel.launcher import Precision, by_deepspeed

OPTIMIZER_SECTIONS = ("optimizer", "scheduler")
# DeepSpeed ignores sections that it does not know, and some others would change the training.
SECTIONS = {
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
    "gradient_clipping", "gradient_allreduce_op", "bf16", "fp16", "torch_autocast",
    "zero_optimization", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer",
    "steps_per_print", "wall_clock_breakdown", "timers", "comms_logger", "flops_profiler",
}  # fmt: skip


def requested(path: str | None, environ: Mapping[str, str]) -> dict[str, Any] | None:
    """The configuration that `machine.deepspeed` names, else the launcher's; None without both.

    The `deepspeed` launcher cannot name one, and stands for ZeRO stage 1.

    Raises:
        UserError: the file cannot be read, or contradicts the launcher's options.
    """
    if path is not None:
        return read(find_config(path))
    if by_deepspeed(environ):
        return {"zero_optimization": {"stage": 1}}
    return from_environment(environ)


def from_environment(environ: Mapping[str, str]) -> dict[str, Any] | None:
    """The configuration that the options of `accelerate launch --use_deepspeed` give, or None."""
    if environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() != "true":
        return None
    options = {
        key: value for key, value in environ.items() if value.lower() not in ("none", "auto")
    }
    stage = options.get("ACCELERATE_DEEPSPEED_ZERO_STAGE")
    if "ACCELERATE_DEEPSPEED_CONFIG_FILE" in options:
        config = read(Path(options["ACCELERATE_DEEPSPEED_CONFIG_FILE"]))
    else:
        config = {"zero_optimization": {"stage": int(stage or 2)}}  # Accelerate's default
        device = options.get("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE")
        if device is not None:
            config["zero_optimization"]["offload_optimizer"] = {"device": device}
    if stage is not None and int(stage) != config.get("zero_optimization", {}).get("stage", 0):
        raise UserError(
            f"accelerate launch has --zero_stage {stage}, and its DeepSpeed file has another stage:"
            " remove one of them"
        )
    if "ACCELERATE_GRADIENT_CLIPPING" in options:
        config["gradient_clipping"] = float(options["ACCELERATE_GRADIENT_CLIPPING"])
    accumulation = options.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if accumulation != "1":  # 1 is the default of Accelerate's own files
        config["gradient_accumulation_steps"] = int(accumulation)
    return config


def read(path: Path) -> dict[str, Any]:
    """Reads a DeepSpeed JSON file; raises UserError if it cannot be read or is no JSON object."""
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the DeepSpeed configuration {path}: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"the DeepSpeed configuration {path} is not a JSON object")
    return config


def fill_auto(
    settings: dict[str, Any], config: Config, precision: Precision, world_size: int, parameters: int
) -> dict[str, Any]:
    """DeepSpeed's settings with every "auto" and every missing value filled in.

    They follow from the run's config, for a network with so many `parameters`.

    Raises:
        UserError: a value contradicts the config, is not supported, or cannot be filled.
    """
    _refuse_unsupported(settings, precision)
    stage = lookup(settings, "zero_optimization.stage") or 0
    batch, micro_batches = sum(config.batches.values()), config.batch.accumulation
    # DeepSpeed insists on the product; where shares are unequal, it is that of the largest one
    per_rank = -(-batch // (world_size * micro_batches))
    product = per_rank * world_size * micro_batches
    required = {  # name -> value, and the setting that decides it
        "train_batch_size": (product, "batch.labeled + batch.unlabeled"),
        "train_micro_batch_size_per_gpu": (per_rank, "batch, world size and batch.accumulation"),
        "gradient_accumulation_steps": (micro_batches, "batch.accumulation"),
        "gradient_clipping": (config.optim.clip_norm or 0.0, "optim.clip_norm"),
        "gradient_allreduce_op": ("sum", "the losses, whose shares add up over ranks"),
        "fp16.enabled": (False, "machine.precision"),
        "bf16.enabled": (False, "machine.precision"),
        "torch_autocast.enabled": (precision == "bf16", "machine.precision"),
        "torch_autocast.dtype": ("bfloat16", "machine.precision"),
        # By DeepSpeed's default, gradients of these layers would be summed in bf16, unlike DDP's.
        "torch_autocast.lower_precision_safe_modules": ([], "the sum of gradients in fp32"),
        "zero_allow_untested_optimizer": (True, "optim.name"),
        "zero_force_ds_cpu_optimizer": (False, "optim.name"),
        "zero_optimization.stage": (stage, "itself"),
        "zero_optimization.compute_grad_norm": (True, "the check for non-finite gradients"),
    }
    defaults = {
        # One bucket for all gradients: DeepSpeed allocates its size, 5e8 by default, per backward.
        "zero_optimization.reduce_bucket_size": parameters,
        "zero_optimization.allgather_bucket_size": parameters + parameters % 2,
        "zero_optimization.overlap_comm": False,
        "timers.throughput.enabled": False,  # waits for the GPU twice a step
        "steps_per_print": None,
    }
    filled = copy.deepcopy(settings)
    for name, (value, source) in required.items():
        current = lookup(settings, name)
        if current not in (None, "auto", value):
            raise UserError(
                f"the DeepSpeed configuration sets {name} to {current}, and {source} makes it"
                f' {value}: set it to "auto", or change {source}'
            )
        _assign(filled, name, value)
    for name, default in defaults.items():
        if lookup(settings, name) in (None, "auto"):
            _assign(filled, name, default)
    remaining = sorted(_auto_names(filled))
    if remaining:
        raise UserError(f'"auto" cannot be filled for {", ".join(remaining)}: give a value')
    return filled


def _refuse_unsupported(settings: dict[str, Any], precision: Precision) -> None:
    for name in OPTIMIZER_SECTIONS:
        if name in settings:
            raise UserError(
                f'DeepSpeed\'s "{name}" section is not used: remove it, and set optim.name,'
                " optim.lr, optim.betas and optim.decay"
            )
    unknown = sorted(settings.keys() - SECTIONS)
    if unknown:
        raise UserError(
            f"the DeepSpeed configuration has {', '.join(unknown)}, which is not supported: keep"
            f" only {', '.join(sorted(SECTIONS))}"
        )
    zero = settings.get("zero_optimization", {})
    if zero.get("stage", 0) not in (0, 1, 2):
        raise UserError(
            f"zero_optimization.stage is {zero['stage']}, and must be 0, 1 or 2: stage 3 splits the"
            " parameters, and G's step through a frozen D, data-dependent initialization and the"
            " averaged D need them whole"
        )
    if precision == "fp64":
        raise UserError(
            "DeepSpeed sums gradients in fp32 at most: for machine.precision=fp64 run without it"
        )
    if lookup(settings, "fp16.enabled") is True:
        raise UserError(
            "fp16 is not supported, because its loss scaling skips steps: set machine.precision=bf16,"
            ' and fp16.enabled to "auto"'
        )
    if lookup(settings, "bf16.enabled") is True:
        raise UserError(
            "bf16.enabled makes the parameters bf16, unlike a run without DeepSpeed: set it to"
            ' "auto" and machine.precision=bf16, which keeps them in fp32 and computes in bf16'
        )
    if "offload_param" in zero or "zenflow" in zero:
        raise UserError(
            "zero_optimization.offload_param and zenflow are not supported: remove them"
            " (offload_optimizer is supported)"
        )
    if lookup(settings, "zero_optimization.offload_optimizer.device") not in (None, "none", "cpu"):
        raise UserError("zero_optimization.offload_optimizer.device must be cpu or none")


def lookup(settings: dict[str, Any], name: str) -> Any:
    """The value at a dotted name; None if there is none."""
    for key in name.split("."):
        if not isinstance(settings, dict) or key not in settings:
            return None
        settings = settings[key]
    return settings


def _assign(settings: dict[str, Any], name: str, value: Any) -> None:
    *sections, key = name.split(".")
    for section in sections:
        settings = settings.setdefault(section, {})
    settings[key] = value


def _auto_names(settings: Any, name: str = "") -> Iterator[str]:
    """The dotted names whose value is still "auto"."""
    if isinstance(settings, dict):
        for key, value in settings.items():
            yield from _auto_names(value, f"{name}.{key}" if name else key)
    elif settings == "auto":
        yield name
