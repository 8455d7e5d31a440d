"""LoRA on every family: what the decoder computes, what is trained, and the PEFT files."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mdpo_jax import config as run_config
from mdpo_jax.model import lora, sharding, transformer
from mdpo_jax.model.families import FAMILIES, LayerKind, ModelConfig, leaf, param_shapes
from mdpo_jax.model.lora import AdapterError, Lora

EVERY = Lora(3, 6.0)
SOME = Lora(2, 1.0, ("v_proj", "o_proj", "down_proj"))


def shape(family):
    """A model whose sizes all differ, with two kinds of layers where the family has them."""
    more = {}
    if family in ("gemma2", "gemma3"):
        more = {"kinds": (LayerKind(), LayerKind(window=4)), "layer_kinds": (0, 1)}
    return ModelConfig(family, 61, 20, 28, 2, 4, 2, 6, tied=family != "llama", **more)


def random_like(tree, seed, scale=0.2):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, scale, x.shape), x.dtype), tree)


def drawn(config, which, dtype=jnp.float32, seed=1):
    """A base and an adapter, random everywhere."""
    adapters = random_like(lora.init(config, which, jax.random.key(0), dtype), seed)
    return random_like(param_shapes(config), 0), adapters


@functools.partial(jax.jit, static_argnums=0)
def logits(config, params, ids):
    places = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    hidden = transformer.hidden_states(config, params, ids, places, jnp.ones_like(ids))
    return transformer.logits(config, params, hidden)


def tokens(rows=2, length=9):
    return np.random.default_rng(3).integers(1, 61, (rows, length)).astype(np.int32)


def near(found, expected, tolerance=1e-5):
    np.testing.assert_allclose(found, expected, atol=tolerance * float(jnp.abs(expected).max()))


@pytest.mark.parametrize("family", FAMILIES)
def test_combined_and_merged_give_the_same_logits(family):
    config = shape(family)
    base, adapters = drawn(config, EVERY)
    combined = lora.combine(base, adapters, EVERY)
    found, merged = (
        logits(config, p, tokens()) for p in (combined, lora.merge(base, adapters, EVERY))
    )
    near(found, merged)
    assert np.abs(found - logits(config, base, tokens())).max() > 0.1


@pytest.mark.parametrize("which", [EVERY, SOME], ids=["all", "some"])
def test_merging_is_numpys_float64_sum(which):
    config = shape("qwen2")
    base, adapters = drawn(config, which)
    merged = lora.merge(base, adapters, which)
    kernels = {
        half.weight.path.rsplit("_lora", 1)[0] for half in lora.halves(config, which).values()
    }
    assert len(kernels) == (7 if which is EVERY else 3)
    for path, x in jax.tree_util.tree_leaves_with_path(base):
        name = "/".join(key.key for key in path)
        if name not in kernels:
            assert leaf(merged, name) is x
            continue
        a, b = (np.asarray(leaf(adapters, name + part), np.float64) for part in (lora.A, lora.B))
        flat = a.reshape(2, -1, which.rank) @ b.reshape(2, which.rank, -1)
        near(
            leaf(merged, name),
            np.asarray(x) + which.alpha / which.rank * flat.reshape(x.shape),
            1e-6,
        )


def test_a_bfloat16_kernel_is_rounded_once():
    config = shape("gemma")
    base, adapters = drawn(config, EVERY)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), base)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), half)
    expected = lora.merge(wide, adapters, EVERY)
    for found, x in zip(
        jax.tree.leaves(lora.merge(half, adapters, EVERY)), jax.tree.leaves(expected), strict=True
    ):
        assert found.dtype == jnp.bfloat16
        np.testing.assert_array_equal(found, x.astype(jnp.bfloat16))
    kept = lora.fold(lora.combine(half, adapters, EVERY), jnp.float32)
    np.testing.assert_array_equal(kept["layers"]["mlp"]["up"], expected["layers"]["mlp"]["up"])


def test_a_new_adapter_is_the_base_to_the_bit_and_drawn_as_peft_draws_it():
    config = dataclasses.replace(shape("gemma"), hidden_size=400)
    base = random_like(param_shapes(config), 0)
    adapters = lora.init(config, EVERY, jax.random.key(4))
    np.testing.assert_array_equal(
        logits(config, lora.combine(base, adapters, EVERY), tokens()),
        logits(config, base, tokens()),
    )
    a = np.asarray(adapters["layers"]["mlp"]["up" + lora.A])
    bound = 400**-0.5
    assert 0.99 * bound < np.abs(a).max() <= bound
    assert np.std(a) == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert abs(a.mean()) < 0.02 * bound
    other = np.asarray(adapters["layers"]["mlp"]["gate" + lora.A])
    assert not np.array_equal(a, other)
    assert not np.asarray(adapters["layers"]["attention"]["output" + lora.B]).any()


@pytest.mark.parametrize("which", [EVERY, SOME], ids=["all", "some"])
def test_gradients_are_those_of_the_merged_weights_projected(which):
    """dA = alpha/r dW B^T and dB = alpha/r A^T dW, for W as one matrix [in, out]."""
    config = shape("qwen2")
    base, adapters = drawn(config, which)

    def loss(params):
        return jnp.mean(jnp.sin(logits(config, params, tokens())))

    found = jax.jit(jax.grad(lambda a: loss(lora.combine(base, a, which))))(adapters)
    whole = jax.jit(jax.grad(loss))(lora.merge(base, adapters, which))
    assert jax.tree.structure(found) == jax.tree.structure(adapters)
    for path, half in lora.halves(config, which).items():
        kernel, part = path[: -len(lora.A)], path[-len(lora.A) :]
        a, b = leaf(adapters, kernel + lora.A), leaf(adapters, kernel + lora.B)
        a, b = a.reshape(2, -1, which.rank), b.reshape(2, which.rank, -1)
        w = leaf(whole, kernel).reshape(2, a.shape[1], b.shape[2])
        projected = w @ b.mT if part == lora.A else a.mT @ w
        near(leaf(found, path), which.scale * projected.reshape(half.shape), 2e-5)


def test_the_number_of_trainable_parameters():
    """r (in + out) a projection and layer."""
    config = shape("llama")
    d, f, q, kv = 20, 28, 24, 12
    every = 3 * ((d + q) + 2 * (d + kv) + (q + d) + 3 * (d + f))
    assert lora.count(config, EVERY) == 2 * every
    assert lora.count(config, Lora(2, 1.0, ("q_proj",))) == 2 * 2 * (d + q)
    adapters = lora.init(config, EVERY, jax.random.key(0))
    assert sum(x.size for x in jax.tree.leaves(adapters)) == 2 * every


def test_decoding_with_an_adapter_equals_the_full_forward():
    config = shape("gemma2")
    base, adapters = drawn(config, EVERY)
    combined = lora.combine(base, adapters, EVERY)
    ids, expected = tokens(), logits(config, combined, tokens())
    for apart in (
        transformer.unstack(combined),
        lora.fold(transformer.unstack(combined)),
        transformer.unstack(lora.merge(base, adapters, EVERY)),
    ):
        step = jax.jit(lambda *a: transformer.extend(config, *a))
        cache, lengths = transformer.init_cache(config, 2, 9), jnp.zeros(2, jnp.int32)
        for start, stop in ((0, 5), (5, 6), (6, 9)):
            new = jnp.full(2, stop - start)
            hidden, cache = step(apart, cache, ids[:, start:stop], lengths, new)
            near(transformer.logits(config, apart, hidden), expected[:, start:stop])
            lengths = lengths + new


def test_folding_parameters_without_an_adapter_changes_nothing(config, params):
    for tree in (params, transformer.unstack(params)):
        assert jax.tree.all(jax.tree.map(lambda x, y: x is y, tree, lora.fold(tree)))


@pytest.mark.parametrize("sizes", [{"fsdp": 2, "tensor": 2}, {"data": 2, "fsdp": 2}], ids=str)
def test_on_a_mesh_it_is_sharded_as_the_base_is(sizes):
    config, mesh = shape("gemma"), sharding.make_mesh(**sizes)
    base, adapters = drawn(config, EVERY)
    expected = lora.merge(base, adapters, EVERY)
    where = lora.shardings(config, EVERY, mesh)
    assert jax.tree.structure(where) == jax.tree.structure(adapters)
    placed = jax.device_put(adapters, where)
    up = placed["layers"]["mlp"]
    tensor = mesh.shape["tensor"]
    assert up["up" + lora.A].sharding.shard_shape((2, 20, 3)) == (2, 10, 3)
    assert up["up" + lora.B].sharding.shard_shape((2, 3, 28)) == (2, 3, 28 // tensor)
    spread = jax.device_put(base, sharding.param_shardings(config, mesh))
    with jax.set_mesh(mesh):
        found = jax.jit(lambda b, a: lora.merge(b, a, EVERY))(spread, placed)
    jax.tree.map(near, found, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_peft_folder_comes_back_to_the_bit(family, tmp_path):
    config = shape(family)
    _, adapters = drawn(config, EVERY)
    folder = lora.write_peft(tmp_path / "adapter", adapters, config, EVERY, "the/base")
    found, which = lora.read_peft(folder, config)
    assert which == dataclasses.replace(EVERY, targets=run_config.PROJECTIONS)
    jax.tree.map(np.testing.assert_array_equal, found, adapters)
    stored = load_file(folder / lora.TENSORS)
    prefix = "base_model.model.model.layers.1"
    assert stored[f"{prefix}.self_attn.q_proj.lora_A.weight"].shape == (3, 20)
    assert stored[f"{prefix}.self_attn.o_proj.lora_A.weight"].shape == (3, 24)
    assert stored[f"{prefix}.mlp.down_proj.lora_B.weight"].shape == (20, 3)
    assert len(stored) == 2 * 2 * 7
    assert json.loads((folder / lora.CONFIG).read_text())["base_model_name_or_path"] == "the/base"
    assert not list(tmp_path.glob("*.partial"))
    with pytest.raises(FileExistsError, match="exists already"):
        lora.write_peft(folder, adapters, config, EVERY, "the/base")


def test_a_bfloat16_adapter_comes_back_to_the_bit(tmp_path):
    config = shape("gemma")
    _, adapters = drawn(config, SOME, jnp.bfloat16)
    lora.write_peft(tmp_path / "a", adapters, config, SOME, "base")
    found, _ = lora.read_peft(tmp_path / "a", config, jnp.bfloat16)
    jax.tree.map(np.testing.assert_array_equal, found, adapters)


@pytest.fixture
def adapter(tmp_path):
    """A PEFT folder that a test may spoil."""
    config = shape("gemma")
    return lora.write_peft(tmp_path / "adapter", drawn(config, SOME)[1], config, SOME, "base")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"peft_type": "IA3"}, "peft_type: 'IA3'; expected LORA"),
        ({"use_dora": True}, "use_dora: True; expected it unset"),
        ({"rank_pattern": {"q": 3}}, "rank_pattern: .* expected it unset"),
        ({"bias": "all"}, "bias: 'all'; expected none"),
        ({"r": 0}, r"lora\.rank: 0; expected at least 1"),
        ({"r": None}, "not a LoRA adapter's config"),
        (
            {"target_modules": ["c_attn"]},
            r"lora\.targets: 'c_attn'; expected all-linear or some of",
        ),
        ({"r": 4}, "shape .*; expected .*; an adapter of another base"),
        ({"target_modules": ["v_proj"]}, "8 in all.* is of no target of a gemma model of 2 layers"),
        ({"target_modules": "all-linear"}, "missing tensor .*q_proj.lora_A.weight"),
    ],
)
def test_an_adapter_that_we_do_not_compute_is_refused_in_one_line(adapter, fields, words):
    raw = json.loads((adapter / lora.CONFIG).read_text())
    (adapter / lora.CONFIG).write_text(json.dumps(raw | fields))
    with pytest.raises(AdapterError, match=words) as caught:
        lora.read_peft(adapter, shape("gemma"))
    assert "\n" not in str(caught.value)
    assert str(adapter) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_size": 24}, "shape .*; expected .*; an adapter of another base"),
        ({"num_layers": 3}, "missing tensor .*layers.2.*; an adapter of another base"),
        ({"num_layers": 1}, "in all.* is of no target of a gemma model of 1 layers"),
    ],
)
def test_an_adapter_of_another_base_is_refused(adapter, change, words):
    config = dataclasses.replace(shape("gemma"), **change)
    with pytest.raises(AdapterError, match=words):
        lora.read_peft(adapter, config)


def test_a_spoilt_file_is_refused(adapter):
    tensors = load_file(adapter / lora.TENSORS)
    name = next(iter(tensors))
    save_file({**tensors, name: np.full_like(tensors[name], np.nan)}, adapter / lora.TENSORS)
    with pytest.raises(AdapterError, match="NaN or infinite"):
        lora.read_peft(adapter, shape("gemma"))
    (adapter / lora.TENSORS).write_bytes(b"\x00" * 20)
    with pytest.raises(AdapterError, match="missing or corrupt"):
        lora.read_peft(adapter, shape("gemma"))
    (adapter / lora.TENSORS).unlink()
    with pytest.raises(AdapterError, match="missing or corrupt"):
        lora.read_peft(adapter, shape("gemma"))
    (adapter / lora.CONFIG).unlink()
    with pytest.raises(AdapterError, match="not a LoRA adapter's config"):
        lora.read_peft(adapter, shape("gemma"))


def test_wrong_settings_name_the_field():
    with pytest.raises(ValueError, match=r"lora\.rank: 0; expected at least 1"):
        Lora(0, 1.0)
    with pytest.raises(ValueError, match=r"lora\.alpha: 0; expected more than 0"):
        Lora(1, 0)
    with pytest.raises(ValueError, match=r"'fc1'; expected all-linear or some of q_proj, k_proj"):
        lora.resolve(shape("gemma"), Lora(1, 1.0, ("fc1",)))
    with pytest.raises(ValueError, match=r"lora\.targets: none"):
        lora.resolve(shape("gemma"), Lora(1, 1.0, ()))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_configuration_knows_every_projection(family):
    assert lora.resolve(shape(family), EVERY) == run_config.PROJECTIONS
    assert lora.resolve(shape(family), Lora(1, 1.0, ("up_proj", "q_proj"))) == ("q_proj", "up_proj")
