"""Pure objectives: log-probabilities in, loss and metrics out."""

from mdpo_jax.objectives.likelihood import nll_loss
from mdpo_jax.objectives.logprobs import token_log_probs
from mdpo_jax.objectives.mdpo import mdpo_loss

__all__ = ["mdpo_loss", "nll_loss", "token_log_probs"]
