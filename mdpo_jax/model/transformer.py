"""One decoder for all families, in two forms over the same blocks.

    training  `hidden_states`  layers stacked [L, ...] and scanned, packed rows, no cache
    decoding  `extend`         layers apart (`layer_0`, ...), each with its own cache arrays

Scanning over a stacked cache copies it in each step; apart, a donated cache is updated in place.
What a family computes is read from `ModelConfig.traits`; there is no class a family.  A projection
whose leaf `NAME` has neighbours `NAME_lora_a` and `NAME_lora_b` adds their product (lora.py).

Suffixes: B or R rows, T tokens, D hidden, H heads, G key heads, K head_dim, F mlp, S cache length,
V vocab.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from mdpo_jax.model import caching, tiles
from mdpo_jax.model.attention import attend, attend_cache
from mdpo_jax.model.caching import Cache
from mdpo_jax.model.families import ModelConfig, Rope
from mdpo_jax.model.kernels import Prefix
from mdpo_jax.model.sharding import anywhere, constrain
from mdpo_jax.products import product

Params = dict[str, Any]

_MOST_UNROLLED = 12  # layers: the time to compile grows with them

REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class RMSNorm(nn.Module):
    """x / rms(x) * w in float32: Gemma's 1 + w is applied before the cast, others' w after it."""

    config: ModelConfig
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        offset = self.config.traits.unit_offset
        init = nn.initializers.zeros if offset else nn.initializers.ones
        w = self.param("weight", init, x.shape[-1:], self.param_dtype)
        eps = self.config.rms_norm_eps
        if x.ndim != 3:
            return _normed(x, w, offset, eps)
        # As a matrix: XLA's sums of its gradient take a tenth of the time on a CPU.  Heads, which a
        # mesh may split, stay an axis of their own.
        return _normed(x.reshape(-1, x.shape[-1]), w, offset, eps).reshape(x.shape)


# Under a scan, what is kept for its gradient is x alone.
@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=(2, 3))
def _normed(x: jax.Array, w: jax.Array, offset: bool, eps: float) -> jax.Array:
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    if offset:
        return (y * (1.0 + w.astype(jnp.float32))).astype(x.dtype)
    return y.astype(x.dtype) * w.astype(x.dtype)


class Embedder(nn.Module):
    """The table; in Gemma tokens come out times sqrt(D), the scalar rounded to the compute dtype."""

    config: ModelConfig
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        c = self.config
        table_VD = _table(self, c, self.param_dtype)
        x_BTD = jnp.take(table_VD, tokens_BT, axis=0, mode="clip").astype(self.dtype)
        if c.traits.scaled_embedding:
            x_BTD = x_BTD * jnp.asarray(c.hidden_size**0.5, self.dtype)
        return x_BTD


class Head(nn.Module):
    """The table of an untied head: only holds it, `unembedding` reads it."""

    config: ModelConfig
    param_dtype: Any

    @nn.compact
    def __call__(self) -> None:
        _table(self, self.config, self.param_dtype)


def _table(module: nn.Module, config: ModelConfig, dtype: Any) -> jax.Array:
    init = nn.initializers.normal(config.hidden_size**-0.5)
    return module.param("table", init, (config.vocab_size, config.hidden_size), dtype)


class Projections(nn.Module):
    """What attention and MLP share: kernels whose first axes are contracted with x's last."""

    config: ModelConfig
    dtype: Any
    param_dtype: Any

    def kernel(self, name: str, shape: tuple[int, ...], inputs: int) -> jax.Array:
        return self.param(name, _fan_in(inputs, len(shape)), shape, self.param_dtype)

    def project(self, name: str, kernel: jax.Array, x: jax.Array, inputs: int = 1) -> jax.Array:
        """x @ kernel, plus the low-rank x @ a @ b of an adapter where there is one."""
        y: Any = self._few_rows(name, kernel, x, inputs)
        if y is None:
            y = product(x, kernel.astype(self.dtype), inputs)
        if self.has_variable("params", f"{name}_lora_a"):
            a, b = (self.get_variable("params", f"{name}_lora_{part}") for part in "ab")
            low = jnp.tensordot(x, a.astype(self.dtype), inputs)
            y = y + jnp.tensordot(low, b.astype(self.dtype), 1)
        return y

    def _few_rows(self, name: str, kernel: jax.Array, x: jax.Array, inputs: int) -> Any:
        """x @ kernel by the kernel's tiles; None where it has none, or x has many rows."""
        if not self.has_variable("params", f"{name}_tiles"):
            return None
        x_BTD = x.reshape(*x.shape[: x.ndim - inputs], -1)
        y = tiles.product(x_BTD, self.get_variable("params", f"{name}_tiles"))
        return None if y is None else y.reshape(*x_BTD.shape[:-1], *kernel.shape[inputs:])


