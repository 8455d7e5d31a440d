"""Every family: trajectories of the engine's cache against one full forward over all of each.

Slots are refilled in whatever order they finish, prompts are copied, observations of 1 to 2,000
tokens cross every bucket, and layers with windows shorter than the prompt lap their rings.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import Printer, chat, tokenizer

from mdpo_jax.model import transformer
from mdpo_jax.model.families import FAMILIES, LayerKind, ModelConfig, Rope, param_shapes
from mdpo_jax.rollout.engine import Engine, Limits, Request
from mdpo_jax.rollout.sampler import Sampler
from mdpo_jax.rollout.sampling import GREEDY, Sampling
from mdpo_jax.rollout.shapes import Shapes
from mdpo_jax.types import Problem, Role

LIMITS = Limits(
    max_turns=3, turn_tokens=9, trajectory_tokens=24, observation_tokens=2000, context=2304
)
# Rows decoded together: one, all of the six requests, and sizes that leave some for a refill.
SLOTS = dict(zip(FAMILIES, (1, 3, 5, 2, 4, 6, 3), strict=True))
PROBLEMS = [Problem(f"p/{i}", "Ana has beads" + " and cards" * (4 * i), "1") for i in range(3)]
SIZES = (1, 30, 200, 40, 2000)  # characters printed, some a token each


def small(family):
    """A model of the family with windows of 24 where it has windows, and its caps."""
    vocab = len(tokenizer())
    config = ModelConfig(
        family, vocab, 16, 32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8
    )
    window, whole = LayerKind(24, Rope(100.0)), LayerKind(None, Rope(10000.0))
    if family in ("gemma2", "gemma3"):
        config = dataclasses.replace(config, kinds=(window, whole), layer_kinds=(0, 1))
    if family == "mistral":
        config = dataclasses.replace(config, kinds=(window,))
    if family == "gemma2":
        config = dataclasses.replace(config, attention_cap=5.0, logit_cap=3.0)
    return config


def draw(config):
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.normal(scale=0.3, size=x.shape), x.dtype), param_shapes(config)
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_trajectories_equal_full_recomputation(family, monkeypatch):
    monkeypatch.setattr("mdpo_jax.rollout.engine.wants_tool", lambda text: True)
    config = small(family)
    params = draw(config)

    @jax.jit
    def scores(tokens):
        places = jnp.arange(tokens.shape[1])[None]
        hidden = transformer.hidden_states(config, params, tokens, places, jnp.ones_like(tokens))
        return jax.nn.log_softmax(transformer.logits(config, params, hidden)[0])

    requests = [Request(p, s, "0/exact") for p in PROBLEMS for s in range(2)]
    monkeypatch.setattr("mdpo_jax.rollout.sampler._FEWEST", 1)  # decode a part of the rows
    # Only what is used is compiled, and once for both runs.
    monkeypatch.setattr(Sampler, "warm_up", lambda self, state, *_: state)
    context, slots = LIMITS.context, SLOTS[family]
    rows = tuple(sorted({1, slots}))
    shapes = Shapes(slots, context, 4, rows, (64, 512, context), (256, 512, context))
    sampler = Sampler(config, shapes, chat().stop_ids, "float32")
    sampler.load(params)
    found = {}
    for order, sampling in ((1, GREEDY), (-1, Sampling())):
        engine = Engine(sampler, chat(), Printer(SIZES), LIMITS)
        found[sampling] = engine.run(requests[::order], policy="x", sampling=sampling)
        assert engine.activity.copied > 0
    observed = [0]
    for sampling, trajectories in found.items():
        for t in trajectories:
            table = np.asarray(scores(jnp.asarray(np.pad(t.ids, (0, context - len(t.ids))))[None]))
            acted = np.flatnonzero(t.roles == Role.ACTION)
            np.testing.assert_allclose(
                t.log_probs[acted], table[acted - 1, t.ids[acted]], atol=1e-4
            )
            if sampling is GREEDY:
                assert t.ids[acted].tolist() == table[acted - 1].argmax(-1).tolist()
            observed += [b.start - a.stop for a, b in zip(t.actions, t.actions[1:], strict=False)]
    assert min(observed) < 20
    assert max(observed) > 0.75 * LIMITS.observation_tokens
