"""The settings of a run, section by section. A docstring under a field is its text in --help."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)

from sgan_dist.config.names import RENAMED_NETWORKS
from sgan_dist.config.section import section, setting
from sgan_dist.errors import UserError

Fraction = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Place = Annotated[str, AfterValidator(os.path.expanduser)]  # no shell expands --run_dir=~/x
Arguments = dict[str, Any]
free = partial(setting, free=True, compare=False)
semi_supervised = partial(setting, supervised=False)


@section("data.")
class DataConfig:
    """The dataset, and how to prepare it where it does not exist yet."""

    root: Place = free("data/digits")
    """folder or URL of a prepared dataset (index.json beside labeled/ unlabeled/ validation/ test/)"""
    source: str | None = free(None, compare=True)
    """what to prepare in `root` if that does not exist: digits, mnist, folder:DIR, ..., as `prepare`"""
    labels_per_class: PositiveInt = free(10, compare=True)  # the dataset's fingerprint covers it
    """labeled images per class, when `source` is prepared"""
    label_seed: int = free(0)
    """decides which images are labeled, when `source` is prepared"""
    validation: PositiveInt | None = free(None, compare=True)
    """validation images, when `source` is prepared; null: a twelfth of the images, at most 5000"""
    max_skips: NonNegativeInt = free(100)
    """stop the run once more than this many training images are damaged"""


@section("batch.")
class BatchConfig:
    """The global batch of a step, over all ranks."""

    labeled: PositiveInt = 32
    """labeled images per step"""
    unlabeled: NonNegativeInt = semi_supervised(64)
    """unlabeled images per step"""
    fake: NonNegativeInt = semi_supervised(32)
    """generated images in D's step; G's own step generates as many"""
    balanced: bool = setting(False, before=False)
    """whether labeled batches hold (nearly) as many images of each class"""
    accumulation: PositiveInt = free(1)
    """forward and backward passes per step and rank: the same gradients in less memory"""


@section("stream.")
class StreamConfig:
    """Reading of splits in windowed order; a split held in memory (full order) needs none of it."""

    lanes: PositiveInt = 8
    """number of lanes, which ranks share; must divide the batches"""
    lane_window_mib: PositiveFloat = 32
    """size of a lane's shuffle window, in MiB of encoded bytes; a rank holds those of its lanes"""
    workers: NonNegativeInt = free(0)
    """loader processes per rank; 0: the training process reads"""


@section("remote.")
class RemoteConfig:
    """Datasets at a URL: the node's cache, and retries."""

    cache: Place | None = free(None)
    """node-local folder for remote shards; null: $SGAN_CACHE, else the user's cache folder"""
    cache_gib: PositiveFloat = free(50.0)
    """size of the cache, shared by all ranks and runs of a node; least recently used shards go first"""
    tries: PositiveInt = free(6)
    """attempts at a remote file, with growing pauses between them"""
    read_timeout: PositiveFloat = free(30.0)
    """seconds without a byte after which an attempt is given up"""


@section("model.")
class ModelConfig:
    """Which networks: names from the list at the end, or your own as package.module:Class."""

    discriminator: str = "dcgan"
    """tutorial, conv_small, dcgan, mlp, or your own as package.module:Class"""
    generator: str | None = semi_supervised("dcgan")
    """tutorial, dcgan, mlp, or your own; null: no generator and no real/fake terms, for comparison"""
    discriminator_args: Arguments = setting(dict)
    """keyword arguments of the discriminator's class, as {"width": 48}; see the list at the end"""
    generator_args: Arguments = semi_supervised(dict)
    """keyword arguments of the generator's class"""

    def __post_init__(self) -> None:
        for name in ("discriminator", "generator"):
            value = getattr(self, name)
            if value in RENAMED_NETWORKS:
                raise UserError(f"model.{name} {value} is now called {RENAMED_NETWORKS[value]}")


@section("loss.")
class LossConfig:
    """The losses over N classes and "fake", and their weights."""

    form: Literal["implied", "explicit"] = "implied"
    """implied: D has N logits, and the fake logit is 0; explicit: D has N+1 logits"""
    unlabeled: NonNegativeFloat = semi_supervised(0.5)
    """weight of -log p(real | unlabeled)"""
    fake: NonNegativeFloat = semi_supervised(0.5)
    """weight of -log p(fake | G(z))"""
    generator: Literal["feature_matching", "non_saturating"] = semi_supervised("feature_matching")
    """G's loss"""
    consistency: NonNegativeFloat = semi_supervised(0.0)
    """weight of the cross-entropy from the averaged D's targets on unlabeled images; 0: off"""
    temperature: PositiveFloat = semi_supervised(0.5)
    """temperature of the consistency targets: below 1 sharpens them"""
    threshold: Fraction = semi_supervised(0.0, before=0.0)
    """leave out consistency targets whose largest probability, before sharpening, is below this"""
    prior: Literal["uniform", "labeled"] = semi_supervised("uniform", before="uniform")
    """shares of the classes that consistency targets are aligned to; labeled: those of the labels"""
    class_weights: Literal["none", "balanced"] = setting("none", before="none")
    """balanced: the supervised loss weighs each class as much as any other"""


@section("optim.")
class OptimConfig:
    """One optimizer each for D and G."""

    name: Literal["adam", "sgd"] = "adam"
    """the optimizer of both"""
    lr: PositiveFloat = 2e-3
    """learning rate of D"""
    generator_lr: NonNegativeFloat = semi_supervised(1e-3)
    """learning rate of G"""
    betas: Annotated[tuple[BelowOne, BelowOne], Field(strict=False)] = (0.5, 0.999)
    """Adam's betas; SGD takes the first as its momentum"""
    decay: Fraction = 0.33
    """last fraction of `train.steps` over which the learning rates go linearly to 0"""
    clip_norm: PositiveFloat | None = None
    """largest norm of D's and of G's gradient; null: no clipping"""