class Attention(Projections):
    """Grouped-query attention with rotary positions."""

    backend: str = "auto"

    def setup(self) -> None:
        c = self.config
        d, h, g, k = c.hidden_size, c.num_heads, c.num_kv_heads, c.head_dim
        self.query = self.kernel("query", (d, h, k), 1)
        self.key = self.kernel("key", (d, g, k), 1)
        self.value = self.kernel("value", (d, g, k), 1)
        self.output = self.kernel("output", (h, k, d), 2)
        if c.traits.qkv_bias:
            zeros = nn.initializers.zeros
            self.query_bias = self.param("query_bias", zeros, (h, k), self.param_dtype)
            self.key_bias = self.param("key_bias", zeros, (g, k), self.param_dtype)
            self.value_bias = self.param("value_bias", zeros, (g, k), self.param_dtype)
        if c.traits.qk_norm:
            self.query_norm = RMSNorm(c, self.param_dtype)
            self.key_norm = RMSNorm(c, self.param_dtype)

    def _heads(self, x_BTD: jax.Array, rope: tuple[jax.Array, jax.Array]) -> tuple:
        q_BTHK = self.project("query", self.query, x_BTD)
        k_BTGK = self.project("key", self.key, x_BTD)
        v_BTGK = self.project("value", self.value, x_BTD)
        if self.config.traits.qkv_bias:
            q_BTHK = q_BTHK + self.query_bias.astype(self.dtype)
            k_BTGK = k_BTGK + self.key_bias.astype(self.dtype)
            v_BTGK = v_BTGK + self.value_bias.astype(self.dtype)
        if self.config.traits.qk_norm:
            q_BTHK, k_BTGK = self.query_norm(q_BTHK), self.key_norm(k_BTGK)
        return _rotate(q_BTHK, rope), _rotate(k_BTGK, rope), v_BTGK

    def _merge(self, out_BTHK: jax.Array) -> jax.Array:
        return self.project("output", self.output, out_BTHK, 2)

    def __call__(self, x_BTD, ropes, packed, kind):
        """packed: segments, and their prefixes or None.  kind: index of the layer's kind, a number
        or (under a scan) an array."""
        c = self.config
        q, k, v = self._heads(x_BTD, _pick(ropes, kind))

        def run(window: int | None):
            def attention(q, k, v):
                return attend(
                    q, k, v, segments=packed[0], scale=c.scale, window=window,
                    softcap=c.attention_cap, prefix=packed[1], backend=self.backend,
                )  # fmt: skip

            return attention

        if len(c.kinds) == 1:
            return self._merge(run(c.kinds[0].window)(q, k, v))
        # A window is static in every kernel, so each kind is a branch; only one of them runs.
        branches = [run(kind.window) for kind in c.kinds]
        return self._merge(jax.lax.switch(kind, branches, q, k, v))

    def extend(self, x_RTD, rope, kind, cache, span):
        """Appends keys and values to the layer's cache, then attends to it."""
        c = self.config
        q, k_RTGK, v_RTGK = self._heads(x_RTD, rope)
        attended, cache = caching.append(cache, k_RTGK, v_RTGK, span, kind.window)
        out = attend_cache(
            q, attended.keys, attended.values, span.positions, attended.places, scale=c.scale,
            window=kind.window, softcap=c.attention_cap,
        )  # fmt: skip
        return self._merge(out), cache


# Its gradient computes it again: kept instead, a scanned layer stacks eight arrays of the MLP's
# width in place of three, and writing those costs more than the activation.  Unrolled, XLA shares
# what is equal with the forward pass.
@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=2)
def _gated(gate: jax.Array, up: jax.Array, silu: bool) -> jax.Array:
    return (nn.silu(gate) if silu else nn.gelu(gate, approximate=True)) * up


