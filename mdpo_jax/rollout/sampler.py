"""Jitted sampling over one preallocated cache: prefill, extend or copy slots, decode a block on all.

    slot 0 | prompt ......... action ..... observation . action ..      |  lengths[0] tokens held
    slot 1 | prompt .... action .....                                   |  lengths[1]

Every function takes fixed shapes (shapes.py), so nothing compiles after warm-up.  The randomness of
a token depends on its trajectory's key and its position alone.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mdpo_jax.model import caching, lora, tiles, transformer
from mdpo_jax.model.families import ModelConfig
from mdpo_jax.rollout.sampling import GREEDY, Sampling, draw
from mdpo_jax.rollout.shapes import Shapes

# Tokens whose computation takes as long as reading the weights for a call of its own does.
_OVERHEAD = {"cpu": 16}
_OVERHEAD_ELSEWHERE = 256
# Shares of the slots that a block of decoding can be for, of _FEWEST rows or more.  A step's time
# follows its rows on a CPU; on an accelerator, and below so many rows, it is that of reading the
# weights, and each share is a program more to compile for every reach.
_SHARES = {"cpu": (0.25, 0.5, 0.75)}
_FEWEST = 8

_Seed = tuple[int, int]


class DecodeState(NamedTuple):
    """The device's side of the slots; R slots, V vocabulary.

    cache: see transformer.init_cache.  logits [R V] float32: of each slot's next token.
    first_logits [R V] float32: those after the tokens that it began with, for `copy`.
    lengths [R] int32: tokens in the cache.  keys [R]: the random key of each slot's trajectory.
    """

    cache: Any
    logits: jax.Array
    first_logits: jax.Array
    lengths: jax.Array
    keys: jax.Array


class Block(NamedTuple):
    """What a block of decoding emitted: ids and log_probs [R N], counts [R], on the host."""

    ids: np.ndarray
    log_probs: np.ndarray
    counts: np.ndarray


class Sampler:
    """The sampling policy on the device.  `load` changes its weights without compiling anew.

    tokens_prefilled, tokens_copied, tokens_decoded: read by the model, copied from another slot, and
    sampled, since it was made.
    """

    def __init__(self, config: ModelConfig, shapes: Shapes, stop_ids: tuple[int, ...], dtype: str):
        self.config, self.shapes, self.stop_ids = config, shapes, stop_ids
        self._dtype = jnp.dtype(dtype)
        self._params: Any = None
        self._overhead = _OVERHEAD.get(jax.default_backend(), _OVERHEAD_ELSEWHERE)
        shares = _SHARES.get(jax.default_backend(), ())
        some = {math.ceil(share * shapes.slots) for share in shares}
        self._decode_rows = (*sorted(n for n in some if _FEWEST <= n < shapes.slots), shapes.slots)
        one_cpu = jax.default_backend() == "cpu" and jax.device_count() == 1
        tiled = one_cpu and self._decode_rows[0] <= tiles.ROWS
        self._unstack = jax.jit(functools.partial(_unstack, self._dtype, tiled))
        model = config, self._dtype
        prefill = functools.partial(_prefill, *model, shapes.slack)
        self._prefill = jax.jit(prefill, donate_argnums=1)
        self._extend = jax.jit(functools.partial(_extend, *model), donate_argnums=1)
        self._copy = jax.jit(_copy, static_argnums=0, donate_argnums=1)
        decode = functools.partial(_decode, *model, shapes.block, stop_ids)
        self._decode = jax.jit(decode, static_argnums=0, donate_argnums=2)
        self.tokens_prefilled = self.tokens_copied = self.tokens_decoded = 0
        self._warm: set[tuple[str, int, int]] = set()
        self._expected = 0

    def load(self, params: Any) -> None:
        """Take stacked training parameters as the policy to sample from.

        An adapter is merged into the copy that this makes: decoding then costs what the base does.
        """
        self._params = self._unstack(params)

    def start(self) -> DecodeState:
        """Empty slots."""
        s = self.shapes
        logits = jnp.zeros((s.slots, self.config.vocab_size), jnp.float32)
        return DecodeState(
            transformer.init_cache(self.config, s.slots, s.context, self._dtype, s.slack),
            logits,
            jnp.zeros_like(logits),
            jnp.zeros(s.slots, jnp.int32),
            jax.random.split(jax.random.key(0), s.slots),
        )

    @property
    def remembered(self) -> int:
        """Tokens that every layer still holds the first of; layers with a window hold a ring."""
        s = self.shapes
        windows = [self.config.kind(i).window for i in range(self.config.num_layers)]
        return min(s.context if w is None else min(s.context, w + s.slack) for w in windows)

    def extend(
        self, state: DecodeState, slots: Sequence[int], ids: Sequence[Sequence[int]],
        lengths: Sequence[int], seeds: Sequence[_Seed],
    ) -> DecodeState:  # fmt: skip
        """Append new tokens to some slots: a beginning at length 0, or an observation further on."""
        for call, fresh in ((self._prefill, True), (self._extend, False)):
            some = [i for i, length in enumerate(lengths) if (length == 0) == fresh]
            for group in self.shapes.groups([len(ids[i]) for i in some], self._overhead):
                rows = [some[i] for i in group]
                arrays = self._padded(rows, slots, ids, lengths, seeds)
                state = call(self._params, state, *arrays)
        self.tokens_prefilled += sum(map(len, ids))
        return state

    def _padded(self, rows, slots, ids, lengths, seeds) -> tuple[np.ndarray, ...]:
        """tokens, where, held, new and seeds of a call."""
        s = self.shapes
        count = s.rows(len(rows))
        tokens = np.zeros((count, s.width(max(len(ids[i]) for i in rows))), np.int32)
        # Padding rows point past the last slot: their reads clip and their writes are dropped.
        where, held, new = np.full(count, s.slots, np.int32), *np.zeros((2, count), np.int32)
        words = np.zeros((count, 2), np.uint32)
        for r, i in enumerate(rows):
            tokens[r, : len(ids[i])] = ids[i]
            where[r], held[r], new[r], words[r] = slots[i], lengths[i], len(ids[i]), seeds[i]
        return tokens, where, held, new, words

    def copy(
        self, state: DecodeState, pairs: Sequence[tuple[int, int]], lengths: Sequence[int],
        seeds: Sequence[_Seed],
    ) -> DecodeState:  # fmt: skip
        """Begin slots as others began: (from, to) each, `lengths` tokens; all are read first.

        A slot that is copied from may have gone on, up to `remembered` tokens.
        """
        s = self.shapes
        count = s.rows(len(pairs))
        places, held = np.full((count, 2), s.slots, np.int32), np.zeros(count, np.int32)
        words = np.zeros((count, 2), np.uint32)
        places[: len(pairs)], held[: len(pairs)], words[: len(pairs)] = pairs, lengths, seeds
        self.tokens_copied += sum(lengths)
        return self._copy(s.width(max(lengths)), state, *places.T, held, words)

    def decode(
        self, state: DecodeState, lengths: np.ndarray, limits: np.ndarray, sampling: Sampling
    ) -> tuple[DecodeState, Block]:
        """Up to one block of tokens for each slot; `limits` [R] is how many it may emit, 0 = idle.

        lengths [R]: tokens that the running slots hold.  A slot stops after a stop id or at its
        limit.  Idle slots cost nothing where fewer rows than slots are decoded.
        """
        ends = np.where(limits > 0, lengths + np.minimum(limits, self.shapes.block), 0)
        reach = self.shapes.reach(int(ends.max()))
        where, limits = self._active(np.asarray(limits, np.int32))
        state, *out = self._decode(reach, self._params, state, where, limits, _traced(sampling))
        block = Block(*map(np.asarray, out))
        self.tokens_decoded += int(block.counts.sum())
        return state, block if where is None else self._spread(block, where)

    def _active(self, limits: np.ndarray) -> tuple[np.ndarray | None, np.ndarray]:
        """The slots that a block is for, and their limits; None and all of them: every slot."""
        slots, active = self.shapes.slots, np.flatnonzero(limits)
        count = next(rows for rows in self._decode_rows if rows >= len(active))
        if count == slots:
            return None, limits
        where, wanted = np.full(count, slots, np.int32), np.zeros(count, np.int32)
        where[: len(active)], wanted[: len(active)] = active, limits[active]
        return where, wanted

    def _spread(self, block: Block, where: np.ndarray) -> Block:
        """A block of some slots as one of all of them."""
        real = where < self.shapes.slots

        def spread(part: np.ndarray) -> np.ndarray:
            whole = np.zeros((self.shapes.slots, *part.shape[1:]), part.dtype)
            whole[where[real]] = part[real]
            return whole

        return Block(*map(spread, block))

    def warm_up(self, state: DecodeState, longest: int, observation: int) -> DecodeState:
        """Compile what beginnings of up to `longest` tokens, and observations, can need.

        Every row of these calls is padding, so the slots keep what they hold.
        """
        s = self.shapes
        for name, most in (("prefill", longest), ("copy", longest), ("extend", observation)):
            widths = [b for b in s.width_buckets if b <= s.width(most)]
            for rows, width in ((r, w) for r in s.row_buckets for w in widths):
                if (name, rows, width) not in self._warm:
                    self._warm.add((name, rows, width))
                    state = self._nothing(name, state, rows, width)
        for rows, reach in itertools.product(self._decode_rows, s.reaches):
            if ("decode", rows, reach) not in self._warm:
                self._warm.add(("decode", rows, reach))
                where = None if rows == s.slots else np.full(rows, s.slots, np.int32)
                job = where, np.zeros(rows, np.int32), _traced(GREEDY)
                state, *_ = self._decode(reach, self._params, state, *job)
        self._expected = self.compilations()
        return state

    def _nothing(self, name: str, state: DecodeState, rows: int, width: int) -> DecodeState:
        nowhere, none = np.full(rows, self.shapes.slots, np.int32), np.zeros(rows, np.int32)
        words = np.zeros((rows, 2), np.uint32)
        if name == "copy":
            return self._copy(width, state, nowhere, nowhere, none, words)
        call = self._prefill if name == "prefill" else self._extend
        tokens = np.zeros((rows, width), np.int32)
        return call(self._params, state, tokens, nowhere, none, none, words)

    def late_compilations(self) -> int:
        """How many programs were compiled after the last warm-up: 0, or a shape was missed."""
        return self.compilations() - self._expected

    def compilations(self) -> int:
        """How many programs this sampler has compiled."""
        programs = (self._prefill, self._extend, self._copy, self._decode, self._unstack)
        return sum(f._cache_size() for f in programs)  # pyright: ignore[reportAttributeAccessIssue]


def _traced(sampling: Sampling) -> Any:
    kinds = (np.float32, np.int32, np.float32)
    values: Any = [kind(x) for kind, x in zip(kinds, sampling, strict=True)]
    return Sampling(*values)


def _unstack(dtype, tiled, params):
    """Layers apart, in the type of decoding; an adapter's sum is rounded to it once."""
    apart = lora.fold(transformer.unstack(params), dtype)
    apart = jax.tree.map(lambda x: x.astype(dtype), apart)
    return tiles.add(apart) if tiled else apart


