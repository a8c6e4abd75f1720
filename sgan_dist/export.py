"""The classifier on its own: the averaged D as one safetensors file that says how to rebuild it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from sgan_dist.config import Config
from sgan_dist.data.index import DatasetIndex
from sgan_dist.errors import UserError
from sgan_dist.models import build_discriminator
from sgan_dist.networks import outputs


def save_classifier(path: Path, network: nn.Module, config: Config, index: DatasetIndex) -> None:
    """Writes the weights with all that `load_classifier` needs."""
    height, width, channels = index.image_shape
    about = {
        "discriminator": config.model.discriminator,
        "discriminator_args": config.model.discriminator_args,
        "image_shape": [channels, height, width],
        "outputs": outputs(config, len(index.class_names)),
        "form": config.loss.form,
        "class_names": list(index.class_names),
    }
    tensors = {
        key: value.detach().cpu().contiguous() for key, value in network.state_dict().items()
    }
    try:
        save_file(tensors, path, metadata={"sgan_dist": json.dumps(about)})
    except SafetensorError as error:  # what it makes of an OSError
        raise UserError(f"can't write {path}: {error}") from error


def load_classifier(path: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The network in eval mode, and what is known of it: form, class_names, image_shape (C, H, W)."""
    if not path.is_file():
        raise UserError(f"{path} is not there: the run has not finished, or is not a run")
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads(file.metadata()["sgan_dist"])
    except (OSError, SafetensorError, TypeError, KeyError) as error:
        raise UserError(f"{path} is not a classifier of sgan_dist: {error}") from error
    network = build_discriminator(
        about["discriminator"],
        tuple(about["image_shape"]),
        about["outputs"],
        about["discriminator_args"],
    )
    state = load_file(path)
    network.to(next(iter(state.values())).dtype).load_state_dict(state)
    return network.eval(), about
