"""One decoder for all families, in two forms over the same blocks.

    training  `hidden_states`  layers stacked [L, ...] and scanned, packed rows, no cache
    decoding  `extend`         layers apart (`layer_0`, ...), each with its own cache arrays

Scanning over a stacked cache copies it in each step; apart, a donated cache is updated in place.

Suffixes: B or R rows, T tokens, D hidden, H heads, G key heads, K head_dim, F mlp, S cache length,
V vocab.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from mdpo_jax.model.attention import attend, attend_cache
from mdpo_jax.model.families import ModelConfig
from mdpo_jax.model.sharding import constrain

Params = dict[str, Any]
Cache = tuple[dict[str, jax.Array], ...]  # a layer: keys [R, G, K, S] and values [R, G, S, K]

REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class RMSNorm(nn.Module):
    """x / rms(x) * (1 + w) in float32, cast after the multiplication."""

    eps: float
    param_dtype: Any

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        w_D = self.param("weight", nn.initializers.zeros, x_BTD.shape[-1:], self.param_dtype)
        x = x_BTD.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        return (x * (1.0 + w_D.astype(jnp.float32))).astype(x_BTD.dtype)


class Embedder(nn.Module):
    """The tied table; tokens come out times sqrt(D), the scalar rounded to the compute dtype."""

    config: ModelConfig
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        shape = (self.config.vocab_size, self.config.hidden_size)
        init = nn.initializers.normal(self.config.hidden_size**-0.5)
        table_VD = self.param("table", init, shape, self.param_dtype)
        x_BTD = jnp.take(table_VD, tokens_BT, axis=0, mode="clip").astype(self.dtype)
        return x_BTD * jnp.asarray(self.config.hidden_size**0.5, self.dtype)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    config: ModelConfig
    dtype: Any
    param_dtype: Any
    backend: str

    def setup(self) -> None:
        c = self.config
        d, h, g, k = c.hidden_size, c.num_heads, c.num_kv_heads, c.head_dim
        self.query = self._kernel("query", (d, h, k), inputs=(0,))
        self.key = self._kernel("key", (d, g, k), inputs=(0,))
        self.value = self._kernel("value", (d, g, k), inputs=(0,))
        self.output = self._kernel("output", (h, k, d), inputs=(0, 1))

    def _kernel(self, name: str, shape: tuple[int, ...], inputs: tuple[int, ...]) -> jax.Array:
        return self.param(name, _fan_in(inputs, len(shape)), shape, self.param_dtype)

    @property
    def _scale(self) -> float:
        return self.config.head_dim**-0.5

    def _project(self, x_BTD: jax.Array, rope: tuple[jax.Array, jax.Array]) -> tuple:
        q_BTHK = jnp.einsum("btd,dhk->bthk", x_BTD, self.query.astype(self.dtype))
        k_BTGK = jnp.einsum("btd,dgk->btgk", x_BTD, self.key.astype(self.dtype))
        v_BTGK = jnp.einsum("btd,dgk->btgk", x_BTD, self.value.astype(self.dtype))
        return _rotate(q_BTHK, rope), _rotate(k_BTGK, rope), v_BTGK

    def _merge(self, out_BTHK: jax.Array) -> jax.Array:
        return jnp.einsum("bthk,hkd->btd", out_BTHK, self.output.astype(self.dtype))

    def __call__(self, x_BTD, rope, segments_BT):
        q, k, v = self._project(x_BTD, rope)
        out = attend(q, k, v, segments=segments_BT, scale=self._scale, backend=self.backend)
        return self._merge(out)

    def extend(self, x_RTD, rope, cache, positions_RT, writes_RT):
        """Writes keys and values at `writes`, then attends to the cache up to `positions`."""
        q, k_RTGK, v_RTGK = self._project(x_RTD, rope)
        rows = jnp.arange(x_RTD.shape[0])[:, None]
        # No two writes meet: rows differ, and so do the places within a row, dropped ones too.
        how = {"mode": "drop", "unique_indices": True}
        keys, values = cache["keys"], cache["values"]
        keys = keys.at[rows, :, :, writes_RT].set(k_RTGK.astype(keys.dtype), **how)
        values = values.at[rows, :, writes_RT].set(v_RTGK.astype(values.dtype), **how)
        out = attend_cache(q, keys, values, positions_RT, scale=self._scale)
        return self._merge(out), {"keys": keys, "values": values}


class MLP(nn.Module):
    """down(gelu_tanh(gate(x)) * up(x))."""

    config: ModelConfig
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        d, f = self.config.hidden_size, self.config.intermediate_size
        gate_DF = self.param("gate", _fan_in((0,), 2), (d, f), self.param_dtype)
        up_DF = self.param("up", _fan_in((0,), 2), (d, f), self.param_dtype)
        down_FD = self.param("down", _fan_in((0,), 2), (f, d), self.param_dtype)
        gate_BTF = x_BTD @ gate_DF.astype(self.dtype)
        up_BTF = x_BTD @ up_DF.astype(self.dtype)
        return (nn.gelu(gate_BTF, approximate=True) * up_BTF) @ down_FD.astype(self.dtype)


class Block(nn.Module):
    """Pre-norm attention and MLP, each with a residual."""

    config: ModelConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    backend: str = "reference"

    def setup(self) -> None:
        c, dtypes = self.config, (self.dtype, self.param_dtype)
        self.attention_norm = RMSNorm(c.rms_norm_eps, self.param_dtype)
        self.attention = Attention(c, *dtypes, self.backend)
        self.mlp_norm = RMSNorm(c.rms_norm_eps, self.param_dtype)
        self.mlp = MLP(c, *dtypes)

    def __call__(self, x_BTD, rope, segments_BT):
        """Returns (x, None), as a scan's body does."""
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), rope, segments_BT)
        x_BTD = x_BTD + self.mlp(self.mlp_norm(x_BTD))
        return constrain(x_BTD, "rows", None, None), None

    def extend(self, x_RTD, rope, cache, positions_RT, writes_RT):
        """Returns (x, the layer's cache)."""
        normed = self.attention_norm(x_RTD)
        out, cache = self.attention.extend(normed, rope, cache, positions_RT, writes_RT)
        x_RTD = x_RTD + out
        return x_RTD + self.mlp(self.mlp_norm(x_RTD)), cache


