"""The networks by name, and how a config's names become networks."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from sgan_dist.errors import UserError
from sgan_dist.gan.models.base import CHW
from sgan_dist.gan.models.conv_small import ConvSmallDiscriminator
from sgan_dist.gan.models.dcgan import DCGANDiscriminator, DCGANGenerator
from sgan_dist.gan.models.mlp import MLPDiscriminator, MLPGenerator
from sgan_dist.gan.models.tutorial import TutorialDiscriminator, TutorialGenerator

DISCRIMINATORS: dict[str, type[nn.Module]] = {
    "tutorial": TutorialDiscriminator,
    "conv_small": ConvSmallDiscriminator,
    "dcgan": DCGANDiscriminator,
    "mlp": MLPDiscriminator,
}
GENERATORS: dict[str, type[nn.Module]] = {
    "tutorial": TutorialGenerator,
    "dcgan": DCGANGenerator,
    "mlp": MLPGenerator,
}


def build_discriminator(name: str, image_chw: CHW, outputs: int, args: dict[str, Any]) -> nn.Module:
    """Returns the discriminator `name` for images (C, H, W) with `outputs` logits.

    Raises:
        UserError: an unknown name, a missing module, or arguments that the class does not take.
    """
    cls = _find("model.discriminator", name, DISCRIMINATORS)
    return _build("model.discriminator", cls, args, image_chw=image_chw, outputs=outputs)


def build_generator(name: str, image_chw: CHW, args: dict[str, Any]) -> nn.Module:
    """Returns the generator `name` for images (C, H, W); raises as `build_discriminator` does."""
    cls = _find("model.generator", name, GENERATORS)
    return _build("model.generator", cls, args, image_chw=image_chw)


def describe() -> str:
    """Returns the known networks with the arguments that a config can set, for --help."""
    lines = []
    for key, known in (("discriminator", DISCRIMINATORS), ("generator", GENERATORS)):
        lines += [f"model.{key}, with the defaults of model.{key}_args:"]
        for name, cls in known.items():
            parameters = inspect.signature(cls).parameters.values()
            args = [f"{p.name}={p.default}" for p in parameters if p.default is not p.empty]
            lines.append(f"  {name:<12}{' '.join(args)}")
    lines.append("your own: module:Class, found in this folder or on PYTHONPATH;")
    lines.append("  sgan_dist.gan.models.base says what it must take and return")
    return "\n".join(lines)


def _find(key: str, name: str, known: dict[str, type[nn.Module]]) -> type[nn.Module]:
    if name in known:
        return known[name]
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise UserError(
            f"{key} is {name!r}: take one of {', '.join(known)}, or name your own as module:Class"
        )
    folder = str(Path.cwd())
    if folder not in sys.path:  # commands have no folder of the user's there
        sys.path.append(folder)
    try:
        with _generators_restored():
            module = importlib.import_module(module_name)
    except SystemExit as error:
        file = getattr(importlib.util.find_spec(module_name.partition(".")[0]), "origin", None)
        raise UserError(
            f"{key} is {name!r}, and {file} ends the program when it is imported (exit {error.code}):"
            " it may parse the command line; put such code under `if __name__ == '__main__':`"
        ) from error
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):
            raise  # a module that the user's own one imports
        raise UserError(
            f"{key} is {name!r}, and there is no module {error.name}: check the name, and that it is"
            " in this folder or on PYTHONPATH"
        ) from error
    cls = getattr(module, attribute, None)
    if not callable(cls):
        file = getattr(module, "__file__", "built in")
        raise UserError(
            f"{key} is {name!r}, and {module_name} has no class {attribute}: it is {file}; if that is"
            " not your file, rename yours"
        )
    return cls  # type: ignore[no-any-return]


@contextlib.contextmanager
def _generators_restored() -> Iterator[None]:
    """Restores the random generators: a module that seeds at import would make all seeds the same."""
    numpy_state, python_state = np.random.get_state(), random.getstate()
    with torch.random.fork_rng(devices=[]):  # a run seeds those of GPUs later
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)


def _build(key: str, cls: type[nn.Module], args: dict[str, Any], **shape: Any) -> nn.Module:
    try:
        inspect.signature(cls).bind(**shape, **args)
    except TypeError as error:
        raise UserError(f"{key}_args do not fit {cls.__name__}: {error}") from error
    return cls(**shape, **args)  # an error in here is the network's own, and keeps its traceback
