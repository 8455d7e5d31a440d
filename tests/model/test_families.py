import jax
import pytest

from mdpo_jax.model.families import (
    LayerKind,
    ModelConfig,
    Rope,
    count_params,
    from_hf,
    param_shapes,
    to_hf,
    weight_map,
)

GEMMA_7B = {
    "architectures": ["GemmaForCausalLM"],
    "model_type": "gemma",
    "vocab_size": 256000,
    "hidden_size": 3072,
    "intermediate_size": 24576,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 256,
    "rms_norm_eps": 1e-06,
    "max_position_embeddings": 8192,
    "rope_theta": 10000.0,
    "hidden_act": "gelu",
    "hidden_activation": None,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "rope_scaling": None,
    "torch_dtype": "bfloat16",
}


def test_gemma_7b_and_2b_have_the_published_sizes():
    assert count_params(from_hf(GEMMA_7B)) == 8_537_680_896
    smaller = {
        "hidden_size": 2048,
        "intermediate_size": 16384,
        "num_hidden_layers": 18,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
    }
    assert count_params(from_hf(GEMMA_7B | smaller)) == 2_506_172_416


def test_the_module_and_the_weight_map_agree_on_every_shape(config, params):
    shapes = jax.tree.map(lambda x: x.shape, param_shapes(config))
    assert jax.tree.map(lambda x: x.shape, params) == shapes
    for weight in weight_map(config):
        assert sorted(weight.axes.split()) == sorted(a for g in weight.groups for a in g)


def test_round_trip_through_both_transformers_dialects(config):
    written = to_hf(config, {"eos_token_id": 1}, "bfloat16")
    assert from_hf(written) == config
    assert written["dtype"] == written["torch_dtype"] == "bfloat16"
    assert written["architectures"] == ["GemmaForCausalLM"]
    assert written["eos_token_id"] == 1
    old = {k: v for k, v in written.items() if k != "rope_parameters"} | {"rope_theta": 5e5}
    new = {k: v for k, v in written.items() if k != "rope_theta"}
    new["rope_parameters"] = {"rope_type": "default", "rope_theta": 5e5}
    assert from_hf(old).kinds == from_hf(new).kinds == (LayerKind(rope=Rope(5e5)),)


def test_without_architectures_the_model_type_decides():
    raw = {k: v for k, v in GEMMA_7B.items() if k != "architectures"}
    assert from_hf(raw).family == "gemma"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architectures": ["MambaForCausalLM"]}, ["architectures", "MambaForCausalLM", "Gemma"]),
        ({"architectures": None, "model_type": "x"}, ["architectures", "'x'"]),
        ({"quantization_config": {"bits": 4}}, ["quantization_config", "quantised"]),
        ({"hidden_size": None}, ["hidden_size", "missing"]),
        ({"hidden_size": "big"}, ["hidden_size", "'big'", "int"]),
        ({"num_key_value_heads": 3}, ["num_kv_heads", "3", "16"]),
        ({"head_dim": 7}, ["head_dim", "7", "even"]),
        ({"hidden_act": "silu"}, ["hidden_act", "silu", "gelu_pytorch_tanh"]),
        ({"hidden_activation": "relu"}, ["hidden_act", "relu"]),
        ({"attention_bias": True}, ["attention_bias"]),
        ({"attention_dropout": 0.1}, ["attention_dropout", "0.1"]),
        ({"use_bidirectional_attention": True}, ["use_bidirectional_attention"]),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, ["rope_type", "dynamic"]),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, ["rope_type", "yarn"]),
    ],
)
def test_what_we_do_not_compute_is_refused_by_name(change, words):
    with pytest.raises(ValueError, match=words[0]) as caught:
        from_hf(GEMMA_7B | change)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_unknown_family_is_refused():
    with pytest.raises(ValueError, match="'gemmma'; known: gemma"):
        ModelConfig("gemmma", 64, 32, 48, 2, 4, 2, 16)
