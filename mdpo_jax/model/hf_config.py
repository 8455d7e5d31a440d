"""Hugging Face's config.json to `ModelConfig` and back, in the spellings of transformers 4 and 5."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from mdpo_jax.model.families import FAMILIES, Family, LayerKind, ModelConfig, Rope

# What a config.json must say itself: transformers' defaults for these would be some other model's.
_ESSENTIAL = ("hidden_size", "intermediate_size", "num_hidden_layers")
_MULTIMODAL = ("Gemma3ForConditionalGeneration",)  # whose text half is one of FAMILIES
_ROPES = ("default", "linear", "llama3")
_NAMES = ("model_type", "architectures")


def from_hf(raw: Mapping[str, Any]) -> ModelConfig:
    """`ModelConfig` of a parsed config.json, which may be of transformers 4 or 5.

    The library's own config class fills in what the file leaves out.  Raises ValueError, with the
    field and its value, for an architecture outside `FAMILIES`, a missing or malformed field,
    quantised weights, or a feature that the decoder does not compute.
    """
    if raw.get("quantization_config"):
        raise ValueError("quantization_config: quantised weights; expected float weights")
    family = _family(raw)
    raw = text_config(raw)
    for name in _ESSENTIAL:
        if raw.get(name) is None:
            raise ValueError(f"{name}: missing in config.json of a {family} model")
    parsed = _parse(FAMILIES[family].model_type, raw)
    _refuse_unsupported(raw, parsed, FAMILIES[family])
    kinds, layer_kinds = _layers(parsed)
    scalar = getattr(parsed, "query_pre_attn_scalar", None)
    if scalar is not None and not scalar > 0:
        raise ValueError(f"query_pre_attn_scalar: {scalar}; expected more than 0")
    return ModelConfig(
        family=family,
        vocab_size=parsed.vocab_size,
        hidden_size=parsed.hidden_size,
        intermediate_size=parsed.intermediate_size,
        num_layers=parsed.num_hidden_layers,
        num_heads=parsed.num_attention_heads,
        num_kv_heads=parsed.num_key_value_heads,
        head_dim=_head_dim(parsed),
        rms_norm_eps=parsed.rms_norm_eps,
        max_positions=parsed.max_position_embeddings,
        tied=parsed.tie_word_embeddings,
        kinds=kinds,
        layer_kinds=layer_kinds,
        query_scale=None if scalar is None else scalar**-0.5,
        attention_cap=getattr(parsed, "attn_logit_softcapping", None),
        logit_cap=getattr(parsed, "final_logit_softcapping", None),
    )


def small_config(
    family: str, vocab_size: int, hidden_size: int, intermediate_size: int, num_layers: int,
    num_heads: int, num_kv_heads: int, head_dim: int,
) -> ModelConfig:  # fmt: skip
    """A model of these sizes that computes all that the family's released ones do.

    Every second layer of Gemma 2 and 3 has a window, of 64 tokens, so that a short text goes beyond
    it; Gemma 2 its caps, Gemma 3 its two kinds of RoPE, Qwen 2 its biases.
    """
    raw: dict[str, Any] = {
        "model_type": FAMILIES[family].model_type,
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": head_dim,
        "tie_word_embeddings": family.startswith("gemma"),
    }
    if FAMILIES[family].sandwich:
        kinds = ["sliding_attention", "full_attention"] * num_layers
        raw |= {"sliding_window": 64, "layer_types": kinds[:num_layers]}
        raw |= {"query_pre_attn_scalar": head_dim}
    if family == "gemma3":
        raw["rope_parameters"] = {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        }
    if family == "mistral":  # v0.3 has none
        raw["sliding_window"] = None
    return from_hf(raw)


def text_config(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """The text half of a multimodal config.json; any other as it is."""
    return raw["text_config"] if isinstance(raw.get("text_config"), Mapping) else raw


def _family(raw: Mapping[str, Any]) -> str:
    """By architecture, which names the head; by model_type only in a config that lacks it."""
    known = {family.architecture: name for name, family in FAMILIES.items()}
    types = {family.model_type: name for name, family in FAMILIES.items()}
    architectures = raw.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(a, str) for a in architectures):
        raise ValueError(f"architectures: {architectures!r}; expected a list of names")
    if not architectures and raw.get("model_type") in types:
        return types[raw["model_type"]]
    for architecture in architectures:
        if architecture in known:
            return known[architecture]
        half = text_config(raw).get("model_type")
        if architecture in _MULTIMODAL and half in types:
            return types[half]
    found = ", ".join(architectures) or f"none, with model_type {raw.get('model_type')!r}"
    raise ValueError(f"architectures: {found}; known: {', '.join([*known, *_MULTIMODAL])}")


def _parse(model_type: str, raw: Mapping[str, Any]) -> Any:
    """The config as transformers reads it: old spellings, defaults and layer types resolved."""
    from transformers import AutoConfig  # slow to import, and only reading a file needs it

    # A copy, for the library writes into nested dictionaries.
    fields = copy.deepcopy({k: v for k, v in raw.items() if k not in _NAMES})
    try:
        return AutoConfig.for_model(model_type, **fields)
    except Exception as error:  # the library raises all kinds of its own
        raise ValueError(f"not a {model_type} config: {' '.join(str(error).split())}") from None


def _refuse_unsupported(raw: Mapping[str, Any], parsed: Any, family: Family) -> None:
    named = raw.get("hidden_activation") or raw.get("hidden_act")
    if named is not None and named not in family.activations:
        accepted = ", ".join(family.activations)
        raise ValueError(f"hidden_act: {named!r}; expected one of {accepted}")
    for name in ("attention_bias", "mlp_bias"):
        if getattr(parsed, name, False):
            raise ValueError(f"{name}: true; expected false")
    if getattr(parsed, "attention_dropout", 0):
        raise ValueError(f"attention_dropout: {parsed.attention_dropout}; expected 0")
    if getattr(parsed, "use_bidirectional_attention", False):
        raise ValueError("use_bidirectional_attention: true; expected false or null")
    cap = getattr(parsed, "attn_logit_softcapping", None)
    if cap is not None and family.model_type != "gemma2":
        # transformers keeps the field and computes without it.
        raise ValueError(f"attn_logit_softcapping: {cap}; expected null in {family.model_type}")


def _head_dim(parsed: Any) -> int:
    """Explicit, or hidden_size over heads, which must then divide."""
    head_dim = getattr(parsed, "head_dim", None)
    if head_dim is not None:
        return head_dim
    if parsed.hidden_size % parsed.num_attention_heads:
        raise ValueError(
            f"num_attention_heads: {parsed.num_attention_heads} does not divide hidden_size "
            f"{parsed.hidden_size}, and there is no head_dim"
        )
    return parsed.hidden_size // parsed.num_attention_heads


def _layers(parsed: Any) -> tuple[tuple[LayerKind, ...], tuple[int, ...]]:
    """The kinds of layers in order of first use, and each layer's."""
    window = getattr(parsed, "sliding_window", None)
    # Without layer types (Mistral), a window is every layer's.
    default = "full_attention" if window is None else "sliding_attention"
    names = getattr(parsed, "layer_types", None) or [default] * parsed.num_hidden_layers
    kinds: list[LayerKind] = []
    layer_kinds = []
    for name in names:
        if name not in ("full_attention", "sliding_attention"):
            raise ValueError(f"layer_types: {name!r}; expected full_attention or sliding_attention")
        ropes = parsed.rope_parameters
        rope = _rope(ropes.get(name, ropes), parsed)
        kind = LayerKind(window if name == "sliding_attention" else None, rope)
        if kind not in kinds:
            kinds.append(kind)
        layer_kinds.append(kinds.index(kind))
    return tuple(kinds), tuple(layer_kinds) if len(kinds) > 1 else ()


