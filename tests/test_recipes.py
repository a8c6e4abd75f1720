"""The shipped configs: each loads, has its file's name, and its networks can be built."""

from __future__ import annotations

from pathlib import Path

import pytest

from sgan_dist.config import load_config, parse
from sgan_dist.gan.models import build_discriminator, build_generator
from tests.ranks import REPOSITORY

CONFIGS = sorted((REPOSITORY / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_loads_and_builds(path: Path) -> None:
    config = parse([f"--config={path}"])
    assert config.name == path.stem
    model = config.model
    build_discriminator(model.discriminator, (1, 28, 28), 10, model.discriminator_args)
    if model.generator is not None:
        build_generator(model.generator, (1, 28, 28), model.generator_args)


@pytest.mark.parametrize("recipe", ["digits", "mnist", "fashion_mnist"])
def test_the_supervised_recipe_has_the_same_data_discriminator_and_augmentation(
    recipe: str,
) -> None:
    full, supervised = load_config(recipe), load_config(f"{recipe}_supervised")
    assert full.data == supervised.data
    assert full.augment == supervised.augment and full.optim == supervised.optim
    assert full.model.discriminator == supervised.model.discriminator
    assert full.model.discriminator_args == supervised.model.discriminator_args
    assert full.machine.precision == supervised.machine.precision
    assert supervised.train.supervised_only and not full.train.supervised_only


@pytest.mark.parametrize("recipe", ["mnist", "fashion_mnist"])
def test_the_supervised_recipe_is_trained_for_as_long(recipe: str) -> None:
    assert load_config(recipe).train.steps == load_config(f"{recipe}_supervised").train.steps
