"""The official Flax checkpoints of Gemma 1, 2 and 3: an Orbax folder beside `tokenizer.model`.

Their tree has a layer's tensors apart and the projections of one kind in one tensor:

    transformer/layer_3/attn/kv_einsum/w   [2, kv_heads, embed, head_dim]   key, value
    transformer/layer_3/mlp/gating_einsum  [2, embed, mlp] or [2, mlp, embed]   gate, up

There is no config.json: sizes are read off the arrays, the family off the leaves, and what neither
tells (windows, caps, RoPE) comes from the table of the released models.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from mdpo_jax.model.families import ModelConfig, Weight, axis_sizes
from mdpo_jax.model.hf_config import from_hf
from mdpo_jax.model.stored import CheckpointError
from mdpo_jax.model.weights import assemble, place

TOKENIZER = "tokenizer.model"
_MARKS = ("_METADATA", "_CHECKPOINT_METADATA", "manifest.ocdbt")
_TABLE = "embedder/input_embedding"


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a tensor of ours lies: `name` of theirs, its `axes`, and the `pick` of its first axis.

    axes: of one that is picked, or of the whole tensor with pick=None.
    """

    name: str
    axes: str
    pick: int | None = None


_KV = "kv_heads embed head_dim"
# Ours -> theirs; of several the first that is there.
SOURCES: dict[str, tuple[Source, ...]] = {
    "embedder/table": (Source(_TABLE, "vocab embed"),),
    "final_norm/weight": (Source("final_norm/scale", "norm"),),
    "attention_norm/weight": (Source("pre_attention_norm/scale", "norm"),),
    "attention_post_norm/weight": (Source("post_attention_norm/scale", "norm"),),
    "mlp_norm/weight": (Source("pre_ffw_norm/scale", "norm"),),
    "mlp_post_norm/weight": (Source("post_ffw_norm/scale", "norm"),),
    "attention/query_norm/weight": (Source("attn/_query_norm/scale", "head_dim"),),
    "attention/key_norm/weight": (Source("attn/_key_norm/scale", "head_dim"),),
    "attention/query": (
        Source("attn/q_einsum", "heads embed head_dim"),
        Source("attn/qkv_einsum", "heads embed head_dim", 0),
    ),
    "attention/key": (Source("attn/kv_einsum", _KV, 0), Source("attn/qkv_einsum", _KV, 1)),
    "attention/value": (Source("attn/kv_einsum", _KV, 1), Source("attn/qkv_einsum", _KV, 2)),
    "attention/output": (Source("attn/attn_vec_einsum", "heads head_dim embed"),),
    "mlp/gate": (
        Source("mlp/gating_einsum", "embed mlp", 0),
        Source("mlp/gating_einsum", "mlp embed", 0),
    ),
    "mlp/up": (
        Source("mlp/gating_einsum", "embed mlp", 1),
        Source("mlp/gating_einsum", "mlp embed", 1),
    ),
    "mlp/down": (Source("mlp/linear", "mlp embed"),),
}
_PICKS = {"attn/kv_einsum": 2, "attn/qkv_einsum": 3, "mlp/gating_einsum": 2}


def weights_folder(folder: Path) -> Path | None:
    """The Orbax folder of an official Flax checkpoint: `folder` itself or its only such child.

    None for anything else; a Hugging Face folder has a config.json.
    """
    if (folder / "config.json").exists():
        return None
    if _is_orbax(folder):
        return folder
    found = [child for child in sorted(folder.iterdir()) if child.is_dir() and _is_orbax(child)]
    return found[0] if len(found) == 1 else None


def _is_orbax(folder: Path) -> bool:
    return any((folder / mark).exists() for mark in _MARKS)


def describe(folder: Path) -> tuple[ModelConfig, Any, dict[str, Any]]:
    """(config, tokenizer, ids of the special tokens) of an official Flax checkpoint.

    Raises FileNotFoundError without `tokenizer.model`, CheckpointError for another tree.
    """
    leaves = _Leaves(folder)
    places = [p / TOKENIZER for p in (folder, leaves.folder, leaves.folder.parent)]
    file = next((p for p in places if p.is_file()), None)
    if file is None:
        raise FileNotFoundError(f"{folder}: no tokenizer; expected {TOKENIZER}")
    tokenizer = _tokenizer(file)
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<end_of_turn>")]
    unknown = (None, tokenizer.unk_token_id)
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": [i for i in ends if i not in unknown],
        "pad_token_id": tokenizer.pad_token_id,
    }
    return leaves.config, tokenizer, ids


