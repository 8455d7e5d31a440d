"""Hugging Face safetensors in and out, by the weight map of families.py.

Reading, each device's shard takes only its own slice of each stored tensor, cast on the way:

    stored [heads * head_dim, embed]  --rows of its heads, columns of its embed-->  [L, d, h, k]
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from huggingface_hub import split_state_dict_into_shards_factory
from jax.sharding import Mesh, SingleDeviceSharding
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mdpo_jax.model.families import ModelConfig, Weight, axis_sizes, leaf, nest, weight_map
from mdpo_jax.model.sharding import param_shardings

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
FLOATS = ("F64", "F32", "F16", "BF16")
# What a checkpoint may hold beside the weights: the tied head, and old rotary tables.
IGNORED = ("lm_head.weight", "rotary_emb.inv_freq")


class CheckpointError(ValueError):
    """A checkpoint that cannot be read as what it says it is; one line, naming file or tensor."""


def read_params(
    path: str | Path, config: ModelConfig, mesh: Mesh | None = None, dtype: Any = jnp.float32
) -> dict[str, Any]:
    """Stacked parameters from a folder with model.safetensors, or with shards and an index.

    mesh: where they go, by `param_shardings`; None for the first device.  dtype: of the result.
    The host holds at most one stacked leaf of the shards of this process at a time.

    Raises CheckpointError for a missing shard or tensor, a truncated or corrupt file, a wrong
    shape, an unknown tensor, NaN or infinite weights, and quantised weights.
    """
    where = _locate(Path(path))
    _check_names(where, config, Path(path))
    weights = weight_map(config)
    if mesh is None:
        place = SingleDeviceSharding(jax.devices()[0])
        shardings = nest({w.path: place for w in weights})
    else:
        shardings = param_shardings(config, mesh)
    with contextlib.ExitStack() as stack:
        files = {file: stack.enter_context(_open(file)) for file in sorted(set(where.values()))}
        handles = {name: files[file] for name, file in where.items()}
        flat = {}
        for w in weights:
            stored = [_slice(handles[name], name, w, config) for name in w.names(config)]
            flat[w.path] = _assemble(w, stored, config, leaf(shardings, w.path), dtype)
    return nest(flat)


def _locate(path: Path) -> dict[str, Path]:
    """Stored tensor -> its file."""
    index = path / INDEX
    if index.exists():
        try:
            names = json.loads(index.read_text())["weight_map"]
            where = {name: path / file for name, file in names.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index}: not an index of shards: {error!r}") from None
        for file in sorted(set(where.values())):
            if not file.exists():
                raise CheckpointError(f"{file}: missing shard, named by {INDEX}")
        return where
    if not (path / SINGLE).exists():
        raise CheckpointError(f"{path}: no weights; expected {SINGLE} or {INDEX}")
    with _open(path / SINGLE) as handle:
        return dict.fromkeys(handle.keys(), path / SINGLE)


@contextlib.contextmanager
def _open(file: Path) -> Iterator[Any]:
    try:
        handle = safe_open(str(file), framework="numpy")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: truncated or corrupt: {_line(error)}") from None
    with handle:
        yield handle


def _check_names(where: dict[str, Path], config: ModelConfig, path: Path) -> None:
    expected = {name for w in weight_map(config) for name in w.names(config)}
    missing = sorted(expected - set(where))
    if missing:
        raise CheckpointError(f"{path}: missing tensor {missing[0]} ({len(missing)} in all)")
    unknown = sorted(name for name in set(where) - expected if not name.endswith(IGNORED))
    if unknown:
        raise CheckpointError(
            f"{path}: tensor {unknown[0]} ({len(unknown)} in all) is not one of a "
            f"{config.family} model of {config.num_layers} layers; quantised or another model?"
        )


def _slice(handle: Any, name: str, weight: Weight, config: ModelConfig) -> tuple[str, Any]:
    """(name, lazy slice) of one stored tensor, its shape and type checked."""
    try:
        stored = handle.get_slice(name)
    except SafetensorError as error:
        raise CheckpointError(f"tensor {name}: not in its shard: {_line(error)}") from None
    shape, expected = tuple(stored.get_shape()), weight.stored_shape(config)
    if stored.get_dtype() not in FLOATS:
        raise CheckpointError(
            f"tensor {name}: quantised ({stored.get_dtype()}); expected one of {', '.join(FLOATS)}"
        )
    if shape != expected:
        raise CheckpointError(f"tensor {name}: shape {list(shape)}; expected {list(expected)}")
    return name, stored


def _assemble(
    weight: Weight, stored: list[tuple[str, Any]], config: ModelConfig, sharding: Any, dtype: Any
) -> jax.Array:
    """The leaf, each shard from its own slices; replicas of a shard are read once."""
    shape = weight.shape(config)
    read: dict[tuple, np.ndarray] = {}

    def shard(index: Any) -> np.ndarray:
        spans = [s.indices(size)[:2] for s, size in zip(index, shape, strict=True)]
        key = tuple(spans)
        if key not in read:
            layers, spans = (spans[0], spans[1:]) if weight.stacked else ((0, 1), spans)
            local = tuple(stop - start for start, stop in key)
            out = np.empty(local, dtype)
            parts = out if weight.stacked else out[None]
            for i, (name, tensor) in enumerate(stored[slice(*layers)]):
                parts[i] = _read(weight, tensor, spans, config)
                if not np.isfinite(parts[i]).all():
                    raise CheckpointError(f"tensor {name}: NaN or infinite as {jnp.dtype(dtype)}")
            read[key] = out
        return read[key]

    return jax.make_array_from_callback(shape, sharding, shard)


def _read(
    weight: Weight, tensor: Any, spans: list[tuple[int, int]], config: ModelConfig
) -> np.ndarray:
    """One layer's part of a stored tensor, in our layout; spans are per axis of ours."""
    sizes, axes = axis_sizes(config), weight.axes.split()
    span = dict(zip(axes, spans, strict=True))
    ranges, view, inner = [], [], []
    for first, *rest in weight.groups:
        width = math.prod(sizes[axis] for axis in rest)
        start, stop = span[first]
        ranges.append(slice(start * width, stop * width))
        view += [stop - start, *(sizes[axis] for axis in rest)]
        inner += [slice(None), *(slice(*span[axis]) for axis in rest)]
    order = [axis for group in weight.groups for axis in group]
    part = tensor[tuple(ranges)].reshape(view)[tuple(inner)]
    return part.transpose([order.index(axis) for axis in axes])


