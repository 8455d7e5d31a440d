"""Log-probabilities of given tokens without materialising more than [chunk, vocab]."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mdpo_jax.products import on_one_device, product

_PARTS = 8  # of a row's tokens, of which a CPU computes as few as hold what is counted


def _same(x: Array) -> Array:
    return x


class Spread(NamedTuple):
    """What pins a chunk to the devices of a sharded table: its hidden states and targets, and its
    logits.  Without a mesh all stay as they are.  needed: whether a chunk with such flags is to be
    computed, which all devices must agree on."""

    tokens: Callable[[Array], Array] = _same
    logits: Callable[[Array], Array] = _same
    needed: Callable[[Array], Array] = jnp.any


UNSPREAD = Spread()


def token_log_probs(
    hidden: Float[Array, "*rows tokens model"],
    table: Float[Array, "vocab model"],
    targets: Int[Array, "*rows tokens"],
    *,
    chunk: int = 2048,
    softcap: float | None = None,
    counted: Bool[Array, "*rows tokens"] | None = None,
    spread: Spread = UNSPREAD,
) -> Float[Array, "*rows tokens"]:
    """log softmax(hidden @ table.T)[target] of each token, float32; differentiable in reverse mode.

    Works through about `chunk` tokens at a time, some of every row, and recomputes each chunk's
    logits in the backward pass, so the largest temporary is [chunk, vocab] whatever the number of
    tokens.  softcap: the final cap of Gemma-2, cap * tanh(logit / cap).  A target that counts is
    one of the vocabulary's.
    counted: whose log-probs are asked for; the others are 0, and chunks without any cost nothing:

        row 0 | . . x x . x |  ->  | x x x | . . . |      counted tokens come first
        row 1 | . x . . . . |      | x . . | . . . |      the second chunk is left out

    Where one chunk holds all tokens, its logits are kept; of these, a CPU computes the eighths that
    hold what is counted.

    spread: of a table that is sharded by vocabulary.
    """
    if targets.ndim == 1:
        one = None if counted is None else counted[None]
        return token_log_probs(
            hidden[None], table, targets[None], chunk=chunk, softcap=softcap, counted=one,
            spread=spread,
        )[0]  # fmt: skip
    score = functools.partial(_scores, table, softcap, spread)
    rows, tokens = targets.shape
    wide = min(tokens, max(1, chunk // rows))
    if counted is None:
        if wide == tokens:
            return score(hidden, targets)
        again = jax.checkpoint(score)
        pieces = _cut(hidden, wide), _cut(targets, wide)
        return _joined(jax.lax.map(lambda piece: again(*piece), pieces), tokens)
    leading = spread.logits is _same and on_one_device()
    if wide == tokens and not leading:
        return jnp.where(counted, score(hidden, targets), 0)
    order = jnp.argsort(~counted, axis=1, stable=True)
    hidden = jnp.take_along_axis(hidden, order[..., None], axis=1)
    targets, first = (jnp.take_along_axis(x, order, axis=1) for x in (targets, counted))
    if wide == tokens:
        most = jnp.max(jnp.sum(counted, axis=1))
        values: Any = _leading(softcap, most, hidden, table.astype(hidden.dtype), targets)
    else:
        values = _chunks(score, spread, hidden, targets, first, wide)
    back = jnp.argsort(order, axis=1)
    return jnp.take_along_axis(jnp.where(first, values, 0), back, axis=1)


def _cut(x: Array, wide: int) -> Array:
    """[rows, tokens, ...] as [pieces, rows, wide, ...], padded."""
    rows, tokens = x.shape[:2]
    pieces = -(-tokens // wide)
    x = _padded(x, pieces * wide)
    return x.reshape(rows, pieces, wide, *x.shape[2:]).swapaxes(0, 1)


def _joined(values_PRC: Array, tokens: int) -> Array:
    """The inverse of `_cut`."""
    return values_PRC.swapaxes(0, 1).reshape(values_PRC.shape[1], -1)[:, :tokens]


def _chunks(
    score: Callable[[Array, Array], Array], spread: Spread, hidden_RTD: Array, targets_RT: Array,
    counted_RT: Array, wide: int,
) -> Array:  # fmt: skip
    """Chunk by chunk, leaving out those without a counted token."""

    # The cond is inside of what is computed again: outside, its branch would keep the table for the
    # backward pass, a copy of it for each chunk.
    @jax.checkpoint
    def some(hidden_RCD: Array, targets_RC: Array, counted_RC: Array) -> Array:
        nothing = functools.partial(jnp.zeros, targets_RC.shape)
        return jax.lax.cond(
            spread.needed(counted_RC), lambda: score(hidden_RCD, targets_RC), nothing
        )

    pieces = tuple(_cut(x, wide) for x in (hidden_RTD, targets_RT, counted_RT))
    return _joined(jax.lax.map(lambda piece: some(*piece), pieces), targets_RT.shape[1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _leading(
    softcap: float | None, most: Array, hidden_RTD: Array, table_VD: Array, targets_RT: Array
) -> Array:
    """Log-probs of at least the first `most` tokens of each row: of all, or on a CPU of as many
    eighths as hold them, and 0 after these."""
    return _leading_scores(softcap, most, hidden_RTD, table_VD, targets_RT)[0]


def _leading_kept(softcap, most, hidden_RTD, table_VD, targets_RT):
    given = tuple(x.value for x in (most, hidden_RTD, table_VD, targets_RT))
    values_RT, *scores = _leading_scores(softcap, *given)
    # Whether the table is trained, as under an adapter it is not: what is kept may hold no bool.
    return values_RT, (*given, *scores, () if table_VD.perturbed else None)


def _leading_scores(softcap, most, hidden_RTD, table_VD, targets_RT):
    """The log-probs, the logits and the log-sum-exps."""
    tokens = targets_RT.shape[1]

    def of(width: int) -> tuple[Array, Array, Array]:
        logits_RCV = _logits(hidden_RTD[:, :width], table_VD)
        capped_RCV, _ = _capped(logits_RCV, softcap)
        total_RC = jax.nn.logsumexp(capped_RCV, axis=-1)
        found = _chosen(capped_RCV, targets_RT[:, :width]) - total_RC, logits_RCV, total_RC
        return jax.tree.map(functools.partial(_padded, tokens=tokens), found)

    return _by_width(of, most, tokens)


def _leading_gradients(softcap, kept, given_RT):
    most, hidden_RTD, table_VD, targets_RT, *scores, trained = kept
    tokens, tables = targets_RT.shape[1], () if trained is None else (table_VD,)

    def of(width: int) -> tuple[Array, ...]:
        hidden, targets, logits, total, given = (
            x[:, :width] for x in (hidden_RTD, targets_RT, *scores, given_RT)
        )
        capped, slope = _capped(logits, softcap)
        mine = jnp.arange(logits.shape[-1]) == targets[..., None]
        of_logits = given[..., None] * (mine - jnp.exp(capped - total[..., None])) * slope
        _, pull = jax.vjp(lambda hidden, table=table_VD: _logits(hidden, table), hidden, *tables)
        of_hidden, *of_table = pull(of_logits)
        return _padded(of_hidden, tokens), *of_table

    of_hidden, *of_table = _by_width(of, most, tokens)
    return None, of_hidden, of_table[0] if of_table else None, None


# With symbolic zeros it is told what is not differentiated, and makes no gradient of the table then.
_leading.defvjp(_leading_kept, _leading_gradients, symbolic_zeros=True)


def _by_width(of: Callable[[int], Any], most: Array, tokens: int) -> Any:
    """of(a width of at least `most`): on a CPU one of few, elsewhere all tokens.

    Every branch's outputs are padded to all tokens, which costs an accelerator more memory than the
    smaller products save it time.  Mapped over `most`, all branches would run.
    """
    step = -(-tokens // _PARTS)
    widths = sorted({min(tokens, n * step) for n in range(1, _PARTS + 1)})

    def few(most: Array) -> Any:
        branches = [functools.partial(of, width) for width in widths]
        return jax.lax.switch(jnp.searchsorted(jnp.asarray(widths), most), branches)

    return jax.lax.platform_dependent(most, cpu=few, default=lambda _: of(tokens))


def _padded(x: Array, tokens: int) -> Array:
    return jnp.pad(x, ((0, 0), (0, tokens - x.shape[1]), *[(0, 0)] * (x.ndim - 2)))


def _logits(hidden_RCD: Array, table_VD: Array) -> Array:
    return product(hidden_RCD, table_VD.T, 1, jnp.float32)  # pyright: ignore[reportReturnType]


def _capped(logits: Array, softcap: float | None) -> tuple[Array, Any]:
    """Logits under the cap, and what their gradient is multiplied by."""
    if softcap is None:
        return logits, 1.0
    share = jnp.tanh(logits / softcap)
    return softcap * share, 1 - share * share


def _chosen(logits_RCV: Array, targets_RC: Array) -> Array:
    return jnp.take_along_axis(logits_RCV, targets_RC[..., None], axis=-1)[..., 0]


def _scores(
    table: Array, softcap: float | None, spread: Spread, hidden_RCD: Array, targets_RC: Array
) -> Array:
    hidden_RCD, targets_RC = spread.tokens(hidden_RCD), spread.tokens(targets_RC)
    # Pinned, and their gradient with them: what is below would send it all to the rows' devices.
    logits_RCV = spread.logits(_logits(hidden_RCD, table.astype(hidden_RCD.dtype)))
    logits_RCV, _ = _capped(logits_RCV, softcap)
    if spread.logits is _same:
        chosen = _chosen(logits_RCV, targets_RC)
    else:  # each device finds it among its words, or not: the compiler would exchange logits for it
        mine = jnp.arange(logits_RCV.shape[-1]) == targets_RC[..., None]
        chosen = jnp.sum(jnp.where(mine, logits_RCV, 0), axis=-1)
    return chosen - jax.nn.logsumexp(logits_RCV, axis=-1)
