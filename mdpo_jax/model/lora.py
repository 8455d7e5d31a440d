"""LoRA (Hu et al. 2021, arXiv 2106.09685): W + alpha/r * A @ B with W fixed, here and as PEFT files.

An adapter is a tree beside the parameters: for the kernel `NAME` two leaves stacked like it,

    layers/attention/query           [L, embed, heads, head_dim]     the base, never changed
    layers/attention/query_lora_a    [L, embed, r]                   uniform at first
    layers/attention/query_lora_b    [L, r, heads, head_dim]         0 at first: the base as it is

Which they are, how they are sharded, and what they are called in a PEFT file all follow from the
base's weight map (families.py).
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from mdpo_jax.model.families import ModelConfig, Weight, axis_sizes, leaf, nest, weight_map
from mdpo_jax.model.folders import new_folder
from mdpo_jax.model.sharding import partition

Params = dict[str, Any]
ALL = "all-linear"
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
A, B = "_lora_a", "_lora_b"


class AdapterError(ValueError):
    """An adapter that is not one of this base, or not one that we compute; one line."""


@dataclasses.dataclass(frozen=True)
class Lora:
    """rank r, alpha (the product is scaled by alpha / r), and the projections that get adapters.

    targets: Hugging Face's names, q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, or
    "all-linear" for all seven.  Raises ValueError for a rank below 1 or an alpha of 0 or less.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] = (ALL,)

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"lora.rank: {self.rank}; expected at least 1")
        if not self.alpha > 0:
            raise ValueError(f"lora.alpha: {self.alpha}; expected more than 0")

    @property
    def scale(self) -> float:
        """Of A @ B."""
        return self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class Half:
    """A or B of one kernel, as a row of the weight map with the axis `rank` beside the others."""

    weight: Weight
    shape: tuple[int, ...]  # of our leaf, layers included
    stored: tuple[int, ...]  # of one stored tensor

    @property
    def order(self) -> list[int]:
        """The permutation of one layer's axes, ours -> stored."""
        axes = self.weight.axes.split()
        return [axes.index(axis) for group in self.weight.groups for axis in group]


def linear(config: ModelConfig) -> dict[str, Weight]:
    """Hugging Face's name of each projection -> its row of the weight map."""
    two = (w for w in weight_map(config) if w.stacked and len(w.groups) == 2)
    return {w.name.split(".")[-2]: w for w in two}


def resolve(config: ModelConfig, lora: Lora) -> tuple[str, ...]:
    """The projections that get adapters, in the weight map's order.

    Raises ValueError for a target that is none of them, or if there is no target.
    """
    known = linear(config)
    wanted = set(known) if ALL in lora.targets else set(lora.targets)
    for name in lora.targets:
        if name != ALL and name not in known:
            raise ValueError(
                f"lora.targets: {name!r}; expected {ALL} or some of {', '.join(known)}"
            )
    if not wanted:
        raise ValueError(f"lora.targets: none; expected {ALL} or some of {', '.join(known)}")
    return tuple(name for name in known if name in wanted)


def halves(config: ModelConfig, lora: Lora) -> dict[str, Half]:
    """Our path of every leaf of an adapter -> what is known of it; A and B of a kernel in turn."""
    sizes, known, found = axis_sizes(config) | {"rank": lora.rank}, linear(config), {}
    for target in resolve(config, lora):
        kernel = known[target]
        # A checkpoint stores [out, in], PEFT A as [r, in] and B as [out, r].
        out, into = (" ".join(group) for group in kernel.groups)
        name = f"base_model.model.{kernel.name.removesuffix('weight')}"
        for weight in (
            Weight(kernel.path + A, f"{name}lora_A.weight", f"{into} rank", f"rank ({into})"),
            Weight(kernel.path + B, f"{name}lora_B.weight", f"rank {out}", f"({out}) rank"),
        ):
            shape = tuple(sizes[axis] for axis in weight.logical_axes)
            stored = tuple(math.prod(sizes[axis] for axis in group) for group in weight.groups)
            found[weight.path] = Half(weight, shape, stored)
    return found


