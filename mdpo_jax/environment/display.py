"""How a notebook shows a value: on one line if it fits, else an item a line.

[1, 2]        [100000000000000000000,
               200000000000000000000]      past 79 columns
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

_WIDTH = 79
_MOST_ITEMS = 1000
_BRACKETS = {
    list: ("[", "]"), tuple: ("(", ")"), set: ("{", "}"), frozenset: ("frozenset({", "})"),
    dict: ("{", "}"),
}  # fmt: skip


class _Group(NamedTuple):
    """A container; `items` are pairs of the key that stands before a value, and the value.

    flat: its text on one line.
    """

    open: str
    items: list[tuple[str, Any]]
    close: str
    flat: str


def shown(value: Any) -> str:
    """The text of `value`: its `repr`, but built-in containers as IPython lays them out.

    Lists, tuples, sets and dicts that do not fit are broken at every comma, the outermost first;
    sets are sorted; of more than 1,000 items the others are `...`.  IPython's other printers are not
    there (of types, functions, defaultdict), nor does it indent an item of several lines here, nor
    break a dict's key.
    """
    try:
        return "".join(_laid_out(_grouped(value), 0, 0, 0))
    except RecursionError:  # deep, or it holds itself: repr knows what to do, or fails as it should
        return repr(value)


def _grouped(value: Any) -> _Group | str:
    """A container with its items, else the `repr`; a subclass that has its own has it its way."""
    for kind in _BRACKETS:
        if isinstance(value, kind) and type(value).__repr__ is kind.__repr__:
            break
    else:
        return repr(value)
    if not value and kind in (set, frozenset):
        return repr(value)
    members = _sorted(value) if kind in (set, frozenset) else value
    items: list[tuple[str, Any]] = []
    for member in itertools.islice(members, _MOST_ITEMS):
        key = f"{shown(member)}: " if kind is dict else ""
        items.append((key, _grouped(value[member] if kind is dict else member)))
    if len(value) > _MOST_ITEMS:
        items.append(("", "..."))
    left, right = _BRACKETS[kind]
    right = ",)" if kind is tuple and len(value) == 1 else right
    flat = ", ".join(key + (x if isinstance(x, str) else x.flat) for key, x in items)
    return _Group(left, items, right, left + flat + right)


def _laid_out(value: _Group | str, column: int, indent: int, after: int) -> Iterator[str]:
    """Text that starts in `column`, broken if it and `after` more characters do not fit."""
    if isinstance(value, str):
        yield value
        return
    if column + len(value.flat) + after <= _WIDTH:
        yield value.flat
        return
    yield value.open
    inner = indent + len(value.open)
    column += len(value.open)
    for index, (key, item) in enumerate(value.items):
        last = index == len(value.items) - 1
        if index:
            yield ",\n" + " " * inner
            column = inner
        yield key
        follows = len(value.close) + after if last else 1
        yield from _laid_out(item, column + len(key), inner, follows)
    yield value.close


def _sorted(items: Iterable) -> list:
    """In order if there is one, else in that of their texts."""
    for key in (None, str):
        try:
            return sorted(items, key=key)
        except Exception:  # a value's own comparison may raise whatever it likes
            continue
    return list(items)
