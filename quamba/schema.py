"""Reading dataclasses from plain JSON or YAML, with errors that name the key and the nearest valid one."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from typing import Any, TypeVar

from quamba.errors import RecipeError

T = TypeVar("T")


def read_dataclass(cls: type[T], data: Any, where: str) -> T:
    """Build a (nested) dataclass from plain JSON or YAML. Unknown keys are refused with the nearest valid name."""
    if not isinstance(data, dict):
        raise RecipeError(f"{where} must be a mapping, not {type(data).__name__}")
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for key in data:
        if key not in names:
            raise RecipeError(f"unknown key {where}.{key}{nearest(key, names)}")
    missing = [
        f.name
        for f in dataclasses.fields(cls)  # type: ignore[arg-type]
        if f.name not in data and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise RecipeError(f"{where} lacks {', '.join(missing)}")
    return cls(**{key: _read_value(hints[key], value, f"{where}.{key}") for key, value in data.items()})


def _read_value(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):  # X | None
        return None if value is None else _read_value(args[0], value, where)
    if dataclasses.is_dataclass(hint):
        return read_dataclass(hint, value, where)  # type: ignore[arg-type]
    if origin is tuple:
        if not isinstance(value, list):
            raise RecipeError(f"{where} must be a list, not {type(value).__name__}")
        return tuple(_read_value(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise RecipeError(f"{where} must be a mapping, not {type(value).__name__}")
        return {k: _read_value(args[1], v, f"{where}.{k}") for k, v in value.items()}
    if hint in (int, str, bool, float):
        good = isinstance(value, hint) or (hint is float and isinstance(value, int))
        if not good or (hint is not bool and isinstance(value, bool)):
            raise RecipeError(f"{where} must be {hint.__name__}, not {value!r}")
    return value


def nearest(key: str, names: typing.Iterable[str]) -> str:
    names = list(names)
    near = difflib.get_close_matches(str(key), names, n=1)
    return f": did you mean {near[0]!r}?" if near else f": the keys here are {', '.join(names)}"


def choice(what: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        hint = nearest(value, allowed) if isinstance(value, str) else f": choose one of {', '.join(map(str, allowed))}"
        raise RecipeError(f"{what} can't be {value!r}{hint}")
