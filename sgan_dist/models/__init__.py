"""The networks by name, and how a config's names become networks."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from torch import nn

from sgan_dist.errors import UserError
from sgan_dist.models.book import BookDiscriminator, BookGenerator
from sgan_dist.models.conv_small import ConvSmallDiscriminator
from sgan_dist.models.dcgan import DCGANDiscriminator, DCGANGenerator
from sgan_dist.models.mlp import MLPDiscriminator, MLPGenerator

DISCRIMINATORS: dict[str, type[nn.Module]] = {
    "book": BookDiscriminator,
    "conv_small": ConvSmallDiscriminator,
    "dcgan": DCGANDiscriminator,
    "mlp": MLPDiscriminator,
}
GENERATORS: dict[str, type[nn.Module]] = {
    "book": BookGenerator,
    "dcgan": DCGANGenerator,
    "mlp": MLPGenerator,
}


def build_discriminator(
    name: str, image_shape: tuple[int, int, int], outputs: int, args: dict[str, Any]
) -> nn.Module:
    """The discriminator `name` for images (C, H, W) with `outputs` logits.

    Raises:
        UserError: unknown name, a module that can't be imported, or arguments it doesn't take.
    """
    found = _find("model.discriminator", name, DISCRIMINATORS)
    return _build("model.discriminator", found, args, image_shape=image_shape, outputs=outputs)


def build_generator(
    name: str, image_shape: tuple[int, int, int], args: dict[str, Any]
) -> nn.Module:
    """The generator `name` for images (C, H, W); raises as `build_discriminator` does."""
    found = _find("model.generator", name, GENERATORS)
    return _build("model.generator", found, args, image_shape=image_shape)


def _find(key: str, name: str, known: dict[str, type[nn.Module]]) -> type[nn.Module]:
    if name in known:
        return known[name]
    if ":" not in name:
        raise UserError(
            f"{key} is {name!r}: take one of {', '.join(known)}, or name your own as module:Class"
        )
    module, _, attribute = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:  # scripts have their own folder there, not the user's
        sys.path.append(here)
    try:
        return getattr(importlib.import_module(module), attribute)  # type: ignore[no-any-return]
    except Exception as error:
        raise UserError(
            f"{key} is {name!r}, which can't be imported ({error!r}): is it right, and in this folder"
            " or on PYTHONPATH?"
        ) from error


def _build(key: str, found: type[nn.Module], args: dict[str, Any], **shape: Any) -> nn.Module:
    try:
        return found(**shape, **args)
    except (TypeError, ValueError) as error:
        raise UserError(f"{key}_args do not fit {found.__name__}: {error}") from error
