"""Gradients of kernels in the compute type: half the bytes of a micro-batch's, and the same values."""

import jax
import jax.numpy as jnp
import numpy as np

from mdpo_jax.model import lora
from mdpo_jax.model.families import ModelConfig
from mdpo_jax.model.lora import Lora
from mdpo_jax.model.transformer import init_params
from mdpo_jax.training.losses import Forward, log_probs
from mdpo_jax.training.step import _computed

CONFIG = ModelConfig("gemma", 64, 16, 32, 1, 2, 1, 8)
FORWARD = Forward("bfloat16", attention="reference")


def test_the_same_gradients_to_the_bit():
    params = init_params(CONFIG, jax.random.key(0))
    tokens = np.random.default_rng(0).integers(0, 64, (2, 12)).astype(np.int32)
    places = np.broadcast_to(np.arange(12, dtype=np.int32), tokens.shape)
    micro = {"tokens": tokens, "positions": places, "segments": np.ones_like(tokens)}
    grad = jax.jit(jax.grad(lambda p: jnp.sum(log_probs(CONFIG, FORWARD, p, micro))))
    plain, slim = grad(params), grad(_computed(FORWARD, params))
    halves = {x.dtype.name for x in jax.tree.leaves(slim["layers"]["mlp"])}
    assert halves == {"bfloat16"}
    assert slim["embedder"]["table"].dtype == slim["final_norm"]["weight"].dtype == jnp.float32
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(slim), strict=True):
        np.testing.assert_array_equal(a, b.astype(jnp.float32))


def test_adapters_keep_their_type():
    adapters = lora.init(CONFIG, Lora(2, 4.0), jax.random.key(0))
    kept = _computed(FORWARD, adapters)
    assert {x.dtype.name for x in jax.tree.leaves(kept)} == {"float32"}