def count(config: ModelConfig, lora: Lora) -> int:
    """Number of trainable parameters."""
    return sum(math.prod(half.shape) for half in halves(config, lora).values())


def init(config: ModelConfig, lora: Lora, key: jax.Array, dtype: Any = jnp.float32) -> Params:
    """A new adapter: A uniform in +-1/sqrt(inputs), as PEFT's default draws it, and B zero."""
    parts = halves(config, lora)
    keys = dict(zip(parts, jax.random.split(key, len(parts)), strict=True))

    def draw(path: str, half: Half) -> jax.Array:
        if path.endswith(B):
            return jnp.zeros(half.shape, dtype)
        bound = half.stored[1] ** -0.5
        return jax.random.uniform(keys[path], half.shape, dtype, -bound, bound)

    return nest({path: draw(path, half) for path, half in parts.items()})


def shardings(config: ModelConfig, lora: Lora, mesh: Mesh) -> Params:
    """The adapter's tree of NamedShardings, by the same table as the base's; r is replicated."""
    return nest(
        {
            path: NamedSharding(mesh, partition(half.weight.logical_axes, half.shape, mesh))
            for path, half in halves(config, lora).items()
        }
    )


def combine(base: Params, adapters: Params, lora: Lora) -> Params:
    """Parameters that the decoder takes: the base's leaves as they are, A, and alpha/r * B.

    Pure and differentiable with respect to `adapters`; nothing of the base's size is computed.
    """

    def scaled(path: Any, x: jax.Array) -> jax.Array:
        return x * jnp.asarray(lora.scale, x.dtype) if _name(path).endswith(B) else x

    return _joined(base, jax.tree_util.tree_map_with_path(scaled, adapters))


def merge(base: Params, adapters: Params, lora: Lora) -> Params:
    """W + alpha/r * A @ B of every adapted kernel, in float32, then cast to W's type."""
    return fold(combine(base, adapters, lora))


def fold(params: Params, dtype: Any = None) -> Params:
    """`combine`'s result, stacked or not, without adapters; any other parameters as they are.

    Sums are float32, one layer at a time, and rounded once, to `dtype` (None: the kernel's own).
    """

    def group(leaves: Params) -> Params:
        out = {name: x for name, x in leaves.items() if not name.endswith((A, B))}
        for name, x in out.items():
            if isinstance(x, dict):
                out[name] = group(x)
            elif name + A in leaves:
                out[name] = _sum(x, leaves[name + A], leaves[name + B], dtype or x.dtype)
        return out

    return group(params)


def _sum(kernel: jax.Array, a: jax.Array, b: jax.Array, dtype: Any) -> jax.Array:
    def one(parts: tuple[jax.Array, ...]) -> jax.Array:
        w, low, high = (x.astype(jnp.float32) for x in parts)
        # float32 means it: TPUs would round the factors to bfloat16.
        delta = jnp.tensordot(low, high, 1, precision=jax.lax.Precision.HIGHEST)
        return (w + delta).astype(dtype)

    stacked = a.ndim + b.ndim - 2 > kernel.ndim
    return jax.lax.map(one, (kernel, a, b)) if stacked else one((kernel, a, b))


def _joined(base: Params, other: Params) -> Params:
    """Both trees' leaves."""
    both = {k: _joined(base[k], v) for k, v in other.items() if isinstance(v, dict)}
    return {**base, **{k: v for k, v in other.items() if not isinstance(v, dict)}, **both}


def _name(path: Any) -> str:
    return str(path[-1].key)


def write_peft(
    path: str | Path, adapters: Params, config: ModelConfig, lora: Lora, base_name: str,
    revision: str | None = None,
) -> Path:  # fmt: skip
    """A folder that `peft.PeftModel.from_pretrained(base, path)` reads; whole or not at all.

    base_name, revision: where PEFT looks for the base.  Raises FileExistsError if the folder exists.
    """
    with new_folder(path) as folder:
        tensors = {}
        for where, half in halves(config, lora).items():
            whole = np.asarray(leaf(adapters, where))
            for name, layer in zip(half.weight.names(config), whole, strict=True):
                stored = layer.transpose(half.order).reshape(half.stored)
                tensors[name] = np.ascontiguousarray(stored)
        save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
        text = json.dumps(_peft_config(config, lora, base_name, revision), indent=2) + "\n"
        (folder / CONFIG).write_text(text)
    return Path(path)


