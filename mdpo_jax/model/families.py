"""Families of decoders: config.json -> `ModelConfig`, and one small table of weights a family.

A weight's `axes` are logical axis names; sizes follow from the config, mesh axes from the table in
sharding.py, and the file layout from `stored`, so a family is nothing but its entry in `FAMILIES`:

    layers/attention/query       axes   "embed heads head_dim"
    ...self_attn.q_proj.weight   stored "(heads head_dim) embed"
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """What the decoder needs to know of a model; `from_hf` makes it from a config.json."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    max_positions: int = 8192

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"family: {self.family!r}; known: {', '.join(FAMILIES)}")
        sizes = [f.name for f in dataclasses.fields(self) if f.type == "int"]
        for name in sizes:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}: {value!r}; expected a positive integer")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads: {self.num_kv_heads} does not divide num_heads {self.num_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim: {self.head_dim}; expected an even number, for RoPE")


@dataclasses.dataclass(frozen=True)
class Weight:
    """One entry of a weight map: where a tensor lies in our tree and in a checkpoint.

    path: ours, `layers/...` being stacked over layers.  name: theirs, with `{layer}` if stacked.
    axes: logical axes of one layer's tensor of ours.  stored: the same axes as they are stored,
    parentheses around those that one stored dimension holds.
    """

    path: str
    name: str
    axes: str
    stored: str

    @property
    def stacked(self) -> bool:
        return "{layer}" in self.name

    @property
    def logical_axes(self) -> tuple[str, ...]:
        """Of our leaf, the layer axis included."""
        return (*(["layers"] if self.stacked else []), *self.axes.split())

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """The axes that each stored dimension holds, outermost first."""
        found = re.findall(r"\(([^)]*)\)|(\w+)", self.stored)
        return tuple(tuple((group or single).split()) for group, single in found)

    def names(self, config: ModelConfig) -> list[str]:
        """The stored tensors of this leaf: one a layer, or one."""
        layers = range(config.num_layers) if self.stacked else [0]
        return [self.name.format(layer=i) for i in layers]

    def shape(self, config: ModelConfig) -> tuple[int, ...]:
        """Of our leaf, the layer axis included."""
        sizes = axis_sizes(config)
        return tuple(sizes[axis] for axis in self.logical_axes)

    def stored_shape(self, config: ModelConfig) -> tuple[int, ...]:
        """Of one stored tensor."""
        sizes = axis_sizes(config)
        return tuple(math.prod(sizes[axis] for axis in group) for group in self.groups)


@dataclasses.dataclass(frozen=True)
class Family:
    """A decoder family: its Hugging Face names and its weight map."""

    architecture: str
    activations: tuple[str, ...]
    weights: tuple[Weight, ...]


def _layer(path: str, name: str, axes: str, stored: str) -> Weight:
    return Weight(f"layers/{path}", f"model.layers.{{layer}}.{name}.weight", axes, stored)


FAMILIES: dict[str, Family] = {
    "gemma": Family(
        architecture="GemmaForCausalLM",
        # Old configs say "gelu" and mean tanh, 1.1 included.
        activations=("gelu", "gelu_pytorch_tanh"),
        weights=(
            Weight("embedder/table", "model.embed_tokens.weight", "vocab embed", "vocab embed"),
            Weight("final_norm/weight", "model.norm.weight", "norm", "norm"),
            _layer("attention_norm/weight", "input_layernorm", "norm", "norm"),
            _layer(
                "attention/query",
                "self_attn.q_proj",
                "embed heads head_dim",
                "(heads head_dim) embed",
            ),
            _layer(
                "attention/key",
                "self_attn.k_proj",
                "embed kv_heads head_dim",
                "(kv_heads head_dim) embed",
            ),
            _layer(
                "attention/value",
                "self_attn.v_proj",
                "embed kv_heads head_dim",
                "(kv_heads head_dim) embed",
            ),
            _layer(
                "attention/output",
                "self_attn.o_proj",
                "heads head_dim embed",
                "embed (heads head_dim)",
            ),
            _layer("mlp_norm/weight", "post_attention_layernorm", "norm", "norm"),
            _layer("mlp/gate", "mlp.gate_proj", "embed mlp", "mlp embed"),
            _layer("mlp/up", "mlp.up_proj", "embed mlp", "mlp embed"),
            _layer("mlp/down", "mlp.down_proj", "mlp embed", "embed mlp"),
        ),
    ),
}

