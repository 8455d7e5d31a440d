"""Pure objectives: log-probabilities in, loss and metrics out; `gibbs` is the exact oracle."""

from mdpo_jax.objectives import gibbs
from mdpo_jax.objectives.likelihood import length_normalised, nll_loss, turn_discount_weights
from mdpo_jax.objectives.logprobs import Spread, token_log_probs
from mdpo_jax.objectives.mdpo import mdpo_loss
from mdpo_jax.objectives.mkto import kl_estimate, mismatched_rows, mkto_loss

__all__ = [
    "Spread",
    "gibbs",
    "kl_estimate",
    "length_normalised",
    "mdpo_loss",
    "mismatched_rows",
    "mkto_loss",
    "nll_loss",
    "token_log_probs",
    "turn_discount_weights",
]