@section("train.")
class TrainConfig:
    """The loop."""

    steps: PositiveInt = free(1000, compare=True)
    """steps in all; a finished run given more continues"""
    supervised_only: bool = False
    """train the same D on the labeled images alone: no G, no unlabeled images"""
    log_every: PositiveInt = free(50)
    """steps between log lines"""
    evaluate_every: NonNegativeInt = free(500)
    """steps between evaluations on the validation split; 0: only at the end"""
    sample_every: NonNegativeInt = free(500)
    """steps between grids of generated images; 0: only at the end"""


@section("machine.")
class MachineConfig:
    """Processes, precision and engines."""

    precision: Literal["auto", "fp32", "tf32", "bf16", "fp64"] = "auto"
    """of the networks; auto: see docs/backends.md"""
    world_size: PositiveInt | None = free(None)
    """number of processes that must take part; a start with another number is refused"""
    deepspeed: Place | None = free(None)
    """a DeepSpeed JSON, by path or shipped name such as deepspeed/zero2; null: the launcher decides"""
    replica_check_every: NonNegativeInt = free(1000)
    """steps between checks that all ranks hold the same weights; 0: only at each start"""
    step_timeout: PositiveFloat = free(300.0)
    """seconds for a step with its evaluation and save; a longer one is a hang, and the run is killed"""


@section("augment.")
class AugmentConfig:
    """Random maps of all images that D is trained on, real and generated, drawn for each image."""

    rotation: NonNegativeFloat = 0.0
    """largest rotation, in degrees, either way"""
    scale: BelowOne = 0.0
    """largest change of size, as a fraction"""
    shear: NonNegativeFloat = 0.0
    """largest shear, either way"""
    translate: NonNegativeFloat = 0.0
    """largest shift, in pixels, either way"""
    elastic: NonNegativeFloat = 0.0
    """standard deviation, in pixels, of a smooth random displacement (a 5x5 grid, interpolated)"""
    thickness: Fraction = setting(0.0, before=0.0)
    """largest growth or shrinkage of bright strokes all round, as a part of a pixel; at most 1"""
    flip: Fraction = setting(0.0, before=0.0)
    """probability of a mirror image, left for right"""


@section("teacher_augment.")
class TeacherAugmentConfig(AugmentConfig):
    """Random maps of the images that the averaged D makes consistency targets from."""


@section("ema.")
class EmaConfig:
    """The averaged copy of D that is evaluated and kept."""

    half_life: PositiveFloat = 50_000.0
    """images (labeled + unlabeled) after which a step's share in the average has halved"""
    rampup: NonNegativeFloat = 0.1
    """the half-life is at most this fraction of the images seen so far"""


@section("checkpoint.")
class CheckpointConfig:
    """What a run is resumed from."""

    every: PositiveInt = free(500)
    """steps between checkpoints"""
    keep: PositiveInt = free(2)
    """number of checkpoints to keep"""


@section("tracking.")
class TrackingConfig:
    """Weights & Biases."""

    wandb: bool = free(True)
    """send metrics to Weights & Biases; without an API key they are stored offline"""
    project: str = free("sgan_dist")
    """name of the W&B project"""


@section("")
class Config:
    """One run."""

    name: Annotated[str, Field(min_length=1)] = free("run")
    """name of the run"""
    run_dir: Place | None = free(None)
    """folder of the run; null: runs/NAME"""
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = setting(0, compare=False)
    """of initial weights, data order, noise and augmentation (`data.label_seed` draws the labels)"""
    data: DataConfig = setting(DataConfig)
    batch: BatchConfig = setting(BatchConfig)
    stream: StreamConfig = setting(StreamConfig)
    remote: RemoteConfig = setting(RemoteConfig)
    machine: MachineConfig = setting(MachineConfig)
    model: ModelConfig = setting(ModelConfig)
    loss: LossConfig = setting(LossConfig)
    optim: OptimConfig = setting(OptimConfig)
    train: TrainConfig = setting(TrainConfig)
    augment: AugmentConfig = setting(AugmentConfig)
    teacher_augment: TeacherAugmentConfig = semi_supervised(TeacherAugmentConfig)
    ema: EmaConfig = setting(EmaConfig)
    checkpoint: CheckpointConfig = setting(CheckpointConfig)
    tracking: TrackingConfig = setting(TrackingConfig)

    def __post_init__(self) -> None:
        for key, value, used in (
            ("batch.unlabeled", self.batch.unlabeled, not self.train.supervised_only),
            ("batch.fake", self.batch.fake, self.uses_generator),
            ("optim.generator_lr", self.optim.generator_lr, self.uses_generator),
        ):
            if used and value == 0:
                raise UserError(f"{key} is {value}, and must be positive in a run that uses it")

    @property
    def directory(self) -> Path:
        """The run directory."""
        return Path(self.run_dir or f"runs/{self.name}")

    @property
    def uses_generator(self) -> bool:
        """Whether there is a G, and with it the real/fake terms."""
        return self.model.generator is not None and not self.train.supervised_only

    @property
    def uses_consistency(self) -> bool:
        """Whether D is trained on targets of the averaged D."""
        return self.loss.consistency > 0 and not self.train.supervised_only

    @property
    def batches(self) -> dict[str, int]:
        """Split -> images per step over all ranks, of the splits that are trained on."""
        if self.train.supervised_only:
            return {"labeled": self.batch.labeled}
        return {"labeled": self.batch.labeled, "unlabeled": self.batch.unlabeled}
