"""Recipes by name, and overrides of their fields from the command line.

`--config=tiny --config.train.eta=0.3`: `configs/tiny.py` (or a path to such a file), then any field
by its dotted path.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from mdpo_jax.config import Config, ConfigError
from mdpo_jax.smoke import smoke


def recipe_folder() -> Path:
    """Where recipes lie: `configs/` of the checkout, or inside an installed wheel."""
    packaged = Path(__file__).parent / "configs"
    return packaged if packaged.is_dir() else Path(__file__).parent.parent / "configs"


def load_recipe(name: str) -> Config:
    """The `Config` of `configs/NAME.py` (or of a path to such a file)."""
    known = sorted(p.stem for p in recipe_folder().glob("*.py") if not p.stem.startswith("_"))
    path = Path(name) if name.endswith(".py") else recipe_folder() / f"{name}.py"
    if not path.is_file():
        raise ConfigError(
            f"--config={name}: unknown recipe{_closest(name, known)}; known: {', '.join(known)}"
        )
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"--config={name}: {path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
    except ConfigError:
        raise
    except Exception as error:  # a recipe is anybody's Python
        raise ConfigError(f"--config={name}: {path}: {type(error).__name__}: {error}") from error
    if not isinstance(config, Config):
        raise ConfigError(
            f"--config={name}: get_config() gave a {type(config).__name__}; expected a Config"
        )
    return config


def parse(arguments: Sequence[str]) -> Config:
    """A recipe and its overrides from `--config=NAME [--smoke] --config.a.b=V ...`.

    Overrides come after `--smoke` has shrunk the recipe.  Raises ConfigError.
    """
    names = [a.removeprefix("--config=") for a in arguments if a.startswith("--config=")]
    if len(names) != 1:
        raise ConfigError(f"--config: given {len(names)} times; expected --config=NAME once")
    config = load_recipe(names[0])
    if "--smoke" in arguments:
        config = smoke(config)
    overrides: list[tuple[str, str]] = []
    for argument in arguments:
        if not argument.startswith("--config=") and argument != "--smoke":
            overrides.append(override(argument))
    return overridden(config, overrides) if overrides else config


def override(argument: str) -> tuple[str, str]:
    """The dotted path and the value of a `--config.FIELD=VALUE`."""
    path, equals, value = argument.removeprefix("--config.").partition("=")
    if not argument.startswith("--config.") or not equals:
        raise ConfigError(f"{argument}: unknown argument; expected --config.FIELD=VALUE")
    return path, value


def overridden(config: Config, overrides: Sequence[tuple[str, str]]) -> Config:
    """`config` with fields, by their dotted paths, replaced by parsed values.

    Validated once, as a whole: the order of overrides does not matter.
    """
    fields = config.as_dict()
    for path, value in overrides:
        _set(fields, type(config), path, value, path)
    return from_dict(fields, type(config))


def _set(fields: dict[str, Any], kind: Any, path: str, value: str, whole: str) -> None:
    head, _, rest = path.partition(".")
    hints = typing.get_type_hints(kind)
    if head not in hints:
        raise ConfigError(
            f"--config.{whole}: unknown field {head!r} of {kind.__name__}"
            f"{_closest(head, list(hints))}"
        )
    if dataclasses.is_dataclass(hints[head]):
        if not rest:
            known = ", ".join(f.name for f in dataclasses.fields(hints[head]))
            raise ConfigError(f"--config.{whole}={value}: {head} is a section; fields: {known}")
        _set(fields[head], hints[head], rest, value, whole)
        return
    if rest:
        raise ConfigError(f"--config.{whole}: {head} has no field {rest!r}; it is a single value")
    try:
        fields[head] = _convert(hints[head], value)
    except ValueError as error:
        raise ConfigError(f"--config.{whole}={value}: expected {error}") from None


def describe(config: Any, prefix: str = "--config.") -> list[tuple[str, str, str]]:
    """(flag, type, value) of every field, for `--help`."""
    rows = []
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            rows += describe(value, f"{prefix}{field.name}.")
        else:
            rows.append((f"{prefix}{field.name}", _expected(hints[field.name]), repr(value)))
    return rows


def from_dict(fields: dict[str, Any], kind: Any = Config) -> Any:
    """The inverse of `Config.as_dict`; raises ConfigError for a field that `kind` has not got."""
    hints = typing.get_type_hints(kind)
    values = {}
    for name, value in fields.items():
        if name not in hints:
            raise ConfigError(f"config.{name}: unknown field of {kind.__name__}")
        if dataclasses.is_dataclass(hints[name]):
            value = from_dict(value, hints[name])
        values[name] = tuple(value) if isinstance(value, list) else value
    return kind(**values)


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of the fields in which two configurations (as dicts) differ."""
    out = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            out += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            out.append(f"{prefix}{key}: {a!r} -> {b!r}")
    return out


def _closest(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _expected(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    if typing.get_origin(hint) is tuple:
        return f"comma-separated {_expected(typing.get_args(hint)[0])}s"
    if isinstance(hint, types.UnionType):
        return " or ".join(_expected(a) for a in typing.get_args(hint))
    return {bool: "true or false", types.NoneType: "none"}.get(hint) or hint.__name__


def _convert(hint: Any, text: str) -> Any:
    """`text` as a value of type `hint`; ValueError carries what was expected."""
    expected = ValueError(_expected(hint))
    if isinstance(hint, types.UnionType):
        if text.lower() == "none" and types.NoneType in typing.get_args(hint):
            return None
        return _convert(next(a for a in typing.get_args(hint) if a is not types.NoneType), text)
    if typing.get_origin(hint) is Literal:
        if text not in typing.get_args(hint):
            raise expected
        return text
    if typing.get_origin(hint) is tuple:
        inner = typing.get_args(hint)[0]
        try:
            return tuple(_convert(inner, part) for part in text.split(",") if part)
        except ValueError:
            raise expected from None
    if hint is bool:
        if text.lower() not in ("true", "false"):
            raise expected
        return text.lower() == "true"
    if hint in (int, float):
        try:
            number = hint(text)
        except ValueError:
            raise expected from None
        if number != number or number in (float("inf"), float("-inf")):
            raise ValueError("a finite number")
        return number
    return text