class MLP(Projections):
    """down(activation(gate(x)) * up(x)); GELU by its tanh formula in Gemma, SiLU elsewhere."""

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        d, f = self.config.hidden_size, self.config.intermediate_size
        gate_DF, up_DF = self.kernel("gate", (d, f), 1), self.kernel("up", (d, f), 1)
        down_FD = self.kernel("down", (f, d), 1)
        gate_BTF = self.project("gate", gate_DF, x_BTD)
        up_BTF = self.project("up", up_DF, x_BTD)
        silu = self.config.traits.activations == ("silu",)
        return self.project("down", down_FD, _gated(gate_BTF, up_BTF, silu))


class Block(nn.Module):
    """Pre-norm attention and MLP, each with a residual; a sandwich norms their outputs too."""

    config: ModelConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    backend: str = "auto"

    def setup(self) -> None:
        c, dtypes = self.config, (self.dtype, self.param_dtype)
        self.attention_norm = RMSNorm(c, self.param_dtype)
        self.attention = Attention(c, *dtypes, self.backend)
        self.mlp_norm = RMSNorm(c, self.param_dtype)
        self.mlp = MLP(c, *dtypes)
        if c.traits.sandwich:
            self.attention_post_norm = RMSNorm(c, self.param_dtype)
            self.mlp_post_norm = RMSNorm(c, self.param_dtype)

    def _finish(self, x_BTD, attended_BTD):
        """The residuals, and the MLP between them."""
        sandwich = self.config.traits.sandwich
        x_BTD = x_BTD + (self.attention_post_norm(attended_BTD) if sandwich else attended_BTD)
        out_BTD = self.mlp(self.mlp_norm(x_BTD))
        return x_BTD + (self.mlp_post_norm(out_BTD) if sandwich else out_BTD)

    def __call__(self, x_BTD, ropes, packed, kind):
        """Returns (x, None), as a scan's body does."""
        attended = self.attention(self.attention_norm(x_BTD), ropes, packed, kind)
        return constrain(self._finish(x_BTD, attended), "rows", None, None), None

    def extend(self, x_RTD, rope, kind, cache, span):
        """Returns (x, the layer's cache)."""
        out, cache = self.attention.extend(self.attention_norm(x_RTD), rope, kind, cache, span)
        return self._finish(x_RTD, out), cache


class Transformer(nn.Module):
    """The training form: packed rows, layers scanned, or one after another where there are few."""

    config: ModelConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: str = "none"
    backend: str = "auto"
    unrolled: bool = False

    @nn.compact
    def __call__(self, tokens_BT, positions_BT, segments_BT, bounds_BT2=None):
        c, dtypes = self.config, (self.dtype, self.param_dtype)
        x_BTD = Embedder(c, *dtypes, name="embedder")(tokens_BT)
        # First as the table lies: its gradient takes an exchange back, not every row's whole.
        x_BTD = constrain(x_BTD, "row_groups", None, "embed")
        x_BTD = constrain(x_BTD, "rows", None, None)
        unrolled = self.unrolled and c.num_layers <= _MOST_UNROLLED
        layers = nn.scan(
            _rematerialised(self.remat),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast, 0),  # pyright: ignore[reportArgumentType]
            length=c.num_layers,
            unroll=c.num_layers if unrolled else 1,
        )
        kinds = jnp.asarray(c.layer_kinds or (0,) * c.num_layers, jnp.int32)
        ropes = _ropes(c, positions_BT)
        if unrolled:
            # In a branch, where padding alone needs none: XLA takes sine and cosine for cheap and
            # would fuse them into every head of every layer, which costs more than the rotation.
            nothing = functools.partial(jax.tree.map, jnp.zeros_like, ropes)
            again = functools.partial(_ropes, c, positions_BT)
            ropes = jax.lax.cond(anywhere(segments_BT > 0), again, nothing)
        prefix = None if bounds_BT2 is None else Prefix(bounds_BT2, positions_BT)
        blocks = layers(c, *dtypes, self.backend, name="layers")
        x_BTD, _ = blocks(x_BTD, ropes, (segments_BT, prefix), kinds)
        if not c.tied:
            Head(c, self.param_dtype, name="head")()
        return RMSNorm(c, self.param_dtype, name="final_norm")(x_BTD)


