"""The loss of a step in the plainest code there is, and its gradient: float64, one sequence at a time.

No packing, no segments, no chunks, no scan, no mesh, whole logits; nothing of the package but the
numbers of its `ModelConfig`, the names of its parameters and the roles of tokens.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mdpo_jax.types import Role

LONGEST = 40


def norm(config, weight, x_TD):
    """Gemma's RMSNorm."""
    rms = jnp.sqrt(jnp.mean(x_TD**2, -1, keepdims=True) + config.rms_norm_eps)
    return x_TD / rms * (1 + weight)


def capped(x, cap):
    return x if cap is None else cap * jnp.tanh(x / cap)


def rotated(x_THK, theta):
    """Channel i turns with channel i + K/2, by its place times theta^(-2i/K)."""
    length, _, width = x_THK.shape
    angles = np.arange(length)[:, None] * theta ** (-2 * np.arange(width // 2) / width)
    turns = jnp.exp(1j * angles)[:, None]
    z = (x_THK[..., : width // 2] + 1j * x_THK[..., width // 2 :]) * turns
    return jnp.concatenate([z.real, z.imag], -1)


def attention(config, kind, p, x_TD):
    """Head by head, a mask of causality and window, scores capped before it."""
    places = np.arange(len(x_TD))
    seen = places[:, None] >= places[None]
    if kind.window is not None:
        seen &= places[:, None] - places[None] < kind.window
    q = rotated(jnp.einsum("td,dhk->thk", x_TD, p["query"]), kind.rope.theta)
    k = rotated(jnp.einsum("td,dhk->thk", x_TD, p["key"]), kind.rope.theta)
    v = jnp.einsum("td,dhk->thk", x_TD, p["value"])
    out = 0.0
    for head in range(config.num_heads):
        group = head // (config.num_heads // config.num_kv_heads)
        scores = q[:, head] @ k[:, group].T / np.sqrt(config.head_dim)
        scores = jnp.where(seen, capped(scores, config.attention_cap), -np.inf)
        out += jax.nn.softmax(scores) @ v[:, group] @ p["output"][head]
    return out


def log_probs(config, params, ids):
    """[length] log-prob of each token after those before it; 0 for the first."""
    return _log_probs(config, params, padded(ids))[: len(ids)]


def padded(values):
    """What is put behind a sequence is seen by nothing in it; it spares a program for each length."""
    assert len(values) <= LONGEST
    return np.pad(values, (0, LONGEST - len(values)))


@functools.partial(jax.jit, static_argnums=0)
def _log_probs(config, params, ids):
    x = params["embedder"]["table"][ids] * np.sqrt(config.hidden_size)
    for i in range(config.num_layers):
        p = jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"])
        y = norm(config, p["attention_norm"]["weight"], x)
        y = attention(config, config.kind(i), p["attention"], y)
        if "attention_post_norm" in p:
            y = norm(config, p["attention_post_norm"]["weight"], y)
        x = x + y
        y = norm(config, p["mlp_norm"]["weight"], x)
        y = jax.nn.gelu(y @ p["mlp"]["gate"]) * (y @ p["mlp"]["up"]) @ p["mlp"]["down"]
        if "mlp_post_norm" in p:
            y = norm(config, p["mlp_post_norm"]["weight"], y)
        x = x + y
    x = norm(config, params["final_norm"]["weight"], x)
    logits = capped(x @ params["embedder"]["table"].T, config.logit_cap)
    scores = jax.nn.log_softmax(logits)
    return jnp.pad(jnp.take_along_axis(scores[:-1], ids[1:, None], 1)[:, 0], (1, 0))


def summed(config, params, reference, sequence):
    """Sums over a sequence's action tokens, log pi and log pi / pi_ref, and how many there are."""
    ids, acted = padded(sequence.ids), padded(sequence.roles == Role.ACTION)
    policy = _log_probs(config, params, ids)
    ratio = policy - _log_probs(config, reference, ids)
    return jnp.sum(policy * acted), jnp.sum(ratio * acted), acted.sum()


def mdpo(config, params, reference, pairs, *, eta, nll=0.0, smoothing=0.0, means=False):
    """Equation 14 over (chosen, rejected, margin) and its metrics; nll: weight of -log pi a token.

    means: log-ratios a token.
    """
    losses, metrics = [], []
    for *sides, margin in pairs:
        (chosen, right, n), (rejected, wrong, m) = (
            summed(config, params, reference, side) for side in sides
        )
        z = eta * (right / n - wrong / m if means else right - wrong) - margin
        loss = -(1 - smoothing) * jax.nn.log_sigmoid(z) - smoothing * jax.nn.log_sigmoid(-z)
        losses.append(loss - nll * chosen / n)
        metrics.append({
            "loss/preference": loss, "loss/nll": -chosen / n, "logps/chosen": chosen,
            "logps/rejected": rejected, "rewards/chosen": eta * right,
            "rewards/rejected": eta * wrong, "term_c/margin_mean_abs": abs(margin),
        })  # fmt: skip
    return sum(losses) / len(pairs), jax.tree.map(lambda *xs: sum(xs) / len(xs), *metrics)


def mkto(config, params, reference, sequences, borrowed, *, eta, right=1.0, wrong=1.0):
    """Equation 15 over (sequence, correct); borrowed: what the reference point is a mean over."""
    ratios = [summed(config, params, reference, s)[1] for s in borrowed]
    point = jax.lax.stop_gradient(jnp.maximum(sum(ratios) / len(ratios), 0))
    losses, rewards = [], {True: [], False: []}
    for sequence, correct in sequences:
        ratio = summed(config, params, reference, sequence)[1]
        weight, sign = (right, 1) if correct else (wrong, -1)
        losses.append(weight * (1 - jax.nn.sigmoid(sign * eta * (ratio - point))))
        rewards[correct].append(eta * ratio)
    chosen, rejected = (sum(rewards[side]) / len(rewards[side]) for side in (True, False))
    found = {"kl": point, "rewards/chosen": chosen, "rewards/rejected": rejected}
    return sum(losses) / len(losses), found


def likelihood(config, params, reference, sequences):
    """The mean over all action tokens of -log pi."""
    sums = [summed(config, params, reference, s) for s in sequences]
    return -sum(s for s, _, _ in sums) / sum(n for _, _, n in sums), {}
