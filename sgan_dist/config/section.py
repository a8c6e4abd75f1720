"""What all sections of the config share: validation, and the rules of a setting."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar, dataclass_transform

from pydantic import ConfigDict, ValidationError
from pydantic.dataclasses import dataclass

from sgan_dist.config.names import unknown
from sgan_dist.errors import UserError

T = TypeVar("T")
STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
NONE = object()  # no value
WORDING = {  # pydantic's -> ours
    "Input should ": "must ",
    "String should ": "must ",
    "must be greater than or equal to 0": "must not be negative",
    "must be greater than 0": "must be positive",
    "must be less than or equal to": "must be at most",
    "must be less than": "must be below",
}


@dataclasses.dataclass(frozen=True)
class Rules:
    """What the program knows about a setting besides its type."""

    free: bool = False
    """the starts of one run directory may differ in it"""
    compare: bool = True
    """runs that differ in it are different rows of a table"""
    supervised: bool = True
    """it has an effect on a supervised-only run"""
    before: Any = NONE
    """the value that reproduces runs made before it existed; without one they cannot be resumed"""


def setting(default: Any, **rules: Any) -> Any:
    """Returns a field of a section with its `Rules`; `default` may be a function that makes it."""
    kind = "default_factory" if callable(default) else "default"
    return dataclasses.field(**{kind: default}, metadata={"rules": Rules(**rules)})


@dataclass_transform(frozen_default=True, kw_only_default=True)
def section(prefix: str) -> Callable[[type[T]], type[T]]:
    """Makes a class a frozen dataclass; a wrong value raises a UserError that names `prefix.field`.

    Types are strict: no text for a number, no fraction for an integer, no NaN.
    """

    def decorate(cls: type[T]) -> type[T]:
        made: Any = dataclass(cls, frozen=True, kw_only=True, config=STRICT)
        validate = made.__init__

        @functools.wraps(validate)
        def construct(self: T, **values: Any) -> None:
            try:
                validate(self, **values)
            except ValidationError as error:
                names = [prefix + field.name for field in dataclasses.fields(made)]
                raise UserError(
                    "; ".join(_sentence(prefix, names, p) for p in error.errors())
                ) from None

        made.__init__ = construct
        return made  # type: ignore[no-any-return]

    return decorate


def _sentence(prefix: str, names: list[str], problem: Any) -> str:
    key = prefix + ".".join(map(str, problem["loc"]))
    if problem["type"] == "unexpected_keyword_argument":
        return unknown(key, names)
    rule = problem["msg"]
    for wording, short in WORDING.items():
        rule = rule.replace(wording, short)
    return f"{key} is {problem['input']!r}, and {rule}"
