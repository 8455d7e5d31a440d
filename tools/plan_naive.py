"""The step that a plain DPO trainer runs, to compare memory with: nothing of ours but the blocks.

Each pair is two rows padded to the full length; the reference is a second model, scored in the step;
attention holds every layer's scores, nothing is computed again, and the logits of policy and
reference are whole, in float32.  Compute in bfloat16, policy and moments in float32, reference in
bfloat16, the state donated: as ours has it.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from plan_step import Setup, batch_rows, shapes_of_state

from mdpo_jax.model import attention, transformer


def dense(q_BTHK, k_BSGK, v_BSGK, segments_BT, *, scale, window, softcap, prefix=None):
    """Attention with all scores at once."""
    del prefix  # there is none
    length, heads = q_BTHK.shape[1:3]
    k, v = (jnp.repeat(x, heads // x.shape[2], axis=2) for x in (k_BSGK, v_BSGK))
    scores = jnp.einsum("bthk,bshk->bhts", q_BTHK, k, preferred_element_type=jnp.float32) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    apart = jnp.arange(length)[:, None] - jnp.arange(length)[None, :]
    mask = (apart >= 0) & (apart < (window or length))
    mask = mask & (segments_BT[:, :, None] == segments_BT[:, None, :])
    weights = jax.nn.softmax(jnp.where(mask[:, None], scores, -1e30), axis=-1)
    return jnp.einsum("bhts,bshk->bthk", weights.astype(v.dtype), v)


def lower(setup: Setup) -> Any:
    """The lowered step on one device, over as many rows as ours has in a micro-batch."""
    attention.BACKENDS["dense"] = dense
    model, optimiser = setup.model, setup.optimiser.transform()

    def log_probs(params: Any, tokens: Any, mask: Any) -> Any:
        ones = jnp.ones_like(tokens)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        hidden = transformer.hidden_states(
            model, params, tokens, positions, ones, dtype=jnp.bfloat16, backend="dense"
        )
        logits = transformer.logits(model, params, hidden[:, :-1])
        values = jax.nn.log_softmax(logits, axis=-1)
        chosen = jnp.take_along_axis(values, tokens[:, 1:, None], axis=-1)[..., 0]
        return jnp.sum(chosen * mask[:, 1:], axis=-1)

    def loss(params: Any, reference: Any, tokens: Any, mask: Any) -> Any:
        ratio = log_probs(params, tokens, mask) - jax.lax.stop_gradient(
            log_probs(reference, tokens, mask)
        )
        right, wrong = jnp.split(ratio, 2)
        return -jnp.mean(jax.nn.log_sigmoid(setup.config.train.eta * (right - wrong)))

    def step(state: Any, reference: Any, tokens: Any, mask: Any, rate: Any) -> Any:
        params, moments = state
        gradients = jax.grad(loss)(params, reference, tokens, mask)
        updates, moments = optimiser.update(gradients, moments, params)
        return optax.apply_updates(params, jax.tree.map(lambda u: -rate * u, updates)), moments

    state, reference = shapes_of_state(setup)
    tokens, mask, rate = batch_rows(setup)
    return jax.jit(step, donate_argnums=0).lower(state, reference, tokens, mask, rate)