def _peft_config(
    config: ModelConfig, lora: Lora, base_name: str, revision: str | None
) -> dict[str, Any]:
    alpha = int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "revision": revision,
        "r": lora.rank,
        "lora_alpha": alpha,
        "target_modules": list(resolve(config, lora)),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }


# What a PEFT config may say that changes what an adapter computes, or to what it is applied.
_UNKNOWN = (
    "fan_in_fan_out", "use_rslora", "use_dora", "use_qalora", "use_bdlora", "rank_pattern",
    "alpha_pattern", "modules_to_save", "exclude_modules", "layers_to_transform",
    "layer_replication", "target_parameters", "trainable_token_indices", "lora_bias",
    "alora_invocation_tokens", "arrow_config", "kasa_config",
)  # fmt: skip


def read_peft(
    path: str | Path, config: ModelConfig, dtype: Any = jnp.float32
) -> tuple[Params, Lora]:
    """The adapter in a PEFT folder, and its rank, alpha and targets; arrays on the host.

    Raises AdapterError for a file that cannot be read, a kind of adapter that we do not compute,
    and one of another base: a missing or unknown tensor, or a shape that does not fit.
    """
    path = Path(path)
    lora = _read_config(path / CONFIG)
    try:
        lora = dataclasses.replace(lora, targets=resolve(config, lora))
        parts = halves(config, lora)
    except ValueError as error:
        raise AdapterError(f"{path / CONFIG}: {error}") from None
    try:
        tensors = load_file(path / TENSORS)
    except (SafetensorError, OSError) as error:
        line = " ".join(str(error).split())
        raise AdapterError(f"{path / TENSORS}: missing or corrupt: {line}") from None
    flat = {where: _assemble(half, tensors, config, path, dtype) for where, half in parts.items()}
    if tensors:
        raise AdapterError(
            f"{path}: tensor {min(tensors)} ({len(tensors)} in all) is of no target of a "
            f"{config.family} model of {config.num_layers} layers; an adapter of another base?"
        )
    return nest(flat), lora


def _read_config(path: Path) -> Lora:
    try:
        raw = json.loads(path.read_text())
        if raw["peft_type"] != "LORA":
            raise AdapterError(f"{path}: peft_type: {raw['peft_type']!r}; expected LORA")
        if raw.get("bias", "none") != "none":
            raise AdapterError(f"{path}: bias: {raw['bias']!r}; expected none")
        for name in _UNKNOWN:
            if raw.get(name):
                raise AdapterError(f"{path}: {name}: {raw[name]!r}; expected it unset")
        targets = raw["target_modules"]
        # PEFT itself spells all-linear as every module's full name; the tensors tell if one lacks.
        names = [targets] if isinstance(targets, str) else [t.split(".")[-1] for t in targets]
        return Lora(int(raw["r"]), float(raw["lora_alpha"]), tuple(names))
    except AdapterError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise AdapterError(f"{path}: not a LoRA adapter's config: {error!r}") from None


def _assemble(half: Half, tensors: Params, config: ModelConfig, path: Path, dtype: Any) -> Any:
    """One leaf from its layers' tensors, which are taken out of `tensors`."""
    one = half.shape[1:]  # of a layer
    layers = []
    for name in half.weight.names(config):
        if name not in tensors:
            raise AdapterError(f"{path}: missing tensor {name}; an adapter of another base?")
        stored = tensors.pop(name)
        if stored.shape != half.stored:
            raise AdapterError(
                f"{path}: tensor {name}: shape {list(stored.shape)}; expected "
                f"{list(half.stored)}; an adapter of another base?"
            )
        if not np.isfinite(stored.astype(np.float32)).all():
            raise AdapterError(f"{path}: tensor {name}: NaN or infinite")
        view = stored.reshape([one[axis] for axis in half.order])
        layers.append(view.transpose(np.argsort(half.order)).astype(dtype))
    return np.stack(layers)
