"""On a mesh with `data`: what crosses it in a step, and what in each micro-batch."""

import jax
import jax.numpy as jnp
import pytest
from plan import setup, shape_of
from plan_chips import topology
from plan_hlo import collectives
from plan_step import lower

from mdpo_jax import recipes
from mdpo_jax.model.families import count_params, param_shapes
from mdpo_jax.model.hf_config import small_config
from mdpo_jax.model.sharding import make_mesh
from mdpo_jax.training.losses import Forward, scored


@pytest.fixture(scope="module")
def program():
    """(text, bytes of the parameters) of tiny's step on 2 x 2 devices, the first two a group."""
    flags = ["--config=tiny", "--config.mesh.data=2", "--config.mesh.fsdp=2"]
    config = recipes.parse(flags)
    model = shape_of(None, config)[1]
    step = setup(config, model, topology("cpu:4"))
    return lower(step).compile().as_text(), 4 * count_params(model)


def across(text, micros):
    found = collectives(text, micros, devices=4, slices=2)
    return sum(t.across for t in found.values())


def test_gradients_cross_the_groups_once_a_step(program):
    text, size = program
    once, nine = across(text, 1), across(text, 9)
    # Of each device's half of the gradients, to the other group and back at most.
    assert size / 4 < once < 1.5 * size
    # Sums of a sequence's tokens do in each micro-batch, and nothing of a weight's size.
    assert (nine - once) / 8 < size / 20


@pytest.mark.parametrize("attention", ["cudnn", "reference"])
def test_a_step_with_groups_is_traced_with_every_attention(attention, monkeypatch):
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91300)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda *_, **__: True)
    monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda *_, **__: False)
    model = small_config("gemma", 448, 64, 192, 2, 4, 2, 32)
    params, ids = param_shapes(model, jnp.float32), jax.ShapeDtypeStruct((2, 128), jnp.int32)
    forward = Forward("bfloat16", attention=attention)

    def total(params, tokens, segments):
        micro = {"tokens": tokens, "positions": tokens, "segments": segments}
        return scored(model, forward, params, micro)[0].sum()

    with jax.set_mesh(make_mesh(data=2)):
        found = str(jax.make_jaxpr(jax.grad(total))(params, ids, ids))
    assert ("dot_product_attention" in found) == (attention == "cudnn")
