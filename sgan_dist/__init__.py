"""Distributed semi-supervised GAN training: the discriminator is the classifier that is kept.

    from sgan_dist import evaluate, load_config, train

    config = load_config("digits", "--train.steps=200", "--run_dir=runs/example")
    summary = train(config)
    print(summary["test_error"], evaluate("runs/example").error)

Names load lazily: importing this package imports neither torch nor anything else that is heavy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sgan_dist.config import Config, load_config
    from sgan_dist.data.prepare.foreign import index_shards
    from sgan_dist.data.prepare.shards import prepare
    from sgan_dist.data.prepare.splits import Labels
    from sgan_dist.errors import UserError
    from sgan_dist.evaluation.classifier import load_classifier
    from sgan_dist.evaluation.metrics import evaluate_run as evaluate
    from sgan_dist.run.trainer import train

__version__ = "0.1.0"
__all__ = [
    "Config", "Labels", "UserError", "evaluate", "index_shards", "load_classifier", "load_config",
    "prepare", "train",
]  # fmt: skip
_HOMES = {
    "Config": ("sgan_dist.config", "Config"),
    "Labels": ("sgan_dist.data.prepare.splits", "Labels"),
    "UserError": ("sgan_dist.errors", "UserError"),
    "evaluate": ("sgan_dist.evaluation.metrics", "evaluate_run"),
    "index_shards": ("sgan_dist.data.prepare.foreign", "index_shards"),
    "load_classifier": ("sgan_dist.evaluation.classifier", "load_classifier"),
    "load_config": ("sgan_dist.config", "load_config"),
    "prepare": ("sgan_dist.data.prepare.shards", "prepare"),
    "train": ("sgan_dist.run.trainer", "train"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
