import jax
import pytest

from mdpo_jax.model.families import (
    LayerKind,
    ModelConfig,
    Rope,
    count_params,
    param_shapes,
    weight_map,
)
from mdpo_jax.model.hf_config import from_hf, to_hf

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


# The fields of the published config.json files that decide shapes and attention.
PUBLISHED = {
    "gemma-2-9b-it": (
        9_241_705_984,
        {
            "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "vocab_size": 256000,
            "hidden_size": 3584, "intermediate_size": 14336, "num_hidden_layers": 42,
            "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256,
            "query_pre_attn_scalar": 256, "sliding_window": 4096, "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0, "rope_theta": 10000.0, "max_position_embeddings": 8192,
            "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh",
        },
    ),
    "gemma-3-4b-it": (
        3_880_263_168,
        {
            "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3",
            "text_config": {
                "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text",
                "num_hidden_layers": 34, "sliding_window": 1024,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            },
            "vision_config": {"model_type": "siglip_vision_model"},
        },
    ),
    "Mistral-7B-v0.3": (
        7_248_023_552,
        {
            "architectures": ["MistralForCausalLM"], "model_type": "mistral", "vocab_size": 32768,
            "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "rope_theta": 1000000.0,
            "sliding_window": None, "rms_norm_eps": 1e-05, "tie_word_embeddings": False,
            "max_position_embeddings": 32768, "hidden_act": "silu",
        },
    ),
    "Llama-3.1-8B-Instruct": (
        8_030_261_248,
        {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256,
            "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "rope_theta": 500000.0,
            "rope_scaling": {
                "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192, "rope_type": "llama3",
            },
            "rms_norm_eps": 1e-05, "tie_word_embeddings": False, "pretraining_tp": 1,
            "max_position_embeddings": 131072, "hidden_act": "silu", "mlp_bias": False,
        },
    ),
    "Qwen2.5-Math-7B": (
        7_615_616_512,
        {
            "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 152064,
            "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
            "num_attention_heads": 28, "num_key_value_heads": 4, "rope_theta": 10000.0,
            "sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 28,
            "rms_norm_eps": 1e-06, "tie_word_embeddings": False, "max_position_embeddings": 4096,
            "hidden_act": "silu",
        },
    ),
    "Qwen3-8B": (
        8_190_735_360,
        {
            "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 151936,
            "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
            "rope_theta": 1000000, "sliding_window": None, "use_sliding_window": False,
            "attention_bias": False, "rms_norm_eps": 1e-06, "tie_word_embeddings": False,
            "max_position_embeddings": 40960, "hidden_act": "silu",
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_give_the_published_sizes_and_round_trip(name):
    count, raw = PUBLISHED[name]
    config = from_hf(raw)
    assert count_params(config) == count
    assert from_hf(to_hf(config, raw, "bfloat16")) == config
    assert from_hf(to_hf(config, {}, "bfloat16")) == config


def test_windows_and_ropes_of_published_configs():
    kinds = {name: from_hf(raw) for name, (_, raw) in PUBLISHED.items()}
    gemma2, gemma3 = kinds["gemma-2-9b-it"], kinds["gemma-3-4b-it"]
    assert [gemma2.kind(i).window for i in range(4)] == [4096, None, 4096, None]
    assert (gemma2.attention_cap, gemma2.logit_cap, gemma2.scale) == (50.0, 30.0, 1 / 16)
    assert [gemma3.kind(i).window for i in range(7)] == [1024] * 5 + [None, 1024]
    assert gemma3.kind(0).rope == Rope(10000.0)
    assert gemma3.kind(5).rope == Rope(1e6, "linear", 8.0)
    # v0.3 sets the window to null, which is not transformers' default of 4096.
    assert kinds["Mistral-7B-v0.3"].kinds == (LayerKind(None, Rope(1e6)),)
    assert kinds["Qwen2.5-Math-7B"].kinds == (LayerKind(),)
    assert kinds["Llama-3.1-8B-Instruct"].kinds[0].rope == Rope(5e5, "llama3", 8, 1, 4, 8192)
    assert kinds["Mistral-7B-v0.3"].head_dim == 128


def test_a_mistral_config_that_is_silent_has_the_librarys_window():
    _, raw = PUBLISHED["Mistral-7B-v0.3"]
    silent = {k: v for k, v in raw.items() if k != "sliding_window"}
    assert from_hf(silent).kinds[0].window == 4096


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


GEMMA2, GEMMA3 = PUBLISHED["gemma-2-9b-it"][1], PUBLISHED["gemma-3-4b-it"][1]["text_config"]


@pytest.mark.parametrize(
    ("raw", "change", "words"),
    [
        (GEMMA2, {"hidden_activation": "gelu"}, ["hidden_act", "'gelu'"]),
        (GEMMA2, {"sliding_window": 0}, ["sliding_window", "at least 1"]),
        (GEMMA2, {"final_logit_softcapping": 0.0}, ["logit_cap", "more than 0"]),
        (GEMMA2, {"query_pre_attn_scalar": 0}, ["query_pre_attn_scalar", "more than 0"]),
        (GEMMA3, {"attn_logit_softcapping": 50.0}, ["attn_logit_softcapping", "expected null"]),
        (GEMMA_7B, {"rope_theta": 0.0}, ["rope theta", "more than 0"]),
        (GEMMA_7B, {"architectures": [5]}, ["architectures", "list of names"]),
        (GEMMA_7B, {"architectures": "GemmaForCausalLM"}, ["architectures", "list of names"]),
    ],
)
def test_what_would_be_computed_otherwise_elsewhere_is_refused(raw, change, words):
    with pytest.raises(ValueError, match=words[0]) as caught:
        from_hf(raw | change)
    assert all(word in str(caught.value) for word in words), caught.value


def test_unknown_family_is_refused():
    with pytest.raises(ValueError, match="'gemmma'; known: gemma"):
        ModelConfig("gemmma", 64, 32, 48, 2, 4, 2, 16)