class Decoder(nn.Module):
    """The decoding form: the same blocks, layers apart, each with its own cache."""

    config: ModelConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens_RT, span, cache):
        c, dtypes = self.config, (self.dtype, jnp.float32)
        x_RTD = Embedder(c, *dtypes, name="embedder")(tokens_RT)
        ropes = {kind.rope: _rope(kind.rope, c.head_dim, span.positions) for kind in c.kinds}
        caches = []
        for i, layer in enumerate(cache):
            block, kind = Block(c, *dtypes, name=f"layer_{i}"), c.kind(i)
            x_RTD, layer = block.extend(x_RTD, ropes[kind.rope], kind, layer, span)
            caches.append(layer)
        x_RTD = RMSNorm(c, jnp.float32, name="final_norm")(x_RTD)
        return x_RTD, tuple(caches)


def _fan_in(inputs: int, rank: int) -> Any:
    """Normal with variance 1 / fan-in of the first axes; close to HF's 0.02 at Gemma's width."""
    axes, outputs = tuple(range(inputs)), tuple(range(inputs, rank))
    return nn.initializers.variance_scaling(1.0, "fan_in", "normal", axes, outputs)


def _rematerialised(remat: str) -> Any:
    if remat == "none":
        return Block
    if remat not in REMAT_POLICIES:
        raise ValueError(f"remat: {remat!r}; expected one of none, {', '.join(REMAT_POLICIES)}")
    return nn.remat(Block, prevent_cse=False, policy=REMAT_POLICIES[remat])


