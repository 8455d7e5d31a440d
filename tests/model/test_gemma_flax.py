"""Checkpoints as google-deepmind/gemma releases them, written here from parameters of our own."""

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import support

from mdpo_jax.model import gemma_flax
from mdpo_jax.model.families import leaf, param_shapes
from mdpo_jax.model.hf_config import from_hf
from mdpo_jax.model.policy import Policy, load_policy
from mdpo_jax.model.sharding import make_mesh, param_shardings
from mdpo_jax.model.weights import CheckpointError

SIZES = {"vocab_size": 448, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
SIZES |= {"num_attention_heads": 4, "head_dim": 16}


def make(family, kv_heads):
    """(config, random parameters) of a small model with a released model's other settings."""
    kept = gemma_flax._released(family, 3, 8)
    config = from_hf({**SIZES, "num_key_value_heads": kv_heads, **kept})
    rng = np.random.default_rng(0)
    shapes = param_shapes(config)
    return config, jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.2, x.shape), x.dtype), shapes)


def official(config, params, *, turned, w=True):
    """{name: array} as the official code saves it."""

    def at(path, layer=None):
        x = np.asarray(leaf(params, path))
        return x if layer is None else x[layer]

    out = {
        "embedder/input_embedding": at("embedder/table"),
        "final_norm/scale": at("final_norm/weight"),
    }
    for i in range(config.num_layers):
        attention = {n: at(f"layers/attention/{n}", i) for n in ("query", "key", "value")}
        # [D, N, H] -> [N, D, H]
        q, k, v = (attention[n].swapaxes(0, 1) for n in ("query", "key", "value"))
        names = {"attn/attn_vec_einsum/w": at("layers/attention/output", i)}
        if config.num_heads == config.num_kv_heads:
            names["attn/qkv_einsum/w"] = np.stack([q, k, v])
        else:
            names |= {"attn/q_einsum/w": q, "attn/kv_einsum/w": np.stack([k, v])}
        gating = np.stack([at("layers/mlp/gate", i), at("layers/mlp/up", i)])
        last = "/w" if w else ""
        names[f"mlp/gating_einsum{last}"] = gating.swapaxes(1, 2) if turned else gating
        names[f"mlp/linear{last}"] = at("layers/mlp/down", i)
        norms = {"pre_attention_norm": "attention_norm", "pre_ffw_norm": "mlp_norm"}
        if config.traits.sandwich:
            norms |= {
                "post_attention_norm": "attention_post_norm",
                "post_ffw_norm": "mlp_post_norm",
            }
        if config.traits.qk_norm:
            norms |= {"attn/_query_norm": "attention/query_norm"}
            norms |= {"attn/_key_norm": "attention/key_norm"}
        names |= {f"{theirs}/scale": at(f"layers/{n}/weight", i) for theirs, n in norms.items()}
        out |= {f"layer_{i}/{name}": x for name, x in names.items()}
    return out


def save(folder, arrays, *, flat=True, dtype=jnp.float32):
    """The released form has two levels, `transformer/layer_0/attn/q_einsum` and `w`."""
    tree = {}
    for name, x in arrays.items():
        *parents, last = f"transformer/{name}".split("/")
        node = tree
        for key in ["/".join(parents)] if flat else parents:
            node = node.setdefault(key, {})
        node[last] = jnp.asarray(x, dtype)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "2b-it", tree if flat else {"params": tree})
    (folder / "tokenizer.model").write_bytes(support.tokenizer().sentencepiece_model)
    return folder