def write_params(
    path: str | Path,
    params: dict[str, Any],
    config: ModelConfig,
    dtype: Any,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Stacked parameters as a Hugging Face checkpoint: shards and index, or model.safetensors.

    The tied head is left out.  Tensors are gathered one at a time; a shard is held until written.
    Raises ValueError if a leaf has not the shape that the config gives it.
    """
    path = Path(path)
    plan: dict[str, int] = {}
    sources: dict[str, tuple[Weight, int]] = {}
    for w in weight_map(config):
        if leaf(params, w.path).shape != w.shape(config):
            found = list(leaf(params, w.path).shape)
            raise ValueError(f"{w.path}: shape {found}; expected {list(w.shape(config))}")
        for layer, name in enumerate(w.names(config)):
            plan[name] = math.prod(w.stored_shape(config)) * jnp.dtype(dtype).itemsize
            sources[name] = (w, layer)
    split = split_state_dict_into_shards_factory(
        plan,
        get_storage_size=lambda size: size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_bytes,
    )
    for file, names in split.filename_to_tensors.items():
        tensors = {name: _gather(params, sources[name], dtype) for name in names}
        save_file(tensors, path / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (path / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _gather(params: dict[str, Any], source: tuple[Weight, int], dtype: Any) -> np.ndarray:
    """One stored tensor on the host, in the stored layout."""
    weight, layer = source
    x = leaf(params, weight.path)
    x = np.asarray((x[layer] if weight.stacked else x).astype(dtype))
    axes = weight.axes.split()
    x = x.transpose([axes.index(axis) for group in weight.groups for axis in group])
    sizes = dict(zip((a for g in weight.groups for a in g), x.shape, strict=True))
    stored = [math.prod(sizes[axis] for axis in group) for group in weight.groups]
    return np.ascontiguousarray(x.reshape(stored))


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
