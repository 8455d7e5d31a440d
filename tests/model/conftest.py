import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdpo_jax.model.families import ModelConfig, param_shapes
from mdpo_jax.model.policy import Policy


@pytest.fixture(scope="session")
def config():
    return ModelConfig("gemma", 64, 32, 48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16)


@pytest.fixture(scope="session")
def params(config):
    """Random everywhere, the norms too."""
    rng = np.random.default_rng(0)

    def draw(x):
        return jnp.asarray(rng.normal(scale=0.2, size=x.shape), x.dtype)

    return jax.tree.map(draw, param_shapes(config))


@pytest.fixture
def ids():
    """(rows, length, seed) -> random token ids."""

    def draw(rows, length, seed=0):
        return np.random.default_rng(seed).integers(1, 64, (rows, length)).astype(np.int32)

    return draw


@pytest.fixture(scope="session")
def policy(config, params, tmp_path_factory, save_tokenizer):
    """A policy with a tokenizer, made from scratch."""
    folder = tmp_path_factory.mktemp("scratch")
    save_tokenizer(folder, 64)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    return Policy(config, params, tokenizer, {"bos_token_id": 2, "eos_token_id": 1})


@pytest.fixture
def checkpoint(policy, tmp_path):
    """A saved folder that a test may spoil."""
    return policy.save(tmp_path / "checkpoint")