CASES = {
    "gemma, one key head": ("gemma", 1, {"turned": False}, {}),
    "gemma, as many key heads": ("gemma", 4, {"turned": False}, {}),
    "gemma2, turned": ("gemma2", 2, {"turned": True}, {}),
    "gemma2, not turned": ("gemma2", 2, {"turned": False}, {}),
    "gemma3, flat": ("gemma3", 2, {"turned": True}, {}),
    "gemma3, nested": ("gemma3", 1, {"turned": True, "w": False}, {"flat": False}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_same_logits_as_from_our_layout(case, tmp_path):
    family, kv_heads, form, layout = CASES[case]
    config, params = make(family, kv_heads)
    save(tmp_path, official(config, params, **form), **layout)
    ids = np.random.default_rng(1).integers(0, 448, (2, 9))
    found = load_policy(tmp_path)
    assert found.config == config
    jax.tree.map(np.testing.assert_array_equal, found.params, params)
    expected = Policy(config, params, None).logits(ids)
    np.testing.assert_array_equal(found.logits(ids), expected)


def test_onto_a_mesh_in_another_type(tmp_path):
    config, params = make("gemma2", 2)
    save(tmp_path, official(config, params, turned=True))
    mesh = make_mesh(fsdp=2, tensor=2)
    found = load_policy(tmp_path, "bfloat16", mesh).params
    shardings = param_shardings(config, mesh)
    jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim) or 1 / 0, found, shardings)
    expected = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_the_tokenizer_encodes_as_its_sentencepiece_model(tmp_path):
    import sentencepiece

    config, params = make("gemma", 1)
    save(tmp_path, official(config, params, turned=False))
    policy = load_policy(tmp_path)
    model = support.tokenizer().sentencepiece_model
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    text = "<start_of_turn>user\nWhat is 12 + 345?<end_of_turn>\n```python\nx = 1\n```  ä"
    assert policy.tokenizer.encode(text, add_special_tokens=False) == processor.encode(text)
    end = processor.piece_to_id("<end_of_turn>")
    assert policy.generation_config == {
        "bos_token_id": 2,
        "eos_token_id": [1, end],
        "pad_token_id": 0,
    }


def test_it_is_saved_as_a_hugging_face_folder(tmp_path):
    config, params = make("gemma3", 2)
    save(tmp_path, official(config, params, turned=True), dtype=jnp.bfloat16)
    again = load_policy(load_policy(tmp_path, "bfloat16").save(tmp_path / "hf"))
    assert again.config == config
    assert again.hf_config["eos_token_id"][0] == 1
    ids = np.arange(8)[None]
    np.testing.assert_array_equal(again.logits(ids), load_policy(tmp_path).logits(ids))


def test_released_settings_by_depth():
    sizes = {**SIZES, "num_key_value_heads": 1}

    def read(family, layers):
        kept = gemma_flax._released(family, layers, 144)
        return from_hf({**sizes, "num_hidden_layers": layers, **kept})

    assert read("gemma", 18).kinds[0].window is None
    assert (read("gemma2", 26).query_scale, read("gemma2", 46).query_scale) == (256**-0.5, 1 / 12)
    assert read("gemma2", 26).attention_cap == 50
    assert read("gemma2", 26).logit_cap == 30
    small, large = read("gemma3", 26), read("gemma3", 34)
    assert [k.window for k in small.kinds] == [512, None]
    assert [k.window for k in large.kinds] == [1024, None]
    assert [(k.rope.theta, k.rope.factor) for k in large.kinds] == [(1e4, 1.0), (1e6, 8.0)]
    assert small.kinds[1].rope.kind == "default"


BROKEN = {
    "missing array": ("layer_1/attn/kv_einsum/w", None, "missing array layer_1/attn/kv_einsum"),
    "missing layer": ("layer_1/", None, r"layers \[0, 2\]"),
    "no embedding": ("embedder/", None, "no embedder/input_embedding"),
    "wrong shape": ("layer_2/mlp/linear/w", lambda x: x[1:], r"\[47, 32\]; expected \[48, 32\]"),
    "NaN": ("layer_2/mlp/linear/w", lambda x: x * np.nan, "layer_2/mlp/linear: NaN or infinite"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_one_gives_one_clear_line(case, tmp_path):
    where, change, words = BROKEN[case]
    config, params = make("gemma", 1)
    arrays = official(config, params, turned=False)
    for name in [n for n in arrays if n.startswith(where)]:
        x = arrays.pop(name)
        if change:
            arrays[name] = change(x)
    save(tmp_path, arrays)
    with pytest.raises(CheckpointError, match=words) as caught:
        load_policy(tmp_path)
    assert "\n" not in str(caught.value)


def test_without_a_tokenizer(tmp_path):
    config, params = make("gemma", 1)
    save(tmp_path, official(config, params, turned=False))
    (tmp_path / "tokenizer.model").unlink()
    with pytest.raises(FileNotFoundError, match=r"expected tokenizer\.model"):
        load_policy(tmp_path)