class Transformer(nn.Module):
    """The training form: packed rows, layers scanned."""

    config: ModelConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: str = "none"
    backend: str = "reference"

    @nn.compact
    def __call__(self, tokens_BT, positions_BT, segments_BT):
        c, dtypes = self.config, (self.dtype, self.param_dtype)
        x_BTD = Embedder(c, *dtypes, name="embedder")(tokens_BT)
        x_BTD = constrain(x_BTD, "rows", None, None)
        layers = nn.scan(
            _rematerialised(self.remat),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType]
            length=c.num_layers,
        )
        rope = _rope(c, positions_BT)
        x_BTD, _ = layers(c, *dtypes, self.backend, name="layers")(x_BTD, rope, segments_BT)
        return RMSNorm(c.rms_norm_eps, self.param_dtype, name="final_norm")(x_BTD)


class Decoder(nn.Module):
    """The decoding form: the same blocks, layers apart, each with its own cache."""

    config: ModelConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens_RT, positions_RT, writes_RT, cache):
        c, dtypes = self.config, (self.dtype, jnp.float32)
        x_RTD = Embedder(c, *dtypes, name="embedder")(tokens_RT)
        rope = _rope(c, positions_RT)
        caches = []
        for i, layer in enumerate(cache):
            block = Block(c, *dtypes, name=f"layer_{i}")
            x_RTD, layer = block.extend(x_RTD, rope, layer, positions_RT, writes_RT)
            caches.append(layer)
        x_RTD = RMSNorm(c.rms_norm_eps, jnp.float32, name="final_norm")(x_RTD)
        return x_RTD, tuple(caches)


def _fan_in(inputs: tuple[int, ...], rank: int) -> Any:
    """Normal with variance 1 / fan-in; at Gemma's width that is close to HF's 0.02."""
    outputs = tuple(axis for axis in range(rank) if axis not in inputs)
    return nn.initializers.variance_scaling(1.0, "fan_in", "normal", inputs, outputs)


def _rematerialised(remat: str) -> Any:
    if remat == "none":
        return Block
    if remat not in REMAT_POLICIES:
        raise ValueError(f"remat: {remat!r}; expected one of none, {', '.join(REMAT_POLICIES)}")
    return nn.remat(Block, prevent_cse=False, policy=REMAT_POLICIES[remat])


def _rope(config: ModelConfig, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin [B, T, 1, K/2] in float32."""
    exponents = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
    angles = positions_BT[:, :, None, None].astype(jnp.float32) * config.rope_theta**-exponents
    return jnp.cos(angles), jnp.sin(angles)


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
    *,
    dtype: Any = jnp.float32,
    remat: str = "none",
    backend: str = "reference",
) -> Float[Array, "rows length hidden"]:
    """The training forward, up to and with the final norm, in `dtype`.

    A token attends to those before it in the row that have its segment; segment 0 is padding, whose
    states are finite and mean nothing.  positions: of each token within its segment, for RoPE.
    remat: none | full (keep only layer inputs) | dots (keep matrix products).  Under
    `jax.set_mesh(mesh)` activations are pinned to the mesh, rows over ("data", "fsdp").
    """
    model = Transformer(config, dtype, remat=remat, backend=backend)
    return _apply(model, params, tokens_BT, positions_BT, segments_BT)


def unembedding(params: Params) -> Float[Array, "vocab hidden"]:
    """The table that turns hidden states into logits: the tied embedding, in its own dtype."""
    return params["embedder"]["table"]


def logits(
    config: ModelConfig, params: Params, hidden: Float[Array, "... hidden"]
) -> Float[Array, "... vocab"]:
    """float32 logits; the product is taken in the hidden states' dtype, summed in float32."""
    del config  # Gemma caps no logits; a family that does reads its cap here
    table_VD = unembedding(params).astype(hidden.dtype)
    return jnp.einsum("...d,vd->...v", hidden, table_VD, preferred_element_type=jnp.float32)


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


def init_cache(config: ModelConfig, rows: int, length: int, dtype: Any = jnp.float32) -> Cache:
    """An empty cache.

    Each layer's keys are [rows, kv_heads, head_dim, length], so that scores read them without a
    transposition, and its values [rows, kv_heads, length, head_dim].
    """
    heads, k = config.num_kv_heads, config.head_dim
    return tuple(
        {
            "keys": jnp.zeros((rows, heads, k, length), dtype),
            "values": jnp.zeros((rows, heads, length, k), dtype),
        }
        for _ in range(config.num_layers)
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
    steps_T = jnp.arange(tokens_RT.shape[1])
    positions_RT = lengths_R[:, None] + steps_T
    end = cache[0]["values"].shape[2]
    writes_RT = jnp.where(steps_T < new_R[:, None], positions_RT, end + steps_T)
    model = Decoder(config, dtype)
    return _apply(model, unstacked_params, tokens_RT, positions_RT, writes_RT, cache)
