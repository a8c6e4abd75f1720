"""Settings by dotted key: which decide a run's result, may change at resume, or tell runs apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from pydantic_core import to_jsonable_python

from sgan_dist.config.names import unknown, upgrade
from sgan_dist.config.section import NONE, Rules
from sgan_dist.config.settings import Config
from sgan_dist.errors import UserError

SECTIONS: dict[str, Any] = {}
SETTINGS: dict[str, Rules] = {}
for top in dataclasses.fields(Config):
    rules = top.metadata.get("rules", Rules())
    if top.default_factory is dataclasses.MISSING:
        SETTINGS[top.name] = rules
        continue
    SECTIONS[top.name] = top.default_factory
    for field in dataclasses.fields(SECTIONS[top.name]):
        own = field.metadata.get("rules", Rules())
        # a section may be without effect on supervised-only runs as a whole
        own = dataclasses.replace(own, supervised=own.supervised and rules.supervised)
        SETTINGS[f"{top.name}.{field.name}"] = own
# What may change between the starts of one run directory: how long, where and how often, never what.
FREE_AT_RESUME = {key for key, rules in SETTINGS.items() if rules.free}
BEFORE = {key: rules.before for key, rules in SETTINGS.items() if rules.before is not NONE}
# What does not make different rows in a table of runs, such as the seed.
POOLED = {key for key, rules in SETTINGS.items() if not rules.compare}


def build(values: Mapping[str, Any]) -> Config:
    """Returns the config of values by dotted key; settings left out have their defaults.

    Raises:
        UserError: an unknown key, or a wrong value.
    """
    nested: dict[str, dict[str, Any]] = {"": {}}
    for key, value in values.items():
        if key not in SETTINGS:
            raise UserError(unknown(key, SETTINGS))
        section, _, name = key.rpartition(".")
        nested.setdefault(section, {})[name] = value
    top = nested.pop("")
    return Config(**top, **{name: SECTIONS[name](**inner) for name, inner in nested.items()})


def flatten(config: Config) -> dict[str, Any]:
    """Returns dotted key -> value, as JSON would hold it."""
    return dotted(to_jsonable_python(config))


def dotted(nested: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `nested` without its outer dicts: `{"train": {"steps": 9}}` as `{"train.steps": 9}`."""
    values: dict[str, Any] = {}
    for name, value in nested.items():
        if isinstance(value, dict):
            values |= {f"{name}.{inner}": item for inner, item in value.items()}
        else:
            values[str(name)] = value
    return values


def result_settings(config: Config) -> dict[str, Any]:
    """Returns dotted key -> value of all that decides what a run computes; compared at resume."""
    semi_supervised = not config.train.supervised_only
    return {
        key: value
        for key, value in flatten(config).items()
        if not SETTINGS[key].free and (SETTINGS[key].supervised or semi_supervised)
    }


def resumable(config: Config, saved: Mapping[str, Any]) -> tuple[Config, dict[str, Any]]:
    """Prepares the comparison with a checkpoint's settings, which an older version may have written.

    Returns:
        `config` with each setting that was added since, where it has its default, at the value that
        reproduces the older version; and the checkpoint's settings under the current names.

    Raises:
        UserError: the checkpoint depends on a setting that was removed, or that did not exist.
    """
    values, removed = upgrade(saved)
    for key, value in removed.items():
        raise UserError(
            f"the checkpoint was made with {key} {value}, and {unknown(key, ())}; its run can be"
            " evaluated but not continued: start again with another --run_dir"
        )
    for key in values.keys() - SETTINGS.keys() - {"data_fingerprint", "random_version"}:
        raise UserError(
            f"the checkpoint was made by a newer version, which has a setting {key}: install that"
            " version, or start again with another --run_dir"
        )
    defaults, current = flatten(Config()), flatten(config)
    for key in result_settings(config).keys() - values.keys():
        if values.get("train.supervised_only") and not SETTINGS[key].supervised:
            continue
        if key not in BEFORE:
            raise UserError(
                f"the checkpoint was made before {key} existed, and no value of it reproduces that"
                " version: start again with another --run_dir"
            )
        values[key] = BEFORE[key]
        if current[key] == defaults[key]:
            current[key] = BEFORE[key]
    return build(current), values
