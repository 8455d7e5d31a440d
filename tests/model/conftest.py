import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdpo_jax.model.families import LayerKind, ModelConfig, Rope, param_shapes
from mdpo_jax.model.policy import Policy


@pytest.fixture(scope="session")
def config():
    return ModelConfig("gemma", 64, 32, 48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16)


def draw_params(config):
    """Random everywhere, the norms too."""
    rng = np.random.default_rng(0)

    def draw(x):
        return jnp.asarray(rng.normal(scale=0.2, size=x.shape), x.dtype)

    return jax.tree.map(draw, param_shapes(config))


@pytest.fixture(scope="session")
def params(config):
    return draw_params(config)


@pytest.fixture
def draw():
    """config -> random parameters."""
    return draw_params


@pytest.fixture(scope="session", params=["gemma2", "gemma3", "mistral", "qwen2"])
def windowed(request):
    """(config, params) of a model with windows of 6: in half of its layers, or in all."""
    both = (LayerKind(6, Rope(100.0)), LayerKind(None, Rope(10000.0)))
    kinds = both[:1] if request.param == "mistral" else both
    config = ModelConfig(
        request.param, 64, 32, 48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16,
        kinds=kinds, layer_kinds=() if len(kinds) == 1 else (0, 1), attention_cap=5.0,
        logit_cap=3.0, tied=False,
    )  # fmt: skip
    return config, draw_params(config)


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