_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "rms_norm_eps": "rms_norm_eps",
    "max_positions": "max_position_embeddings",
}


def axis_sizes(config: ModelConfig) -> dict[str, int]:
    """Logical axis of a weight -> its size."""
    return {
        "layers": config.num_layers,
        "vocab": config.vocab_size,
        "embed": config.hidden_size,
        "norm": config.hidden_size,
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "mlp": config.intermediate_size,
    }


def weight_map(config: ModelConfig) -> tuple[Weight, ...]:
    """The weights of a model of this config."""
    return FAMILIES[config.family].weights


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """`{"a/b": leaf}` -> `{"a": {"b": leaf}}`."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def leaf(params: Mapping[str, Any], path: str) -> Any:
    """The leaf of a nested tree at `a/b/c`."""
    for key in path.split("/"):
        params = params[key]
    return params


def param_shapes(config: ModelConfig, dtype: Any = jnp.float32) -> dict[str, Any]:
    """The stacked parameter tree as ShapeDtypeStructs."""
    return nest({w.path: jax.ShapeDtypeStruct(w.shape(config), dtype) for w in weight_map(config)})


def count_params(config: ModelConfig) -> int:
    """Number of parameters, the tied embedding counted once."""
    return sum(math.prod(w.shape(config)) for w in weight_map(config))


def from_hf(raw: Mapping[str, Any]) -> ModelConfig:
    """`ModelConfig` of a parsed config.json.

    Raises ValueError, with the field and its value, for an architecture outside `FAMILIES`, a
    missing or malformed field, quantised weights, or a feature that the decoder does not compute.
    """
    if raw.get("quantization_config"):
        raise ValueError("quantization_config: quantised weights; expected float weights")
    family = _family(raw)
    missing = [name for name in _FIELDS.values() if raw.get(name) is None]
    if missing:
        raise ValueError(f"{missing[0]}: missing in config.json of a {family} model")
    _refuse_unsupported(raw, FAMILIES[family])
    values = {ours: raw[theirs] for ours, theirs in _FIELDS.items()}
    return ModelConfig(family=family, rope_theta=_rope_theta(raw), **values)


def _family(raw: Mapping[str, Any]) -> str:
    """By architecture, which names the head; by model_type only in a config that lacks it."""
    known = {family.architecture: name for name, family in FAMILIES.items()}
    architectures = raw.get("architectures") or []
    if not architectures and raw.get("model_type") in FAMILIES:
        return raw["model_type"]
    for architecture in architectures:
        if architecture in known:
            return known[architecture]
    found = ", ".join(architectures) or f"none, with model_type {raw.get('model_type')!r}"
    raise ValueError(f"architectures: {found}; known: {', '.join(known)}")


def _refuse_unsupported(raw: Mapping[str, Any], family: Family) -> None:
    activation = raw.get("hidden_activation") or raw.get("hidden_act") or family.activations[0]
    if activation not in family.activations:
        accepted = ", ".join(family.activations)
        raise ValueError(f"hidden_act: {activation!r}; expected one of {accepted}")
    if raw.get("attention_bias"):
        raise ValueError("attention_bias: true; expected false")
    if raw.get("attention_dropout"):
        raise ValueError(f"attention_dropout: {raw['attention_dropout']}; expected 0")
    if raw.get("tie_word_embeddings") is False:
        raise ValueError("tie_word_embeddings: false; expected true")
    if raw.get("use_bidirectional_attention"):
        raise ValueError("use_bidirectional_attention: true; expected false or null")


def _rope_theta(raw: Mapping[str, Any]) -> float:
    """From `rope_parameters` (transformers 5) or `rope_theta` (4); default 10000."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind != "default":
        raise ValueError(f"rope_type: {kind!r}; expected 'default'")
    return float(rope.get("rope_theta") or raw.get("rope_theta") or 10000.0)


def to_hf(config: ModelConfig, extra: Mapping[str, Any], dtype: Any = "float32") -> dict[str, Any]:
    """A config.json that transformers 4 and 5 both read: `extra` with our fields over it.

    extra: the source's config.json, or {} for a model made from scratch.  dtype: of the weights.
    """
    family = FAMILIES[config.family]
    name = str(jnp.dtype(dtype))
    ours = {theirs: getattr(config, ours) for ours, theirs in _FIELDS.items()}
    return {
        "hidden_act": family.activations[-1],
        **extra,
        **ours,
        "architectures": [family.architecture],
        "model_type": config.family,
        "dtype": name,
        "torch_dtype": name,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": True,
    }