def _rope(parameters: Mapping[str, Any], parsed: Any) -> Rope:
    kind = parameters.get("rope_type") or "default"
    if kind not in _ROPES:
        raise ValueError(f"rope_type: {kind!r}; expected one of {', '.join(_ROPES)}")
    if float(parameters.get("partial_rotary_factor") or 1.0) != 1.0:
        raise ValueError("partial_rotary_factor: expected 1")
    theta = float(parameters["rope_theta"])
    if kind == "default":
        return Rope(theta)
    factor = float(parameters["factor"])
    if kind == "linear":
        return Rope(theta, kind, factor)
    original = parameters.get("original_max_position_embeddings", parsed.max_position_embeddings)
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    return Rope(theta, kind, factor, float(low), float(high), int(original))


def to_hf(config: ModelConfig, extra: Mapping[str, Any], dtype: Any = "float32") -> dict[str, Any]:
    """A config.json that transformers 4 and 5 both read: `extra` with our fields over it.

    extra: the source's config.json, or {} for a model made from scratch.  dtype: of the weights.
    """
    traits, name = config.traits, str(jnp.dtype(dtype))
    # Gemma 2 and 3 have a field of their own.
    activation = "hidden_activation" if traits.sandwich else "hidden_act"
    return {
        activation: traits.activations[-1],
        **text_config(extra),
        "architectures": [traits.architecture],
        "model_type": traits.model_type,
        "dtype": name,
        "torch_dtype": name,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_positions,
        "tie_word_embeddings": config.tied,
        **_windows_to_hf(config),
        **_ropes_to_hf(config),
    }