def _rope(rope: Rope, head_dim: int, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin [B, T, 1, K/2] in float32."""
    angles = positions_BT[:, :, None, None].astype(jnp.float32) * _frequencies(rope, head_dim)
    return jnp.cos(angles), jnp.sin(angles)


def _frequencies(rope: Rope, head_dim: int) -> jax.Array:
    """Radians a position of each pair of channels, [K/2] float32."""
    exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    plain = rope.theta**-exponents
    if rope.kind == "default":
        return plain
    if rope.kind == "linear":
        return plain / rope.factor
    # llama3: what turns less than low_factor times in the original context is slowed down, what
    # turns more than high_factor times is kept, and between them the two are blended.
    turns = rope.original * plain / (2 * math.pi)
    blend = (turns - rope.low_factor) / (rope.high_factor - rope.low_factor)
    blend = jnp.clip(blend, 0.0, 1.0)
    return (1 - blend) * plain / rope.factor + blend * plain


def _ropes(config: ModelConfig, positions_BT: jax.Array) -> Any:
    """cos and sin; with a leading axis of kinds where these rotate differently."""
    ropes = [_rope(kind.rope, config.head_dim, positions_BT) for kind in config.kinds]
    if len({kind.rope for kind in config.kinds}) == 1:
        return ropes[0]
    return jax.tree.map(lambda *xs: jnp.stack(xs), *ropes)


def _pick(ropes: Any, kind: Any) -> Any:
    """The rope of one kind of `_ropes`."""
    return jax.tree.map(lambda x: x[kind] if x.ndim == 5 else x, ropes)


def _rotate(x_BTHK: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Half-split rotation: channel i turns with channel i + K/2."""
    cos, sin = rope
    first, second = jnp.split(x_BTHK.astype(jnp.float32), 2, axis=-1)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(rotated, axis=-1).astype(x_BTHK.dtype)


def _apply(model: nn.Module, params: Params, *arrays: Any) -> Any:
    return model.apply({"params": params}, *arrays)


def init_params(config: ModelConfig, key: jax.Array, dtype: Any = jnp.float32) -> Params:
    """Random stacked parameters; jit it with `out_shardings` to create them on a mesh."""
    token = jnp.zeros((1, 1), jnp.int32)
    variables: Any = Transformer(config, dtype, dtype).init(key, token, token, token)
    return variables["params"]


def hidden_states(
    config: ModelConfig,
    params: Params,
    tokens_BT: Int[Array, "rows length"],
    positions_BT: Int[Array, "rows length"],
    segments_BT: Int[Array, "rows length"],
    bounds_BT2: Int[Array, "rows length 2"] | None = None,
    *,
    dtype: Any = jnp.float32,
    remat: str = "none",
    backend: str = "auto",
    unrolled: bool = False,
) -> Float[Array, "rows length hidden"]:
    """The training forward, up to and with the final norm, in `dtype`.

    A token attends to those before it in the row that have its segment; segment 0 is padding, whose
    states are finite and mean nothing.  positions: of each token within its sequence, for RoPE.
    bounds: of the prefix that a token sees beside its segment (kernels.Prefix); None: there is none.
    remat: none | full (keep only layer inputs) | dots (keep matrix products).  unrolled: a program in
    which few layers follow each other, with no loop that gathers what each keeps.  Under
    `jax.set_mesh(mesh)` activations are pinned to the mesh, rows over ("data", "fsdp").
    """
    model = Transformer(config, dtype, remat=remat, backend=backend, unrolled=unrolled)
    # A tied table's two gradients meet outside: each is made where its own product lies.
    table = constrain(params["embedder"]["table"], "vocab", "embed")
    params = {**params, "embedder": {**params["embedder"], "table": table}}
    return _apply(model, params, tokens_BT, positions_BT, segments_BT, bounds_BT2)


def unembedding(params: Params) -> Float[Array, "vocab hidden"]:
    """The table that turns hidden states into logits: the head's or the tied embedding's."""
    return params["head" if "head" in params else "embedder"]["table"]


def logits(
    config: ModelConfig, params: Params, hidden: Float[Array, "... hidden"]
) -> Float[Array, "... vocab"]:
    """float32 logits; the product is taken in the hidden states' dtype, summed in float32."""
    out = tiles.product(hidden, params.get(tiles.UNEMBEDDING))
    if out is None:
        table_VD = unembedding(params).astype(hidden.dtype)
        out = jnp.einsum("...d,vd->...v", hidden, table_VD, preferred_element_type=jnp.float32)
    cap = config.logit_cap
    return out if cap is None else cap * jnp.tanh(out / cap)


def unstack(params: Params) -> Params:
    """Stacked -> decoding form: `layers` becomes `layer_0`, `layer_1`, ..."""
    layers = params["layers"]
    count = len(jax.tree.leaves(layers)[0])
    apart = {f"layer_{i}": jax.tree.map(lambda x, i=i: x[i], layers) for i in range(count)}
    return {**{k: v for k, v in params.items() if k != "layers"}, **apart}


def stack(params: Params) -> Params:
    """The inverse of `unstack`."""
    names = sorted((k for k in params if k.startswith("layer_")), key=lambda k: int(k[6:]))
    layers = jax.tree.map(lambda *xs: jnp.stack(xs), *(params[name] for name in names))
    return {**{k: v for k, v in params.items() if k not in names}, "layers": layers}


def init_cache(
    config: ModelConfig, rows: int, length: int, dtype: Any = jnp.float32, slack: int = 0
) -> Cache:
    """An empty cache for `length` tokens a row; layers with a window shorter than that hold one.

    slack: how many of a row's last tokens `extend` may be told to forget.
    """
    return tuple(
        caching.init(config, rows, length, config.kind(layer).window, dtype, slack)
        for layer in range(config.num_layers)
    )


def extend(
    config: ModelConfig,
    unstacked_params: Params,
    cache: Cache,
    tokens_RT: Int[Array, "rows new"],
    lengths_R: Int[Array, " rows"],
    new_R: Int[Array, " rows"],
    *,
    dtype: Any = jnp.float32,
) -> tuple[Float[Array, "rows new hidden"], Cache]:
    """Appends tokens to each row's cache: prefill, observations, and one-token decoding alike.

        row r   | lengths[r] cached | new[r] real tokens | padding |      lengths' = lengths + new
                0 ......            ^ written from here  ^ dropped

    Returns the hidden states (in `dtype`, those of padding mean nothing) and the cache.  The caller
    keeps `lengths`; tokens beyond the cache's end are dropped, so it must keep within it.
    """
    model = Decoder(config, dtype)
    span = caching.Span(lengths_R, new_R, tokens_RT.shape[1])
    return _apply(model, unstacked_params, tokens_RT, span, cache)
