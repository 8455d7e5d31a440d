"""FLOPs that a step needs by formula: what utilisation is measured in.

    weights    2 a token and matmul weight, the head's for tokens whose log-prob is asked for; the
               embedding is a lookup
    attention  2 x 2 x head_dim a head, for every token and each that it sees in its own sequence

A backward pass takes the forward's again for the inputs and once more for the weights.  What is
computed again (remat), padding and what a kernel does beyond the mask are no use and not counted.
"""

from __future__ import annotations

from collections.abc import Sequence

from mdpo_jax.model import lora
from mdpo_jax.model.families import ModelConfig
from mdpo_jax.model.lora import Lora


def step_flops(
    config: ModelConfig, lengths: Sequence[int], scored: int, *, adapter: Lora | None = None,
    reference: bool = False,
) -> float:  # fmt: skip
    """Of a forward and a backward pass over sequences of these lengths.

    scored: tokens that the head sees.  adapter: what is trained in place of the weights, which then
    have no gradient of their own.  reference: its forward pass is part of the step.
    """
    forward = forward_flops(config, lengths, scored, adapter=adapter)
    frozen = _weights(config, lengths, scored) if adapter is not None else 0
    return 3 * forward - frozen + (forward if reference else 0)


def forward_flops(
    config: ModelConfig, lengths: Sequence[int], scored: int, *, adapter: Lora | None = None
) -> float:
    """Of a forward pass alone, with the halves of an adapter beside the weights."""
    extra = 0 if adapter is None else 2 * lora.count(config, adapter) * sum(lengths)
    return _weights(config, lengths, scored) + _attention(config, lengths) + extra


def _weights(config: ModelConfig, lengths: Sequence[int], scored: int) -> float:
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    layer = config.hidden_size * (2 * queries + 2 * keys + 3 * config.intermediate_size)
    head = config.vocab_size * config.hidden_size
    return 2 * (config.num_layers * layer * sum(lengths) + head * scored)


def _attention(config: ModelConfig, lengths: Sequence[int]) -> float:
    """Half of length x length is seen, but for what is beyond a layer's window."""
    seen = 0
    for layer in range(config.num_layers):
        window = config.kind(layer).window
        beyond = 0 if window is None else sum(max(0, n - window) ** 2 for n in lengths)
        seen += sum(n * n for n in lengths) - beyond
    return 2 * config.num_heads * config.head_dim * seen
