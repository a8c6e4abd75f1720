"""The classifier on its own: the averaged D, and its file, which has all that is needed to use it."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from sgan_dist.config import RENAMED_NETWORKS, Config
from sgan_dist.data.index import DatasetIndex
from sgan_dist.errors import UserError
from sgan_dist.files import write_whole
from sgan_dist.gan import losses
from sgan_dist.gan.networks import DiscriminatorSpec
from sgan_dist.gan.pixels import SCALING, PixelScaling, images_to_float


@dataclass(frozen=True)
class Classifier:
    """A discriminator as a classifier of uint8 images."""

    network: nn.Module
    spec: DiscriminatorSpec
    class_names: tuple[str, ...]
    form: losses.Form
    scaling: PixelScaling = SCALING

    @classmethod
    def of(cls, network: nn.Module, config: Config, index: DatasetIndex) -> Classifier:
        """`network` as a run of `config` on the dataset `index` trains it."""
        spec = DiscriminatorSpec.of(config, index.image_hwc, len(index.class_names))
        return cls(network, spec, tuple(index.class_names), config.loss.form)

    @classmethod
    def from_state(cls, state: dict[str, Any], config: Config, index: DatasetIndex) -> Classifier:
        """The same with a new network, in eval mode, that holds the weights `state`."""
        spec = DiscriminatorSpec.of(config, index.image_hwc, len(index.class_names))
        return cls.of(_network(spec, state), config, index)

    @property
    def image_chw(self) -> tuple[int, int, int]:
        """Channels, height and width of its images."""
        return self.spec.image_chw

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def log_probabilities(self, images: Tensor) -> Tensor:
        """log p(class | image, real), (n, N), at least fp32; images uint8 (n, H, W, C)."""
        dtype = next(self.network.parameters()).dtype
        logits = self.network(images_to_float(images, self.device, dtype, self.scaling)).logits
        return losses.class_logits(logits, self.form).log_softmax(1)

    @torch.no_grad()
    def predict(self, images: Tensor | NDArray[Any]) -> Tensor:
        """Class probabilities, fp32 (n, N), of images uint8 (n, H, W, C), in one batch.

        The result lies on the network's device: move that with `classifier.network.to("cuda")`.

        Raises:
            UserError: the images have another type or shape.
        """
        images = torch.as_tensor(images)
        channels, height, width = self.image_chw
        if images.dtype != torch.uint8 or images.shape[1:] != (height, width, channels):
            raise UserError(
                f"images are {images.dtype} {tuple(images.shape)}, and this classifier takes"
                f" torch.uint8 (n, {height}, {width}, {channels}): pixels from 0 to 255, channels last"
            )
        return self.log_probabilities(images).exp().float()


def save_classifier(path: Path, classifier: Classifier) -> None:
    """Writes weights and metadata; in the metadata is all that `load_classifier` needs.

    Raises:
        UserError: the file cannot be written.
    """
    about = {
        **dataclasses.asdict(classifier.spec),
        "form": classifier.form,
        "class_names": classifier.class_names,
        "scaling": dataclasses.asdict(classifier.scaling),  # x = pixel / divisor + offset
    }
    state = classifier.network.state_dict()
    # a copy each: tied weights lie in the file under each of their names
    tensors = {
        k: v.detach().cpu().clone(memory_format=torch.contiguous_format)
        for k, v in state.items()
        if isinstance(v, Tensor)
    }
    if extra_state := {key: value for key, value in state.items() if key not in tensors}:
        about["extra_state"] = extra_state
    try:
        write_whole(path, save(tensors, {"sgan_dist": json.dumps(about)}))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def load_classifier(path: str | os.PathLike[str]) -> Classifier:
    """The classifier of a finished run, RUN/classifier.safetensors, on the CPU and in eval mode.

        classifier = load_classifier("runs/digits/classifier.safetensors")
        probabilities = classifier.predict(images)  # uint8 (n, H, W, C) -> fp32 (n, N)

    Raises:
        UserError: the file is missing, or is not a classifier of sgan_dist.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no {path}: the run is not finished, or this is not a run")
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads(file.metadata()["sgan_dist"])
    except (OSError, SafetensorError, TypeError, KeyError) as error:
        raise UserError(f"{path} is not a classifier of sgan_dist: {error}") from error
    spec = DiscriminatorSpec(
        RENAMED_NETWORKS.get(about["discriminator"], about["discriminator"]),
        about["discriminator_args"],
        tuple(about["image_chw"] if "image_chw" in about else about["image_shape"]),
        about["outputs"],
    )
    scaling = PixelScaling(**about["scaling"]) if "scaling" in about else SCALING
    network = _network(spec, load_file(path) | about.get("extra_state", {}))
    return Classifier(network, spec, tuple(about["class_names"]), about["form"], scaling)


def _network(spec: DiscriminatorSpec, state: dict[str, Any]) -> nn.Module:
    tensors = (value for value in state.values() if isinstance(value, Tensor))
    network = spec.build().to(next(value.dtype for value in tensors if value.is_floating_point()))
    network.load_state_dict(state)
    return network.eval()
