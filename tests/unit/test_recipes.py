"""The configs that are shipped: each loads, says what it is, and its networks can be built."""

from __future__ import annotations

from pathlib import Path

import pytest

from sgan_dist.config import check, parse
from sgan_dist.models import build_discriminator, build_generator
from tests.ranks import REPOSITORY

CONFIGS = sorted((REPOSITORY / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_loads_and_builds(path: Path) -> None:
    config = check(parse([f"--config={path}"])[0])
    assert config.name == path.stem
    model = config.model
    build_discriminator(model.discriminator, (1, 28, 28), 10, model.discriminator_args)
    if model.generator is not None:
        build_generator(model.generator, (1, 28, 28), model.generator_args)


@pytest.mark.parametrize("recipe", ["mnist", "fashion_mnist"])
def test_the_supervised_recipe_is_the_best_ones_discriminator_and_augmentation(recipe: str) -> None:
    best, alone = (
        check(parse([f"--config={REPOSITORY}/configs/{name}.yaml"])[0])
        for name in (recipe, f"{recipe}_supervised")
    )
    assert best.augment == alone.augment and best.optim == alone.optim
    assert best.model.discriminator == alone.model.discriminator
    assert best.model.discriminator_args == alone.model.discriminator_args
    assert best.train.steps == alone.train.steps
    assert alone.train.supervised_only
