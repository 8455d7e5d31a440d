"""Jitted sampling over one preallocated cache: extend some slots, decode a block on all of them.

    slot 0 | prompt ......... action ..... observation . action ..      |  lengths[0] tokens held
    slot 1 | prompt .... action .....                                   |  lengths[1]

Both functions take fixed shapes (rows and widths of `extend` are bucketed), so nothing compiles
after warm-up.  The randomness of a token depends on its trajectory's key and its position alone.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mdpo_jax.model import lora, transformer
from mdpo_jax.model.families import ModelConfig

LONGEST_STOP = 32  # bytes of a stop string, and so tokens


class DecodeState(NamedTuple):
    """The device's side of the slots; R slots, V vocabulary.

    cache: see transformer.init_cache.  logits [R V] float32: of each slot's next token.
    lengths [R] int32: tokens in the cache.  keys [R]: the random key of each slot's trajectory.
    """

    cache: Any
    logits: jax.Array
    lengths: jax.Array
    keys: jax.Array


class Block(NamedTuple):
    """What a block of decoding emitted: ids and log_probs [R N], counts [R], on the host."""

    ids: np.ndarray
    log_probs: np.ndarray
    counts: np.ndarray


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Static sizes: slots, cache length, block, and the buckets that `extend` rounds up to."""

    slots: int
    context: int
    block: int
    row_buckets: tuple[int, ...]
    width_buckets: tuple[int, ...]

    @property
    def slack(self) -> int:
        """Tokens that a stop string takes back at most: a block, and those the string began in."""
        return self.block + LONGEST_STOP

    @classmethod
    def make(cls, slots: int, context: int, block: int) -> Shapes:
        """Powers of four for rows, of two for widths, up to the whole."""
        rows = {slots, *(4**i for i in range(1, 12) if 4**i < slots)}
        widths = {context, *(2**i for i in range(5, 20) if 2**i < context)}
        return cls(slots, context, block, tuple(sorted(rows)), tuple(sorted(widths)))


class Sampler:
    """The sampling policy on the device.  `load` changes its weights without compiling anew."""

    def __init__(self, config: ModelConfig, shapes: Shapes, stop_ids: tuple[int, ...], dtype: str):
        self.config, self.shapes, self.stop_ids = config, shapes, stop_ids
        self._dtype = jnp.dtype(dtype)
        self._params: Any = None
        self._unstack = jax.jit(functools.partial(_unstack, self._dtype))
        self._extend = jax.jit(functools.partial(_extend, config, self._dtype), donate_argnums=(1,))
        self._decode = jax.jit(
            functools.partial(_decode, config, self._dtype, shapes.block, stop_ids),
            donate_argnums=(1,),
        )
        self.tokens_prefilled = 0
        self.tokens_decoded = 0
        self._warm: set[tuple[int, int]] = set()
        self._expected = 0

    def load(self, params: Any) -> None:
        """Take stacked training parameters as the policy to sample from.

        An adapter is merged into the copy that this makes: decoding then costs what the base does.
        """
        self._params = self._unstack(params)

    def start(self) -> DecodeState:
        """Empty slots."""
        s = self.shapes
        return DecodeState(
            transformer.init_cache(self.config, s.slots, s.context, self._dtype, s.slack),
            jnp.zeros((s.slots, self.config.vocab_size), jnp.float32),
            jnp.zeros(s.slots, jnp.int32),
            jax.random.split(jax.random.key(0), s.slots),
        )

    def extend(
        self, state: DecodeState, slots: list[int], ids: list[list[int]], lengths: list[int],
        seeds: list[tuple[int, int]],
    ) -> DecodeState:  # fmt: skip
        """Append new tokens to some slots: a prompt at length 0, or an observation further on."""
        s = self.shapes
        longest = max(map(len, ids))
        rows = next(b for b in s.row_buckets if b >= len(slots))
        width = next(b for b in s.width_buckets if b >= longest)
        tokens = np.zeros((rows, width), np.int32)
        # Padding rows point past the last slot: their reads clip and their writes are dropped.
        where, held, new = np.full(rows, s.slots, np.int32), *np.zeros((2, rows), np.int32)
        words = np.zeros((rows, 2), np.uint32)
        for r, slot in enumerate(slots):
            tokens[r, : len(ids[r])] = ids[r]
            where[r], held[r], new[r], words[r] = slot, lengths[r], len(ids[r]), seeds[r]
        self.tokens_prefilled += int(new.sum())
        return self._extend(self._params, state, tokens, where, held, new, words)

    def decode(
        self, state: DecodeState, limits: np.ndarray, temperature: float
    ) -> tuple[DecodeState, Block]:
        """Up to one block of tokens for each slot; `limits` [R] is how many it may emit, 0 = idle.

        A slot stops after a stop id or at its limit.
        """
        state, ids, log_probs, counts = self._decode(
            self._params, state, np.asarray(limits, np.int32), np.float32(temperature)
        )
        block = Block(*(np.asarray(x) for x in (ids, log_probs, counts)))
        self.tokens_decoded += int(block.counts.sum())
        return state, block

    def warm_up(self, state: DecodeState, longest: int) -> DecodeState:
        """Compile what extensions of up to `longest` tokens a row can need; returns the state.

        Every row of these calls is padding, so the slots keep what they hold.
        """
        s = self.shapes
        widest = next((b for b in s.width_buckets if b >= longest), s.context)
        for rows in s.row_buckets:
            for width in s.width_buckets[: s.width_buckets.index(widest) + 1]:
                if (rows, width) not in self._warm:
                    self._warm.add((rows, width))
                    nothing = np.zeros((2, rows), np.int32)
                    state = self._extend(
                        self._params, state, np.zeros((rows, width), np.int32),
                        np.full(rows, s.slots, np.int32), *nothing, np.zeros((rows, 2), np.uint32),
                    )  # fmt: skip
        state, _ = self.decode(state, np.zeros(s.slots, np.int32), 0.0)
        self._expected = self.compilations()
        return state

    def late_compilations(self) -> int:
        """How many programs were compiled after the last warm-up: 0, or a shape was missed."""
        return self.compilations() - self._expected

    def compilations(self) -> int:
        """How many programs this sampler has compiled."""
        programs = (self._extend, self._decode, self._unstack)
        return sum(f._cache_size() for f in programs)  # pyright: ignore[reportAttributeAccessIssue]


