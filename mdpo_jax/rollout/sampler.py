"""Jitted sampling over one preallocated cache: prefill, extend or copy slots, decode a block on all.

    slot 0 | prompt ......... action ..... observation . action ..      |  lengths[0] tokens held
    slot 1 | prompt .... action .....                                   |  lengths[1]

Every function takes fixed shapes (shapes.py), so nothing compiles after warm-up.  The randomness of
a token depends on its trajectory's key and its position alone.  On a mesh each function runs once a
shard of the slots (layout.py), and what is said of slots below holds within a shard.
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
from mdpo_jax.model.families import ModelConfig, nest
from mdpo_jax.model.sharding import constrain
from mdpo_jax.rollout.layout import ONE_DEVICE, ROWS, WHOLE, Placement, flat, resharded
from mdpo_jax.rollout.sampling import GREEDY, Sampling, draw
from mdpo_jax.rollout.shapes import Shapes

# Tokens whose computation takes as long as reading the weights for a call of its own does.
_OVERHEAD = {"cpu": 16}
_OVERHEAD_ELSEWHERE = 256
# Shares of the slots that a block of decoding can be for, of _FEWEST rows or more.  A step's time
# follows its rows on a CPU; on an accelerator, and below so many rows, it is that of reading the
# weights, and each share is a program more to compile for every reach.
_SHARES = {"cpu": (0.25, 0.5)}
_FEWEST = 8

_Seed = tuple[int, int]


class DecodeState(NamedTuple):
    """The device's side of the slots; R slots, V vocabulary.

    cache: see transformer.init_cache.  logits [R V] float32: of each slot's next token.
    first_logits [R V] float32: those after the tokens that it began with, for `copy`.
    lengths [R] int32: tokens in the cache.  keys [R 2] uint32: the random key of each slot's
    trajectory, as words, since sharded, an array of keys comes back in another spec and compiles anew.
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

    def __init__(
        self, config: ModelConfig, shapes: Shapes, stop_ids: tuple[int, ...], dtype: str,
        placement: Placement = ONE_DEVICE,
    ):  # fmt: skip
        """Raises ValueError where the layout cannot deal the slots evenly."""
        self.config, self.shapes, self.stop_ids = config, shapes, stop_ids
        self._placement, self._part = placement, placement.per_shard(shapes)
        self._dtype = jnp.dtype(dtype)
        self._params: Any = None
        self._overhead = _OVERHEAD.get(jax.default_backend(), _OVERHEAD_ELSEWHERE)
        slots, shares = self._part.slots, _SHARES.get(jax.default_backend(), ())
        some = {math.ceil(share * slots) for share in shares}
        self._decode_rows = (*sorted(n for n in some if _FEWEST <= n < slots), slots)
        one_cpu = jax.default_backend() == "cpu" and jax.device_count() == 1
        tiled = one_cpu and self._decode_rows[0] <= tiles.ROWS
        self._unstack = jax.jit(functools.partial(_unstack, self._dtype, tiled))
        self._make_programs()
        self.tokens_prefilled = self.tokens_copied = self.tokens_decoded = 0
        self._warm: set[tuple[str, int, int]] = set()
        self._expected = self._late = 0

    def _make_programs(self) -> None:
        placement, part, model = self._placement, self._part, (self.config, self._dtype)
        state, out = self._shardings()
        one = {"takes": (WHOLE, *[ROWS] * 6), "gives": ROWS, "donate": 1, "shardings": state}
        self._prefill = placement.program(functools.partial(_prefill, *model, part.slack), **one)
        self._extend = placement.program(functools.partial(_extend, *model), **one)
        copy = functools.partial(_copy, placement.over)
        self._copy = placement.program(copy, **one | {"takes": [ROWS] * 5, "statics": 1})
        self._decode = placement.program(
            functools.partial(_decode, *model, part.block, self.stop_ids),
            takes=(WHOLE, ROWS, ROWS, ROWS, WHOLE), gives=ROWS, statics=1, donate=2,
            shardings=(state, out, out, out),
        )  # fmt: skip

    def _shardings(self) -> tuple[Any, Any]:
        """Of the state, and of an array by slot; None without a mesh."""
        place = self._placement.place
        if self._placement.mesh is None:
            return None, None

        def one(path: Any, x: jax.ShapeDtypeStruct) -> Any:
            heads = "kv_heads" if path[0].name == "cache" else None
            return place(("rows", heads, None, None)[: x.ndim], x.shape)

        state = jax.tree_util.tree_map_with_path(one, jax.eval_shape(self._empty))
        return state, place(("rows",), (self.shapes.slots,))

    def load(self, params: Any) -> None:
        """Take stacked training parameters as the policy to sample from.

        An adapter is merged into the copy that this makes: decoding then costs what the base does.
        On a mesh a leaf that the caller does not hold either is freed as soon as it is read.
        """
        self._params = None  # the last policy's, which are not needed beside the next one's
        if self._placement.mesh is None:
            self._params = self._unstack(params)
            return
        leaves = flat(params)
        del params
        found: dict[str, jax.Array] = {}
        for layers in resharded(leaves, self.config, self._dtype, self._placement.mesh):
            found |= layers
        self._params = nest(found)

    def rest(self) -> None:
        """Give up the weights; `load` comes before the next use."""
        self._params = None

    def start(self) -> DecodeState:
        """Empty slots."""
        state, _ = self._shardings()
        if state is None:
            # Committed, as all that comes of parameters from a file: else the first program that is
            # called would compile twice.
            return jax.device_put(self._empty(), jax.local_devices()[0])
        return jax.jit(self._empty, out_shardings=state)()

    def _empty(self) -> DecodeState:
        s = self.shapes
        logits = jnp.zeros((s.slots, self.config.vocab_size), jnp.float32)
        return DecodeState(
            transformer.init_cache(self.config, s.slots, s.context, self._dtype, s.slack),
            logits,
            jnp.zeros_like(logits),
            jnp.zeros(s.slots, jnp.int32),
            jnp.zeros((s.slots, 2), jnp.uint32),
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
            groups = self._placement.groups(
                self._part, [slots[i] for i in some], [len(ids[i]) for i in some], self._overhead
            )
            for shards in groups:
                rows = [[some[i] for i in of] for of in shards]
                arrays = self._padded(rows, slots, ids, lengths, seeds)
                state = call(self._params, state, *arrays)
        self.tokens_prefilled += sum(map(len, ids))
        return state

    def _padded(self, shards, slots, ids, lengths, seeds) -> tuple[np.ndarray, ...]:
        """tokens, where, held, new and seeds of a call, a block of rows for each shard."""
        s, ways = self._part, self._placement.ways
        count = s.rows(max(map(len, shards)))
        longest = max(len(ids[i]) for of in shards for i in of)
        tokens = np.zeros((ways * count, s.width(longest)), np.int32)
        # Padding rows point past the last slot: their reads clip and their writes are dropped.
        where = np.full(ways * count, s.slots, np.int32)
        held, new = np.zeros((2, ways * count), np.int32)
        words = np.zeros((ways * count, 2), np.uint32)
        for shard, of in enumerate(shards):
            for r, i in enumerate(of, shard * count):
                tokens[r, : len(ids[i])] = ids[i]
                where[r], held[r] = slots[i] // ways, lengths[i]
                new[r], words[r] = len(ids[i]), seeds[i]
        return tokens, where, held, new, words

    def copy(
        self, state: DecodeState, pairs: Sequence[tuple[int, int]], lengths: Sequence[int],
        seeds: Sequence[_Seed],
    ) -> DecodeState:  # fmt: skip
        """Begin slots as others began: (from, to) each, `lengths` tokens; all are read first.

        A slot that is copied from may have gone on, up to `remembered` tokens.
        """
        s, ways = self._part, self._placement.ways
        count = self.shapes.rows(len(pairs))
        # Every shard is told of every pair; slots that are not its own are past its last one.
        places = np.full((2, ways, count), s.slots, np.int32)
        held, words = np.zeros((ways, count), np.int32), np.zeros((ways, count, 2), np.uint32)
        for r, pair in enumerate(pairs):
            for side, slot in enumerate(pair):
                places[side, slot % ways, r] = slot // ways
        held[:, : len(pairs)], words[:, : len(pairs)] = lengths, seeds
        self.tokens_copied += sum(lengths)
        arrays = *places.reshape(2, -1), held.reshape(-1), words.reshape(-1, 2)
        return self._copy(self.shapes.copied(max(lengths)), state, *arrays)

    def decode(
        self, state: DecodeState, lengths: np.ndarray, limits: np.ndarray, sampling: Sampling
    ) -> tuple[DecodeState, Block]:
        """Up to one block of tokens for each slot; `limits` [R] is how many it may emit, 0 = idle.

        lengths [R]: tokens that the running slots hold.  A slot stops after a stop id or at its
        limit.  Idle slots cost nothing where fewer rows than slots are decoded.
        """
        ends = np.where(limits > 0, lengths + np.minimum(limits, self.shapes.block), 0)
        reach = self.shapes.reach(int(ends.max()))
        where, limits = self._active(self._placement.rows(np.asarray(limits, np.int32)))
        state, *out = self._decode(reach, self._params, state, where, limits, _traced(sampling))
        block = Block(*(self._placement.slots(self._spread(np.asarray(x), where)) for x in out))
        self.tokens_decoded += int(block.counts.sum())
        return state, block

    def _active(self, limits: np.ndarray) -> tuple[np.ndarray | None, np.ndarray]:
        """The rows that a block is for, as many on each shard, and their limits; None: all rows."""
        ways, slots = self._placement.ways, self._part.slots
        active = [np.flatnonzero(of) for of in limits.reshape(ways, slots)]
        most = max(map(len, active))
        count = next(rows for rows in self._decode_rows if rows >= most)
        if count == slots:
            return None, limits
        where, wanted = np.full((ways, count), slots, np.int32), np.zeros((ways, count), np.int32)
        for shard, of in enumerate(active):
            where[shard, : len(of)] = of
            wanted[shard, : len(of)] = limits.reshape(ways, slots)[shard, of]
        return where.reshape(-1), wanted.reshape(-1)

    def _spread(self, part: np.ndarray, where: np.ndarray | None) -> np.ndarray:
        """What came of some rows, among zeros for all others."""
        if where is None:
            return part
        ways, slots = self._placement.ways, self._part.slots
        whole = np.zeros((ways, slots + 1, *part.shape[1:]), part.dtype)
        where = where.reshape(ways, -1)
        # Padding is written behind the last slot.
        whole[np.arange(ways)[:, None], where] = part.reshape(*where.shape, *part.shape[1:])
        return whole[:, :slots].reshape(-1, *part.shape[1:])

    def warm_up(self, state: DecodeState, longest: int, observation: int) -> DecodeState:
        """Compile what beginnings of up to `longest` tokens, and observations, can need.

        Every row of these calls is padding, so the slots keep what they hold.
        """
        self._late += self._decoding() - self._expected
        s, ways = self.shapes, self._placement.ways
        for name, most in (("prefill", longest), ("copy", longest), ("extend", observation)):
            bucket = s.copied if name == "copy" else s.width
            widths = sorted({bucket(b) for b in s.width_buckets if b <= bucket(most)})
            buckets = (s if name == "copy" else self._part).row_buckets
            for rows, width in ((r, w) for r in buckets for w in widths):
                if (name, rows, width) not in self._warm:
                    self._warm.add((name, rows, width))
                    state = self._nothing(name, state, rows, width)
        for rows, reach in itertools.product(self._decode_rows, s.reaches):
            if ("decode", rows, reach) not in self._warm:
                self._warm.add(("decode", rows, reach))
                none = np.zeros(ways * rows, np.int32)
                where = None if rows == self._part.slots else none + self._part.slots
                job = where, none, _traced(GREEDY)
                state, *_ = self._decode(reach, self._params, state, *job)
        self._expected = self._decoding()
        return state

    def _nothing(self, name: str, state: DecodeState, rows: int, width: int) -> DecodeState:
        rows *= self._placement.ways
        nowhere, none = np.full(rows, self._part.slots, np.int32), np.zeros(rows, np.int32)
        words = np.zeros((rows, 2), np.uint32)
        if name == "copy":
            return self._copy(width, state, nowhere, nowhere, none, words)
        call = self._prefill if name == "prefill" else self._extend
        tokens = np.zeros((rows, width), np.int32)
        return call(self._params, state, tokens, nowhere, none, none, words)

    def late_compilations(self) -> int:
        """How many programs were compiled outside of warm-ups: 0, or a shape was missed."""
        return self._late + self._decoding() - self._expected

    def compilations(self) -> int:
        """How many programs this sampler has compiled."""
        return self._decoding() + _count(self._unstack)

    def _decoding(self) -> int:
        return sum(map(_count, (self._prefill, self._extend, self._copy, self._decode)))


def _count(program: Any) -> int:
    return program._cache_size()


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
    logits_RV = constrain(transformer.logits(config, params, final_RD), None, None)
    state = state._replace(
        cache=caching.put(state.cache, where_R, cache),
        logits=_put(state.logits, where_R, logits_RV),
        lengths=_put(state.lengths, where_R, held_R + new_R),
        keys=_put(state.keys, where_R, words_R2),
    )
    return state, logits_RV


def _copy(over, width, state, from_R, to_R, lengths_R, words_R2):
    """Everything that a slot began with, to other slots; `over`: mesh axes that part the slots."""
    first_RV = jnp.take(state.first_logits, from_R, axis=0, mode="clip")
    begun = caching.take(state.cache, from_R, width), first_RV
    if over:
        # Of each row one shard has something; the others learn it from the sum.
        own_R = from_R < len(state.lengths)
        begun = jax.tree.map(lambda x: jnp.where(_along(own_R, x), x, 0), begun)
        begun = jax.tree.map(lambda x: _summed(x, over), begun)
    cache, first_RV = begun
    return DecodeState(
        caching.put(state.cache, to_R, cache),
        _put(state.logits, to_R, first_RV),
        _put(state.first_logits, to_R, first_RV),
        _put(state.lengths, to_R, lengths_R),
        _put(state.keys, to_R, words_R2),
    )


def _summed(x, over):
    """Over mesh axes; what is 0 on all shards but one keeps its bits."""
    if x.dtype == jnp.bfloat16 and jax.default_backend() == "cpu":
        # XLA's CPU compiler (jax 0.10.2) ends the process over this sum in bfloat16.
        return jax.lax.psum(x.astype(jnp.float32), over).astype(x.dtype)
    return jax.lax.psum(x, over)


def _along(mask_R, array):
    return mask_R.reshape(-1, *[1] * (array.ndim - 1))


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
    keys_R = jax.random.wrap_key_data(part.keys)

    def running(carry):
        step, _, _, _, counts, alive = carry
        del counts
        return (step < block) & jnp.any(alive)

    def body(carry):
        step, (cache, logits, lengths), ids, log_probs, counts, alive = carry
        token, log_prob = draw(logits, jax.vmap(jax.random.fold_in)(keys_R, lengths), sampling)
        ids = ids.at[:, step].set(jnp.where(alive, token, 0))
        log_probs = log_probs.at[:, step].set(jnp.where(alive, log_prob, 0.0))
        counts += alive
        hidden_R1D, cache = transformer.extend(
            config, params, cache, token[:, None], lengths, alive.astype(jnp.int32), dtype=dtype
        )
        # Whole on every device: what is drawn is the same on all that share a row.
        new = constrain(transformer.logits(config, params, hidden_R1D[:, 0]), None, None)
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
