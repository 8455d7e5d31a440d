"""A layer's cache of keys and values: every token, or a ring of the last window's.

    all    slot s holds position s            | 0 1 2 3 4 5 . . |
    ring   slot s holds the last position     | 8 9 6 7 |           4 slots, 10 tokens so far
           that is s modulo the slots

Keys lie as [R, G, K, S], so that scores read them without a transposition, values as [R, G, S, K].
Suffixes: R rows, T new tokens, G key heads, K head_dim, S slots.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from mdpo_jax.model.families import ModelConfig
from mdpo_jax.model.sharding import constrain

Layer = dict[str, jax.Array]
Cache = tuple[Layer, ...]


class Attended(NamedTuple):
    """What a layer's queries see: keys, values, and the position that each slot holds (or < 0)."""

    keys: jax.Array
    values: jax.Array
    places: Int[Array, "rows_or_1 slots"]


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["lengths", "new"], meta_fields=["width"]
)
@dataclasses.dataclass(frozen=True)
class Span:
    """Where new tokens go: row r has lengths[r] tokens and gets new[r] of the `width` given."""

    lengths: Int[Array, " rows"]
    new: Int[Array, " rows"]
    width: int

    @property
    def positions(self) -> Int[Array, "rows width"]:
        """Of each given token, padding included."""
        return self.lengths[:, None] + jnp.arange(self.width)


def init(
    config: ModelConfig, rows: int, length: int, window: int | None, dtype: Any, slack: int = 0
) -> Layer:
    """An empty cache of one layer.

    slack: how many tokens may be taken back, `Span.lengths` being less than what was written; a ring
    must then still hold the window before them.
    """
    slots = length if window is None else min(length, window + slack)
    heads, k = config.num_kv_heads, config.head_dim
    return {
        "keys": jnp.zeros((rows, heads, k, slots), dtype),
        "values": jnp.zeros((rows, heads, slots, k), dtype),
    }


def append(
    layer: Layer, k_RTGK: jax.Array, v_RTGK: jax.Array, span: Span, window: int | None
) -> tuple[Attended, Layer]:
    """Writes new keys and values; returns what their queries see, and the layer's cache.

    Beyond the end of a cache that is no ring, tokens are dropped.
    """
    slots = layer["values"].shape[2]
    if window is None or slots < window:
        written = _write(layer, k_RTGK, v_RTGK, span, span.positions)
        places = jnp.arange(slots)[None]
        return Attended(written["keys"], written["values"], places), written
    steps_T = jnp.arange(span.width)
    # Of more new tokens than slots only the last are kept.
    kept = steps_T >= span.new[:, None] - slots
    written = _write(layer, k_RTGK, v_RTGK, span, span.positions % slots, kept)
    if span.width == 1:
        # The key that a token overwrites is the one that has just left its window.
        places = _ring_places(span.lengths + span.new, slots)
        return Attended(written["keys"], written["values"], places), written
    # The first of several new tokens still sees keys that the last ones overwrite.
    keys = jnp.concatenate([layer["keys"], _like(k_RTGK, layer).transpose(0, 2, 3, 1)], axis=3)
    values = jnp.concatenate([layer["values"], _like(v_RTGK, layer).transpose(0, 2, 1, 3)], axis=2)
    places = jnp.concatenate([_ring_places(span.lengths, slots), span.positions], axis=1)
    return Attended(keys, values, places), written


def narrow(cache: Cache, length: int) -> Cache:
    """The first `length` slots of each layer: all there is of rows that hold no more tokens."""
    return tuple(
        {"keys": layer["keys"][..., :length], "values": layer["values"][:, :, :length]}
        for layer in cache
    )


def take(cache: Cache, rows: Int[Array, " taken"], length: int) -> Cache:
    """The first `length` slots of some rows; a row past the end reads the last one."""
    return jax.tree.map(lambda x: jnp.take(x, rows, axis=0, mode="clip"), narrow(cache, length))


def put(cache: Cache, rows: Int[Array, " given"], part: Cache) -> Cache:
    """`part` written over the first slots of `rows`; a row past the end is dropped.

    Slots beyond the part's keep what they hold.
    """

    def one(layer: Layer, given: Layer) -> Layer:
        n = given["values"].shape[2]
        return {
            "keys": layer["keys"].at[rows, :, :, :n].set(given["keys"], mode="drop"),
            "values": layer["values"].at[rows, :, :n].set(given["values"], mode="drop"),
        }

    return tuple(one(*both) for both in zip(cache, part, strict=True))


def widen(cache: Cache, part: Cache) -> Cache:
    """The inverse of `narrow`: `part` in the place of the first slots."""

    def one(whole: jax.Array, given: jax.Array) -> jax.Array:
        if whole.shape == given.shape:
            return given
        return jax.lax.dynamic_update_slice(whole, given, (0, 0, 0, 0))

    return jax.tree.map(one, cache, part)


def _write(
    layer: Layer, k_RTGK: jax.Array, v_RTGK: jax.Array, span: Span, slots_RT: jax.Array,
    kept: Any = True,
) -> Layer:  # fmt: skip
    size, steps_T = layer["values"].shape[2], jnp.arange(span.width)
    real = (steps_T < span.new[:, None]) & kept
    # No two writes meet: rows differ, and so do the slots within a row, dropped ones too.
    slots_RT = jnp.where(real, slots_RT, size + steps_T)
    rows = jnp.arange(len(slots_RT))[:, None]
    how: dict[str, Any] = {"mode": "drop", "unique_indices": True}
    keys = layer["keys"].at[rows, :, :, slots_RT].set(_like(k_RTGK, layer), **how)
    values = layer["values"].at[rows, :, slots_RT].set(_like(v_RTGK, layer), **how)
    # Where a mesh's tensor axis does not divide the key heads, the compiler would deal them as far as
    # it does, and gather the whole cache to give it back.
    return {
        "keys": constrain(keys, None, "kv_heads", None, None),
        "values": constrain(values, None, "kv_heads", None, None),
    }


def _like(x: jax.Array, layer: Layer) -> jax.Array:
    return x.astype(layer["keys"].dtype)


def _ring_places(lengths: jax.Array, slots: int) -> jax.Array:
    """[R S] position that each slot of a ring holds after `lengths` tokens; negative: none yet."""
    last = lengths[:, None] - 1
    return last - (last - jnp.arange(slots)) % slots