def _windows_to_hf(config: ModelConfig) -> dict[str, Any]:
    """Windows, layer types and soft caps, in the families that have such fields."""
    windows = [config.kind(i).window for i in range(config.num_layers)]
    window = next((w for w in windows if w is not None), None)
    names = ["full_attention" if w is None else "sliding_attention" for w in windows]
    if config.family == "mistral":
        return {"sliding_window": window}
    if config.family in ("qwen2", "qwen3"):
        used = window is not None
        return {"use_sliding_window": used, "sliding_window": window, "layer_types": names}
    if config.family in ("gemma2", "gemma3"):
        return {
            "sliding_window": window,
            "layer_types": names,
            "query_pre_attn_scalar": round(config.scale**-2),
            "attn_logit_softcapping": config.attention_cap,
            "final_logit_softcapping": config.logit_cap,
        }
    return {}


def _ropes_to_hf(config: ModelConfig) -> dict[str, Any]:
    """Both dialects: `rope_theta` and `rope_scaling` (4), `rope_parameters` (5)."""
    by_type = {
        "full_attention" if kind.window is None else "sliding_attention": kind.rope
        for kind in config.kinds
    }
    main = by_type.get("full_attention", config.kinds[0].rope)
    # Version 4 warns of a theta among the scaling's fields.
    scaling = {k: v for k, v in _rope_to_hf(main).items() if k != "rope_theta"}
    fields = {
        "rope_theta": main.theta,
        "rope_scaling": None if main.kind == "default" else scaling,
    }
    if config.family != "gemma3":
        return {**fields, "rope_parameters": _rope_to_hf(main)}
    local = by_type.get("sliding_attention", main)
    nested = {"full_attention": _rope_to_hf(main), "sliding_attention": _rope_to_hf(local)}
    return {**fields, "rope_local_base_freq": local.theta, "rope_parameters": nested}


def _rope_to_hf(rope: Rope) -> dict[str, Any]:
    fields: dict[str, Any] = {"rope_type": rope.kind, "rope_theta": rope.theta}
    if rope.kind != "default":
        fields["factor"] = rope.factor
    if rope.kind == "llama3":
        fields |= {
            "low_freq_factor": rope.low_factor,
            "high_freq_factor": rope.high_factor,
            "original_max_position_embeddings": rope.original,
        }
    return fields
