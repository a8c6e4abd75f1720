"""The configuration: frozen dataclasses, filled by YAML files and dotted command-line overrides.

Precedence: defaults here < `--config a.yaml` < `--config b.yaml` < `--optim.lr=1e-3`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jsonargparse
import yaml

from sgan_dist.errors import UserError

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)


@dataclass(frozen=True)
class DataConfig:
    """The prepared dataset and how the global batch is cut from it."""

    root: str = "data/digits"
    """folder or URL of a dataset (index.json beside labeled/ unlabeled/ validation/ test/)"""
    source: str | None = None
    """prepared into an absent `root` at start: digits, mnist, fashion-mnist, or idx:DIR"""
    labels_per_class: int = 10
    """labeled images a class, when `source` is prepared"""
    label_seed: int = 0
    """seed of the draw of labels, when `source` is prepared"""
    validation: int | None = None
    """validation images, when `source` is prepared; None takes the source's default"""
    labeled_batch: int = 32
    """labeled images a step, over all ranks"""
    unlabeled_batch: int = 64
    """unlabeled images a step, over all ranks"""
    lanes: int = 8
    """lanes of a windowed split; world size | lanes | batch (a split held in memory has none)"""
    window_mib: int = 256
    """shuffle windows of a windowed split, all lanes together, MiB of encoded bytes"""
    workers: int = 0
    """loader processes a rank for windowed splits; splits held in memory need none"""
    balanced: bool = False
    """labeled batches in which classes take turns"""
    max_skips: int = 100
    """damaged training images that are left out and replaced, before the run is stopped"""
    cache: str | None = None
    """node-local folder for remote shards; None: $SGAN_CACHE, else the user's cache folder"""
    cache_gib: float = 50.0
    """size of that folder, shared by all ranks and runs of a node; least recently used out first"""
    tries: int = 6
    """attempts at a remote file, ever longer apart"""
    timeout: float = 30.0
    """seconds without a byte after which an attempt is given up"""


@dataclass(frozen=True)
class ModelConfig:
    """Which networks; a name of `sgan_dist.models`, or your own as `package.module:Class`."""

    discriminator: str = "dcgan"
    generator: str | None = "dcgan"
    """null: no generator and no real/fake terms, for comparison"""
    discriminator_args: dict[str, Any] = field(default_factory=dict)
    """keyword arguments of the discriminator's class"""
    generator_args: dict[str, Any] = field(default_factory=dict)
    """keyword arguments of the generator's class"""


@dataclass(frozen=True)
class LossConfig:
    """The (N+1)-class losses and their weights."""

    form: Literal["implied", "explicit"] = "implied"
    """implied: N logits, the fake logit is 0; explicit: N+1 logits"""
    unlabeled: float = 0.5
    """weight of -log p(real | unlabeled)"""
    fake: float = 0.5
    """weight of -log p(fake | G(z))"""
    generator: Literal["feature_matching", "non_saturating"] = "feature_matching"
    consistency: float = 0.0
    """weight of the cross-entropy from the averaged D's targets on unlabeled images; 0: off"""
    temperature: float = 0.5
    """of those targets: below 1 sharpens them"""
    threshold: float = 0.0
    """targets whose largest probability, aligned and not yet sharpened, is below it are left out"""


@dataclass(frozen=True)
class OptimConfig:
    """One optimizer each for D and G."""

    name: Literal["adam", "sgd"] = "adam"
    lr: float = 2e-3
    """of the discriminator"""
    generator_lr: float = 1e-3
    betas: tuple[float, float] = (0.5, 0.999)
    """Adam's; SGD takes the first as its momentum"""
    decay: float = 0.33
    """last fraction of `train.steps` over which the rates go linearly to 0"""
    clip_norm: float | None = None
    """largest norm of D's and of G's gradient"""


@dataclass(frozen=True)
class TrainConfig:
    """The loop."""

    steps: int = 1000
    fake_batch: int = 32
    """generated images in D's step, over all ranks; G's own step makes as many"""
    deepspeed: str | None = None
    """a DeepSpeed JSON (configs/deepspeed/); None: DDP, or what the launcher's own options ask for"""
    accumulation: int = 1
    """parts that each rank's batches pass D in, one after another; the same gradients in less memory"""
    supervised_only: bool = False
    """train the same D on the labeled images alone: no G, no unlabeled stream"""
    baseline_steps: int = 0
    """steps of a supervised-only run of the same D after the main one, for comparison; 0: none"""
    precision: Literal["auto", "fp32", "bf16", "fp64"] = "auto"
    """of the networks; losses are at least fp32. auto: the launcher's --mixed_precision, else fp32"""
    log_every: int = 50
    evaluate_every: int = 500
    """steps between evaluations on the validation split; 0: only at the end"""
    sample_every: int = 500
    """steps between grids of generated images; 0: only at the end"""
    world_size: int | None = None
    """processes that must take part; a run that got another number stops"""
    replica_check_every: int = 1000
    """steps between checks that all ranks hold the same weights; 0: never"""
    timeout: float = 300.0
    """seconds for a step with its evaluation and save; a run that takes longer hangs, and is ended"""


