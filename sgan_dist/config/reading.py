"""Reading and writing configs: YAML files and dotted command-line overrides.

Precedence: defaults < `--config a.yaml` < `--config b.yaml` < `--optim.lr=1e-3`.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonargparse
import yaml
from pydantic_core import to_jsonable_python

from sgan_dist.config.identity import BEFORE, SETTINGS, build, dotted
from sgan_dist.config.names import unknown, upgrade
from sgan_dist.config.settings import Config
from sgan_dist.errors import UserError

log = logging.getLogger(__name__)
CONFIGS = Path(__file__).parent.parent / "configs"  # a link to the repository's; files in a wheel
jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)


class _ConfigFile(jsonargparse.ActionConfigFile):  # type: ignore[name-defined,misc]
    """Finds recipes by name, and refuses unknown settings."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: Any = None) -> None:
        path = find_config(values)
        keys = dotted(_read(path))
        sentences = [unknown(key, SETTINGS) for key in keys if key not in SETTINGS]
        if sentences:
            raise UserError("; ".join(sentences))
        super().__call__(parser, cfg, str(path), option_string)


class _HelpFormatter(jsonargparse.DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Leaves the lines of the epilog as they are."""


def parse(
    argv: Sequence[str],
    default: str | None = None,
    prog: str = "sgan-dist train",
    epilog: str = "",
) -> Config:
    """Returns the config of a command line.

    Args:
        argv: the words after `prog`.
        default: the --config to read if `argv` names none; see `find_config`.
        prog: the command, for messages.
        epilog: the last lines of --help.

    Raises:
        UserError: an unknown key, or a wrong value.
    """
    parser = jsonargparse.ArgumentParser(
        prog=prog,
        usage=f"{prog} [--config FILE] [--SECTION.SETTING VALUE] ...",
        epilog=epilog,
        formatter_class=_HelpFormatter,
        exit_on_error=False,
        allow_abbrev=False,
    )
    help = "a YAML file, or the name of a recipe; may be given several times"
    parser.add_argument("--config", action=_ConfigFile, help=help)
    parser.add_class_arguments(Config)
    named = any(word == "--config" or word.startswith("--config=") for word in argv)
    layers = [] if named or default is None else [f"--config={default}"]
    try:
        values = parser.parse_args([*layers, *argv]).as_dict()
    except jsonargparse.ArgumentError as error:
        raise UserError(_sentence(" ".join(str(error).split()), prog)) from error
    values.pop("config")
    return build(dotted(values))


def load_config(name: str, *overrides: str) -> Config:
    """Returns a recipe by its path or name, changed by overrides such as `--train.steps=200`.

    Raises:
        UserError: as `parse` does.
    """
    return parse([f"--config={name}", *overrides])


def find_config(name: str) -> Path:
    """Returns a file by its path, or a shipped one by its name: `mnist`, `deepspeed/zero2`."""
    name = os.path.expanduser(name)  # noqa: PTH111 - no shell expands --config=~/x.yaml
    name = name.removeprefix("configs/") if not Path(name).is_file() else name
    shipped = (CONFIGS / f"{name}{suffix}" for suffix in ("", ".yaml", ".json"))
    return next((path for path in (Path(name), *shipped) if path.is_file()), Path(name))


def save(config: Config, path: Path) -> None:
    """Writes `config` as YAML that `load`, and `--config`, read back."""
    path.write_text(yaml.safe_dump(to_jsonable_python(config), sort_keys=False))


def load(path: Path, root: str | None = None) -> Config:
    """Returns the config that `save` wrote, in this version or an older one.

    `root` is another place of its dataset.

    Raises:
        UserError: there is none, or it is damaged.
    """
    if not path.is_file():
        raise UserError(f"{path.parent} is not a run directory: it holds no {path.name}")
    values, removed = upgrade(dotted(_read(path)))
    for key, value in removed.items():
        log.warning(f"{path.parent} was trained with {key} {value}, which no longer exists")
    return build(BEFORE | values | ({} if root is None else {"data.root": root}))


def _read(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_bytes())
    except FileNotFoundError as error:
        recipes = ", ".join(sorted(recipe.stem for recipe in CONFIGS.glob("*.yaml")))
        raise UserError(f"there is no {path}: name a YAML file, or a recipe: {recipes}") from error
    except (OSError, yaml.YAMLError) as error:
        message = " ".join(str(error).split())
        raise UserError(f"bad configuration {path}: {message}") from error
    if not isinstance(values, dict):
        raise UserError(f"bad configuration {path}: it holds no settings")
    return values


def _sentence(message: str, prog: str) -> str:
    """Returns what jsonargparse refuses, in the words in which a config refuses it."""
    argument = re.search(r"unrecognized arguments: --([\w.]+)", message)
    if argument:
        return unknown(argument[1], SETTINGS)
    value = re.search(r'Parser key "([\w.]+)".* value: (.*)', message)
    if value and value[1] in SETTINGS:
        try:
            build({value[1]: yaml.safe_load(value[2])})
        except UserError as error:
            return str(error)
        except yaml.YAMLError:
            return f"{value[1]} is {value[2]}, which is not YAML"
    return f"bad configuration: {message} (see {prog} --help)"