def _prefill(config, dtype, slack, params, state, tokens_RT, where_R, held_R, new_R, words_R2):
    """Rows that begin: they see themselves alone, in a cache as long as they are."""
    rows, width = tokens_RT.shape
    cache = transformer.init_cache(config, rows, width, dtype, slack)
    state, logits_RV = _appended(
        config, dtype, params, state, cache, tokens_RT, where_R, held_R, new_R, words_R2
    )
    return state._replace(first_logits=_put(state.first_logits, where_R, logits_RV))


def _extend(config, dtype, params, state, tokens_RT, where_R, held_R, new_R, words_R2):
    """Rows that go on: gathered, appended to, scattered back."""
    cache = jax.tree.map(lambda c: jnp.take(c, where_R, axis=0, mode="clip"), state.cache)
    return _appended(
        config, dtype, params, state, cache, tokens_RT, where_R, held_R, new_R, words_R2
    )[0]


def _appended(
    config, dtype, params, state, cache, tokens_RT, where_R, held_R, new_R, words_R2
):  # fmt: skip
    """The state with tokens appended to `cache` and put in its place; and the last logits."""
    hidden_RTD, cache = transformer.extend(
        config, params, cache, tokens_RT, held_R, new_R, dtype=dtype
    )
    last = jnp.maximum(new_R - 1, 0)[:, None, None]
    final_RD = jnp.take_along_axis(hidden_RTD, last, axis=1)[:, 0]
    logits_RV = transformer.logits(config, params, final_RD)
    state = state._replace(
        cache=caching.put(state.cache, where_R, cache),
        logits=_put(state.logits, where_R, logits_RV),
        lengths=_put(state.lengths, where_R, held_R + new_R),
        keys=_put(state.keys, where_R, jax.random.wrap_key_data(words_R2)),
    )
    return state, logits_RV