def read_params(
    folder: Path, config: ModelConfig, mesh: Mesh | None = None, dtype: Any = jnp.float32
) -> dict[str, Any]:
    """Stacked parameters of `dtype`, restored by Orbax onto the mesh, one layer at a time.

    Raises CheckpointError for a missing or misshapen array, and for NaN or infinite ones.
    """
    leaves = _Leaves(folder)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        fetch = functools.partial(_fetch, leaves, config, mesh, jnp.dtype(dtype), checkpointer)
        return assemble(config, mesh, dtype, fetch)


def stored_dtype(folder: Path) -> str:
    """Of the embedding, as of all others in the released checkpoints."""
    return str(jnp.dtype(_Leaves(folder).arrays[_TABLE][1].dtype))


class _Leaves:
    """What lies in the Orbax folder, by the official names less `transformer/` and a last `/w`."""

    def __init__(self, folder: Path):
        found = weights_folder(folder)
        if found is None:
            raise CheckpointError(
                f"{folder}: no Orbax folder; expected an official Flax checkpoint"
            )
        self.folder = found.absolute()
        try:
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
                meta: Any = checkpointer.metadata(self.folder)
        except Exception as error:  # the library raises all kinds
            line = " ".join(str(error).split())[:200]
            raise CheckpointError(f"{found}: not an Orbax checkpoint: {line}") from None
        tree = getattr(getattr(meta, "item_metadata", meta), "tree", meta)
        flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))
        by_name = {"/".join(str(key.key) for key in path): (path, x) for path, x in flat}
        roots = [n.removesuffix(_TABLE) for n in by_name if n.endswith(_TABLE)]
        if len(roots) != 1:
            raise CheckpointError(f"{found}: no {_TABLE}; expected an official Flax Gemma")
        # name -> (key path, metadata)
        self.arrays: dict[str, tuple[Any, Any]] = {
            re.sub(r"/w$", "", name.removeprefix(roots[0])): entry
            for name, entry in by_name.items()
            if name.startswith(roots[0])
        }

    @functools.cached_property
    def config(self) -> ModelConfig:
        """Sizes from the shapes, family from the leaves, the rest from the table."""
        layers = {int(m[1]) for n in self.arrays if (m := re.match(r"layer_(\d+)/", n))}
        if layers != set(range(len(layers))) or not layers:
            raise CheckpointError(f"{self.folder}: layers {sorted(layers)}; expected 0, 1, 2, ...")
        vocabulary, width = self.shape(_TABLE, 2)
        heads, head_dim, _ = self.shape("layer_0/attn/attn_vec_einsum", 3)
        shared = "layer_0/attn/kv_einsum" not in self.arrays
        raw = {
            "vocab_size": vocabulary,
            "hidden_size": width,
            "intermediate_size": self.shape("layer_0/mlp/linear", 2)[0],
            "num_hidden_layers": len(layers),
            "num_attention_heads": heads,
            "num_key_value_heads": heads if shared else self.shape("layer_0/attn/kv_einsum", 4)[1],
            "head_dim": head_dim,
        }
        family = "gemma"
        if "layer_0/post_attention_norm/scale" in self.arrays:
            family = "gemma3" if "layer_0/attn/_query_norm/scale" in self.arrays else "gemma2"
        return from_hf({**raw, **_released(family, len(layers), width // heads)})

    def shape(self, name: str, rank: int) -> tuple[int, ...]:
        """Of an array that must be there."""
        if name not in self.arrays:
            raise CheckpointError(f"{self.folder}: missing array {name}")
        _, array = self.arrays[name]
        if len(array.shape) != rank:
            raise CheckpointError(f"array {name}: shape {list(array.shape)}; expected {rank} axes")
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise CheckpointError(f"array {name}: quantised ({array.dtype}); expected floats")
        return tuple(array.shape)

    def source(self, weight: Weight, layer: int, config: ModelConfig) -> Source:
        """Where one tensor of ours lies, its name with the layer's; checked for its shape."""
        prefix = f"layer_{layer}/" if weight.stacked else ""
        sizes, found = axis_sizes(config), ""
        candidates = SOURCES[weight.path.removeprefix("layers/")]
        for source in candidates:
            name = prefix + source.name
            if name not in self.arrays:
                continue
            first = [] if source.pick is None else [_PICKS[source.name]]
            expected = (*first, *(sizes[axis] for axis in source.axes.split()))
            if self.shape(name, len(expected)) == expected:
                return dataclasses.replace(source, name=name)
            found = f"array {name}: shape {list(self.shape(name, len(expected)))}"
            found += f"; expected {list(expected)}"
        raise CheckpointError(found or f"{self.folder}: missing array {prefix}{candidates[0].name}")


def _released(family: str, layers: int, width_per_head: int) -> dict[str, Any]:
    """What the released model of a family and depth has beside its sizes."""
    if family == "gemma":
        return {"model_type": "gemma", "max_position_embeddings": 8192}
    if family == "gemma2":
        # The 27B scales queries by the width over the heads, the others by head_dim.
        scalar = {"query_pre_attn_scalar": width_per_head} if layers == 46 else {}
        return {"model_type": "gemma2", "sliding_window": 4096, **scalar}
    large = layers >= 34  # 4B, 12B, 27B; below, 270M and 1B
    full: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e6}
    if large:
        full |= {"rope_type": "linear", "factor": 8.0}
    scalar = {"query_pre_attn_scalar": width_per_head} if layers == 62 else {}
    return {
        "model_type": "gemma3_text",
        "sliding_window": 1024 if large else 512,
        "max_position_embeddings": 131072 if large else 32768,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": full,
        },
        **scalar,
    }


def _tokenizer(file: Path) -> Any:
    from transformers import GemmaTokenizer

    try:
        return GemmaTokenizer.from_pretrained(str(file.parent), local_files_only=True)
    except Exception as error:  # the library raises all kinds
        line = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{file}: tokenizer cannot be read: {line}") from None


def _fetch(
    leaves: _Leaves, config: ModelConfig, mesh: Mesh | None, dtype: Any, checkpointer: Any,
    weights: Sequence[Weight], layer: int,
) -> dict[str, jax.Array]:  # fmt: skip
    """`Fetch`: their arrays of one layer by Orbax, then taken apart on the devices."""
    sources = {w: leaves.source(w, layer, config) for w in weights}
    item: dict[Any, Any] = {}
    for source in sources.values():
        path, array = leaves.arrays[source.name]
        axes = source.axes.split() if source.pick is None else [None, *source.axes.split()]
        node = item
        for key in path[:-1]:
            node = node.setdefault(key.key, {})
        sharding = place(axes, array.shape, mesh)
        node[path[-1].key] = jax.ShapeDtypeStruct(array.shape, dtype, sharding=sharding)
    restore = ocp.checkpoint_utils.construct_restore_args(item)
    arguments = ocp.args.PyTreeRestore(item=item, restore_args=restore, partial_restore=True)
    try:
        tree = checkpointer.restore(leaves.folder, args=arguments)
    except Exception as error:  # the library raises all kinds
        line = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{leaves.folder}: cannot be read: {line}") from None
    theirs = {
        source.name: functools.reduce(
            lambda node, k: node[k.key], leaves.arrays[source.name][0], tree
        )
        for source in sources.values()
    }
    for name, fine in _finite(theirs).items():
        if not fine:
            raise CheckpointError(f"array {name}: NaN or infinite as {dtype}")
    return {w.path: _take(theirs[s.name], s.axes, s.pick, w.axes) for w, s in sources.items()}


@jax.jit
def _finite(arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: jnp.isfinite(x).all() for name, x in arrays.items()}


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _take(x: jax.Array, axes: str, pick: int | None, ours: str) -> jax.Array:
    x = x if pick is None else x[pick]
    return x.transpose([axes.split().index(axis) for axis in ours.split()])
