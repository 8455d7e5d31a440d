"""Checks of configuration values; an error names the field, the value and what is accepted."""

from __future__ import annotations

from typing import Any


class HostsGone(RuntimeError):
    """Another process of the run ended; the same commands go on from the files."""


class ConfigError(ValueError):
    """A wrong configuration; the message names the field, the value and what is accepted."""


def require(ok: bool, field: str, value: object, accepted: str) -> None:
    """ConfigError unless `ok`."""
    if not ok:
        raise ConfigError(f"config.{field}={value!r}: expected {accepted}")


def at_least(least: int, section: str, values: Any, *names: str) -> None:
    """Fields of `values` that have a least value."""
    for name in names:
        value = getattr(values, name)
        require(value >= least, f"{section}.{name}", value, f"at least {least}")


def above_zero(section: str, values: Any, *names: str) -> None:
    """Fields of `values` that are positive."""
    for name in names:
        value = getattr(values, name)
        require(value > 0, f"{section}.{name}", value, "more than 0")


def share(section: str, values: Any, *names: str) -> None:
    """Fields of `values` that are shares."""
    for name in names:
        value = getattr(values, name)
        require(0 <= value <= 1, f"{section}.{name}", value, "a number from 0 to 1")