@dataclass(frozen=True)
class AugmentConfig:
    """Random maps, drawn anew for each image; the same law for real and fake ones."""

    rotation: float = 0.0
    """degrees, at most this much either way"""
    scale: float = 0.0
    """fraction, at most this much larger or smaller"""
    shear: float = 0.0
    translate: float = 0.0
    """pixels, at most this much either way"""
    elastic: float = 0.0
    """pixels, standard deviation of a smooth random displacement (a 5x5 grid, interpolated)"""
    thickness: float = 0.0
    """part of a pixel, at most this much that bright strokes grow or shrink all round; at most 1"""
    flip: float = 0.0
    """probability of a mirror image, left for right"""


@dataclass(frozen=True)
class EmaConfig:
    """The averaged copy of D that is evaluated and kept."""

    half_life: float = 50_000.0
    """images (labeled + unlabeled) after which a step's share in the average has halved"""
    rampup: float = 0.1
    """the half-life is at most this fraction of the images seen so far"""


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = 500
    """steps between checkpoints"""
    keep: int = 2
    """checkpoints kept"""


@dataclass(frozen=True)
class TrackingConfig:
    wandb: bool = True
    """Weights & Biases; offline by itself where there is no key"""
    project: str = "sgan_dist"


@dataclass(frozen=True)
class Config:
    """One run."""

    name: str = "run"
    run_dir: str | None = None
    """where the run lives; None: runs/NAME"""
    seed: int = 0
    """of initial weights, data order, noise and augmentation (`data.label_seed` draws the labels)"""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """of all that D is trained on"""
    teacher_augment: AugmentConfig = field(default_factory=AugmentConfig)
    """of what the averaged D makes targets from, where `loss.consistency` is on"""
    ema: EmaConfig = field(default_factory=EmaConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    @property
    def directory(self) -> Path:
        """The run directory."""
        return Path(self.run_dir or f"runs/{self.name}")


def parse(argv: Sequence[str], default: Path | None = None) -> tuple[Config, bool]:
    """The configuration of a command line, to be checked, and whether it is a --dry_run.

    `default` is the file that is read where no --config is given.

    Raises:
        UserError: unknown key or wrong type.
    """
    parser = jsonargparse.ArgumentParser(prog="launch/train.py", exit_on_error=False)
    parser.add_argument("--config", action="config", help="a YAML file; may be given several times")
    parser.add_class_arguments(Config)
    parser.add_argument("--dry_run", action="store_true", help="print what would run, and stop")
    named = any(a == "--config" or a.startswith("--config=") for a in argv)
    layers = [] if named or default is None else [f"--config={default}"]
    try:
        config = parser.instantiate(parser.parse_args([*layers, *argv])).as_dict()
    except (jsonargparse.ArgumentError, ValueError) as error:  # ValueError: not UTF-8
        said = " ".join(str(error).split())
        raise UserError(f"bad configuration: {said} (see launch/train.py --help)") from error
    config.pop("config", None)
    dry_run = config.pop("dry_run")
    return Config(**config), dry_run


def check(config: Config) -> Config:
    """`config` as it will run, or a UserError that names the first value that can't be.

    A supervised-only run takes no unlabeled images and has no generator, whatever else is said; and
    without a generator there are no terms of real and fake.
    """
    if config.train.supervised_only:
        config = dataclasses.replace(
            config,
            data=dataclasses.replace(config.data, unlabeled_batch=0),
            model=dataclasses.replace(config.model, generator=None),
            loss=dataclasses.replace(config.loss, consistency=0.0),
            train=dataclasses.replace(config.train, baseline_steps=0),
        )
    d, t, o = config.data, config.train, config.optim
    must_be_positive = {
        "data.labeled_batch": d.labeled_batch,
        "data.lanes": d.lanes,
        "data.window_mib": d.window_mib,
        "data.labels_per_class": d.labels_per_class,
        "data.cache_gib": d.cache_gib,
        "data.tries": d.tries,
        "data.timeout": d.timeout,
        "train.steps": t.steps,
        "train.accumulation": t.accumulation,
        "train.log_every": t.log_every,
        "train.timeout": t.timeout,
        "checkpoint.every": config.checkpoint.every,
        "checkpoint.keep": config.checkpoint.keep,
        "optim.lr": o.lr,
        "ema.half_life": config.ema.half_life,
        "loss.temperature": config.loss.temperature,
    }
    if not t.supervised_only:
        must_be_positive["data.unlabeled_batch"] = d.unlabeled_batch
    if config.model.generator is not None:
        must_be_positive |= {
            "train.fake_batch": t.fake_batch,
            "optim.generator_lr": o.generator_lr,
        }
    if d.validation is not None:
        must_be_positive["data.validation"] = d.validation
    for key, value in must_be_positive.items():
        if not (value > 0 and math.isfinite(value)):
            raise UserError(f"{key} is {value}, and must be positive")
    must_not_be_negative = {
        "data.workers": d.workers,
        "data.max_skips": d.max_skips,
        "train.baseline_steps": t.baseline_steps,
        "train.evaluate_every": t.evaluate_every,
        "train.sample_every": t.sample_every,
        "train.replica_check_every": t.replica_check_every,
        "ema.rampup": config.ema.rampup,
        **{
            f"loss.{k}": v
            for k, v in dataclasses.asdict(config.loss).items()
            if not isinstance(v, str)
        },
        **{f"augment.{k}": v for k, v in dataclasses.asdict(config.augment).items()},
        **{
            f"teacher_augment.{k}": v for k, v in dataclasses.asdict(config.teacher_augment).items()
        },
    }
    for key, value in must_not_be_negative.items():
        if not (value >= 0 and math.isfinite(value)):
            raise UserError(f"{key} is {value}, and must not be negative")
    if config.loss.threshold > 1:
        raise UserError(f"loss.threshold is {config.loss.threshold}, and no probability is above 1")
    if not 0 <= o.decay <= 1:
        raise UserError(f"optim.decay is {o.decay}, and must be a fraction from 0 to 1")
    if o.clip_norm is not None and not o.clip_norm > 0:
        raise UserError(f"optim.clip_norm is {o.clip_norm}: give a positive norm, or null for none")
    if not all(0 <= beta < 1 for beta in o.betas):
        raise UserError(f"optim.betas are {o.betas}, and must be fractions from 0 to below 1")
    if not 0 <= config.seed < 2**63:
        raise UserError(f"seed is {config.seed}, and must be from 0 to 2^63 - 1")
    for name, amounts in (("augment", config.augment), ("teacher_augment", config.teacher_augment)):
        if amounts.scale >= 1:
            raise UserError(f"{name}.scale is {amounts.scale}, and must be below 1")
        if (most := max(amounts.thickness, amounts.flip)) > 1:
            raise UserError(f"{name}.thickness and .flip are at most 1, and {most} was given")
    return config


def supervised(config: Config) -> Config:
    """The supervised-only run that `config` is compared with: same D, labels and augmentation."""
    return check(
        dataclasses.replace(
            config,
            name=f"{config.name}-supervised",
            run_dir=str(config.directory / "supervised"),
            train=dataclasses.replace(
                config.train,
                steps=config.train.baseline_steps,
                supervised_only=True,
                baseline_steps=0,
            ),
            tracking=dataclasses.replace(config.tracking, wandb=False),
        )
    )


# What may change between the runs of one run directory: how long, where and how often, never what.
FREE_AT_RESUME = {
    "name", "run_dir",
    "data.root", "data.source", "data.workers", "data.max_skips",
    "data.cache", "data.cache_gib", "data.tries", "data.timeout",
    "data.labels_per_class", "data.label_seed", "data.validation",  # the data fingerprint covers them
    "train.steps", "train.baseline_steps", "train.log_every", "train.evaluate_every",
    "train.sample_every", "train.world_size", "train.accumulation", "train.replica_check_every",
    "train.deepspeed", "train.timeout",
    "checkpoint.every", "checkpoint.keep", "tracking.wandb", "tracking.project",
}  # fmt: skip


def meaning(config: Config) -> dict[str, Any]:
    """Dotted key -> value of all that decides what the run computes; compared at resume."""
    flat: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            for item in dataclasses.fields(value):
                walk(f"{prefix}.{item.name}" if prefix else item.name, getattr(value, item.name))
        elif prefix not in FREE_AT_RESUME:
            flat[prefix] = list(value) if isinstance(value, tuple) else value

    walk("", config)
    return flat


def save(config: Config, path: Path) -> None:
    """Writes `config` as YAML that `--config` reads back."""
    path.write_text(yaml.safe_dump(_plain(dataclasses.asdict(config)), sort_keys=False))


def load(path: Path) -> Config:
    """The configuration that `save` wrote."""
    if not path.is_file():
        raise UserError(f"{path.parent} is not a run directory: it holds no {path.name}")
    return check(parse([f"--config={path}"])[0])


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value
