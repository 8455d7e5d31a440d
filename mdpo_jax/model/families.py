"""Families of decoders: `ModelConfig`, what a family computes, and its map of weights.

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
class Rope:
    """Rotary frequencies: base theta, and how a longer context stretches them.

    kind: default | linear (all frequencies over `factor`) | llama3 (low ones over `factor`, those
    between low_factor and high_factor turns of `original` positions interpolated).
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_factor: float = 1.0
    high_factor: float = 4.0
    original: int = 8192

    def __post_init__(self) -> None:
        for name in ("theta", "factor"):
            if not getattr(self, name) > 0:
                raise ValueError(f"rope {name}: {getattr(self, name)}; expected more than 0")


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """What differs between layers of one model: the sliding window (None: all before) and RoPE."""

    window: int | None = None
    rope: Rope = Rope()

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(f"sliding_window: {self.window}; expected at least 1, or null")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """What the decoder needs to know of a model; hf_config.py makes it from a config.json.

    kinds, layer_kinds: the one or two kinds of layers, and the index of each layer's kind (empty:
    all of the first).  query_scale: factor on the scores, None for head_dim**-0.5.
    attention_cap, logit_cap: soft caps, cap * tanh(x / cap), None for none.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    max_positions: int = 8192
    tied: bool = True
    kinds: tuple[LayerKind, ...] = (LayerKind(),)
    layer_kinds: tuple[int, ...] = ()
    query_scale: float | None = None
    attention_cap: float | None = None
    logit_cap: float | None = None

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
        for name in ("query_scale", "attention_cap", "logit_cap", "rms_norm_eps"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}: {value}; expected more than 0")
        if self.layer_kinds and len(self.layer_kinds) != self.num_layers:
            raise ValueError(
                f"layer_kinds: {len(self.layer_kinds)} of them; expected {self.num_layers}"
            )

    @property
    def traits(self) -> Family:
        """What the family computes."""
        return FAMILIES[self.family]

    @property
    def scale(self) -> float:
        """Factor on attention scores."""
        return self.head_dim**-0.5 if self.query_scale is None else self.query_scale

    def kind(self, layer: int) -> LayerKind:
        """Of one layer."""
        return self.kinds[self.layer_kinds[layer] if self.layer_kinds else 0]


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
    """What a family computes, as a row of the table; all else is read from config.json.

    activations: accepted names, of which the last is written.  unit_offset: RMSNorm multiplies by
    1 + w in float32 and casts afterwards; else it casts first and multiplies by w.
    scaled_embedding: tokens times sqrt(hidden_size).  qkv_bias, qk_norm: on the projections, and a
    norm over head_dim before RoPE.  sandwich: norms behind attention and MLP too.
    """

    architecture: str
    model_type: str
    activations: tuple[str, ...] = ("silu",)
    unit_offset: bool = False
    scaled_embedding: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    sandwich: bool = False


# Old Gemma configs say "gelu" and mean tanh, 1.1 included.
_OLD_TANH, _TANH = ("gelu", "gelu_pytorch_tanh"), ("gelu_pytorch_tanh",)
_GEMMA: dict[str, Any] = {"unit_offset": True, "scaled_embedding": True}

FAMILIES: dict[str, Family] = {
    "gemma": Family("GemmaForCausalLM", "gemma", _OLD_TANH, **_GEMMA),
    "gemma2": Family("Gemma2ForCausalLM", "gemma2", _TANH, **_GEMMA, sandwich=True),
    "gemma3": Family(
        "Gemma3ForCausalLM", "gemma3_text", _TANH, **_GEMMA, sandwich=True, qk_norm=True
    ),
    "llama": Family("LlamaForCausalLM", "llama"),
    "mistral": Family("MistralForCausalLM", "mistral"),
    "qwen2": Family("Qwen2ForCausalLM", "qwen2", qkv_bias=True),
    "qwen3": Family("Qwen3ForCausalLM", "qwen3", qk_norm=True),
}


def _layer(path: str, name: str, axes: str, stored: str = "") -> Weight:
    return Weight(f"layers/{path}", f"model.layers.{{layer}}.{name}", axes, stored or axes)


_QUERY, _KEY = ("heads head_dim", "(heads head_dim)"), ("kv_heads head_dim", "(kv_heads head_dim)")
_EVERY = (
    Weight("embedder/table", "model.embed_tokens.weight", "vocab embed", "vocab embed"),
    Weight("final_norm/weight", "model.norm.weight", "norm", "norm"),
    _layer("attention_norm/weight", "input_layernorm.weight", "norm"),
    _layer(
        "attention/query", "self_attn.q_proj.weight", f"embed {_QUERY[0]}", f"{_QUERY[1]} embed"
    ),
    _layer("attention/key", "self_attn.k_proj.weight", f"embed {_KEY[0]}", f"{_KEY[1]} embed"),
    _layer("attention/value", "self_attn.v_proj.weight", f"embed {_KEY[0]}", f"{_KEY[1]} embed"),
    _layer(
        "attention/output", "self_attn.o_proj.weight", f"{_QUERY[0]} embed", f"embed {_QUERY[1]}"
    ),
    _layer("mlp/gate", "mlp.gate_proj.weight", "embed mlp", "mlp embed"),
    _layer("mlp/up", "mlp.up_proj.weight", "embed mlp", "mlp embed"),
    _layer("mlp/down", "mlp.down_proj.weight", "mlp embed", "embed mlp"),
)
_PLAIN = (_layer("mlp_norm/weight", "post_attention_layernorm.weight", "norm"),)
_SANDWICH = (
    _layer("attention_post_norm/weight", "post_attention_layernorm.weight", "norm"),
    _layer("mlp_norm/weight", "pre_feedforward_layernorm.weight", "norm"),
    _layer("mlp_post_norm/weight", "post_feedforward_layernorm.weight", "norm"),
)
_QKV_BIAS = (
    _layer("attention/query_bias", "self_attn.q_proj.bias", *_QUERY),
    _layer("attention/key_bias", "self_attn.k_proj.bias", *_KEY),
    _layer("attention/value_bias", "self_attn.v_proj.bias", *_KEY),
)
_QK_NORM = (
    _layer("attention/query_norm/weight", "self_attn.q_norm.weight", "head_dim"),
    _layer("attention/key_norm/weight", "self_attn.k_norm.weight", "head_dim"),
)
_HEAD = (Weight("head/table", "lm_head.weight", "vocab embed", "vocab embed"),)


def weight_map(config: ModelConfig) -> tuple[Weight, ...]:
    """The weights of a model of this config."""
    traits = config.traits
    optional = (
        (_SANDWICH, traits.sandwich),
        (_PLAIN, not traits.sandwich),
        (_QKV_BIAS, traits.qkv_bias),
        (_QK_NORM, traits.qk_norm),
        (_HEAD, not config.tied),
    )
    return _EVERY + tuple(weight for group, there in optional if there for weight in group)


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