def _unstack(dtype, params):
    """Layers apart, in the type of decoding; an adapter's sum is rounded to it once."""
    apart = lora.fold(transformer.unstack(params), dtype)
    return jax.tree.map(lambda x: x.astype(dtype), apart)


def _extend(config, dtype, params, state, tokens_RT, where_R, held_R, new_R, words_R2):
    """Gather the slots' cache rows, append, scatter them back; sets logits, lengths and keys."""
    rows = jax.tree.map(lambda c: jnp.take(c, where_R, axis=0, mode="clip"), state.cache)
    hidden_RTD, rows = transformer.extend(
        config, params, rows, tokens_RT, held_R, new_R, dtype=dtype
    )
    last = jnp.maximum(new_R - 1, 0)[:, None, None]
    final_RD = jnp.take_along_axis(hidden_RTD, last, axis=1)[:, 0]

    def put(array, values):
        return array.at[where_R].set(values, mode="drop")

    return DecodeState(
        jax.tree.map(put, state.cache, rows),
        put(state.logits, transformer.logits(config, params, final_RD)),
        put(state.lengths, held_R + new_R),
        put(state.keys, jax.random.wrap_key_data(words_R2)),
    )


def _decode(config, dtype, block, stop_ids, params, state, limits_R, temperature):
    """At most `block` steps; leaves early when every slot has stopped."""
    slots = limits_R.shape[0]
    stops = jnp.asarray(stop_ids, jnp.int32)

    def running(carry):
        step, _, _, _, counts, alive = carry
        del counts
        return (step < block) & jnp.any(alive)

    def body(carry):
        step, state, ids, log_probs, counts, alive = carry
        token, log_prob = _sample(state, temperature)
        ids = ids.at[:, step].set(jnp.where(alive, token, 0))
        log_probs = log_probs.at[:, step].set(jnp.where(alive, log_prob, 0.0))
        counts += alive
        hidden_R1D, cache = transformer.extend(
            config, params, state.cache, token[:, None], state.lengths,
            alive.astype(jnp.int32), dtype=dtype,
        )  # fmt: skip
        logits = transformer.logits(config, params, hidden_R1D[:, 0])
        state = DecodeState(
            cache,
            jnp.where(alive[:, None], logits, state.logits),
            state.lengths + alive,
            state.keys,
        )
        alive &= ~jnp.isin(token, stops) & (counts < limits_R)
        return step + 1, state, ids, log_probs, counts, alive

    start = (
        0,
        state,
        jnp.zeros((slots, block), jnp.int32),
        jnp.zeros((slots, block), jnp.float32),
        jnp.zeros(slots, jnp.int32),
        limits_R > 0,
    )
    _, state, ids, log_probs, counts, _ = jax.lax.while_loop(running, body, start)
    return state, ids, log_probs, counts


def _sample(
    state: DecodeState, temperature: Float[Array, ""]
) -> tuple[Int[Array, " slots"], Float[Array, " slots"]]:
    """One token a slot and its untempered log-prob; temperature 0 is greedy.

    Inverse-CDF sampling: one uniform a slot, where the Gumbel trick would draw one a vocabulary
    entry (256,000 for Gemma).
    """
    log_probs = jax.nn.log_softmax(state.logits, axis=-1)
    keys = jax.vmap(jax.random.fold_in)(state.keys, state.lengths)
    uniform = jax.vmap(lambda key: jax.random.uniform(key))(keys)
    tempered = jax.nn.softmax(state.logits / jnp.maximum(temperature, 1e-6), axis=-1)
    mass = jnp.cumsum(tempered, axis=-1)
    # Scaling by the last entry keeps rounding in the sum from pushing a draw past the end.
    drawn = jnp.sum(mass <= uniform[:, None] * mass[:, -1:], axis=-1)
    drawn = jnp.minimum(drawn, log_probs.shape[-1] - 1)
    token = jnp.where(temperature > 0, drawn, jnp.argmax(state.logits, axis=-1)).astype(jnp.int32)
    return token, jnp.take_along_axis(log_probs, token[:, None], axis=-1)[:, 0]