def _copy(width, state, from_R, to_R, lengths_R, words_R2):
    """Everything that a slot began with, to other slots."""
    first_RV = jnp.take(state.first_logits, from_R, axis=0, mode="clip")
    return DecodeState(
        caching.put(state.cache, to_R, caching.take(state.cache, from_R, width)),
        _put(state.logits, to_R, first_RV),
        _put(state.first_logits, to_R, first_RV),
        _put(state.lengths, to_R, lengths_R),
        _put(state.keys, to_R, jax.random.wrap_key_data(words_R2)),
    )


def _put(array, where_R, values):
    return array.at[where_R].set(values, mode="drop")


def _decode(
    config, dtype, block, stop_ids, reach, params, state, where_R, limits_R, sampling
):  # fmt: skip
    """At most `block` steps; leaves early when every row has stopped.

    where_R: the slots decoded, past the last one for padding; None for all of them.  Steps work on a
    copy of these slots' first `reach` places in the cache, where that is not the whole cache.
    """
    rows = limits_R.shape[0]
    stops = jnp.asarray(stop_ids, jnp.int32)
    part = _narrowed(state, where_R, reach)

    def running(carry):
        step, _, _, _, counts, alive = carry
        del counts
        return (step < block) & jnp.any(alive)

    def body(carry):
        step, (cache, logits, lengths), ids, log_probs, counts, alive = carry
        token, log_prob = draw(logits, jax.vmap(jax.random.fold_in)(part.keys, lengths), sampling)
        ids = ids.at[:, step].set(jnp.where(alive, token, 0))
        log_probs = log_probs.at[:, step].set(jnp.where(alive, log_prob, 0.0))
        counts += alive
        hidden_R1D, cache = transformer.extend(
            config, params, cache, token[:, None], lengths, alive.astype(jnp.int32), dtype=dtype
        )
        new = transformer.logits(config, params, hidden_R1D[:, 0])
        held = cache, jnp.where(alive[:, None], new, logits), lengths + alive
        alive &= ~jnp.isin(token, stops) & (counts < limits_R)
        return step + 1, held, ids, log_probs, counts, alive

    start = (
        0,
        (part.cache, part.logits, part.lengths),
        jnp.zeros((rows, block), jnp.int32),
        jnp.zeros((rows, block), jnp.float32),
        jnp.zeros(rows, jnp.int32),
        limits_R > 0,
    )
    _, held, ids, log_probs, counts, _ = jax.lax.while_loop(running, body, start)
    return _widened(state, where_R, *held), ids, log_probs, counts


def _narrowed(state, where_R, reach):
    """What decoding reads of a state; nothing is copied of all rows in full."""
    if where_R is None:
        return state._replace(cache=caching.narrow(state.cache, reach))
    rows = {
        name: jnp.take(getattr(state, name), where_R, axis=0, mode="clip")
        for name in ("logits", "lengths", "keys")
    }
    return state._replace(cache=caching.take(state.cache, where_R, reach), **rows)


def _widened(state, where_R, cache, logits, lengths):
    """The state with what decoding changed."""
    if where_R is None:
        cache = caching.widen(state.cache, cache)
        return state._replace(cache=cache, logits=logits, lengths=lengths)
    return state._replace(
        cache=caching.put(state.cache, where_R, cache),
        logits=_put(state.logits, where_R, logits),
        lengths=_put(state.lengths, where_R, lengths),
    )
