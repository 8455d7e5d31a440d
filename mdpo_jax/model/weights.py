"""Hugging Face safetensors in and out, by the weight map of families.py.

Reading, each device's shard takes only its own slice of each stored tensor, one layer at a time:

    stored [heads * head_dim, embed]  --rows of its heads, columns of its embed-->  [d, h, k]
    host   one layer, as stored       --cast on the device, into place-->           [L, d, h, k]
"""

from __future__ import annotations

import collections
import functools
import json
import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from huggingface_hub import split_state_dict_into_shards_factory
from jax.sharding import Mesh, NamedSharding, Sharding, SingleDeviceSharding

from mdpo_jax import hosts
from mdpo_jax.model import staging
from mdpo_jax.model.families import ModelConfig, Weight, axis_sizes, leaf, nest, weight_map
from mdpo_jax.model.sharding import partition
from mdpo_jax.model.stored import FLOATS, CheckpointError, Stored, read_header, to_name, write_file

__all__ = [
    "CheckpointError",
    "assemble",
    "read_params",
    "refuse_foreign",
    "stored_dtypes",
    "write_params",
]

_log = logging.getLogger(__name__)

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# What a checkpoint may hold beside the weights: the tied head, and old rotary tables.
HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"
IGNORED = (HEAD, "rotary_emb.inv_freq")
# How multimodal checkpoints name their text half, in transformers 4 and 5, and what is beside it.
_TEXT = (("language_model.model.", "model."), ("model.language_model.", "model."))
_TEXT_HEAD = ("language_model.lm_head.", "lm_head.")
_OTHER_HALF = re.compile(r"(?:model\.)?(?:vision_tower|multi_modal_projector)\.")
# Weights in another format, and how to tell.
_FOREIGN = (
    ("adapter_model.*", "a PEFT adapter without its base; expected the merged model"),
    ("*.gguf", "GGUF weights; expected safetensors"),
    ("pytorch_model*.bin*", "pickled torch weights; expected safetensors"),
    ("flax_model*.msgpack", "msgpack weights; expected safetensors"),
)


class Fetch(Protocol):
    """One layer's tensors of some weights in our layout, by path; layer 0 of those not stacked."""

    def __call__(self, weights: Sequence[Weight], layer: int, /) -> dict[str, jax.Array]: ...


def read_params(
    path: str | Path, config: ModelConfig, mesh: Mesh | None = None, dtype: Any = jnp.float32
) -> dict[str, Any]:
    """Stacked parameters from a folder with model.safetensors, or with shards and an index.

    mesh: where they go, by `param_shardings`; None for the first device.  dtype: of the result.
    The host holds one layer of the shards of this process at a time, or one embedding table.

    Raises CheckpointError for a missing shard or tensor, a truncated or corrupt file, a wrong
    shape, an unknown tensor, NaN or infinite weights, and quantised weights.
    """
    where = _locate(Path(path))
    _check_names(where, config, Path(path))
    for w in weight_map(config):
        for name in w.names(config):
            _check_tensor(where[name], w.stored_shape(config))
    if config.tied and HEAD in where:
        _check_tied(where[HEAD], where[TABLE])
    with ThreadPoolExecutor() as pool:
        return assemble(config, mesh, dtype, _Reader(where, config, mesh, dtype, pool))


def _check_tied(head: Stored, table: Stored) -> None:
    """CheckpointError for a head of its own in a model whose config says that it has none.

    transformers 4 drops such a head, 5 keeps it.
    """
    same = head.shape == table.shape and head.dtype == table.dtype
    if same:
        a, b = head.map().view(np.uint8), table.map().view(np.uint8)
        same = all(np.array_equal(a[i : i + 4096], b[i : i + 4096]) for i in range(0, len(a), 4096))
    if not same:
        raise CheckpointError(
            f"tensor {HEAD}: differs from the embedding though tie_word_embeddings is true; expected "
            "the same, or false in config.json"
        )


def stored_dtypes(path: str | Path) -> dict[str, np.dtype]:
    """The type of each tensor of the text model in a folder, by its name; none of quantised ones.

    Raises CheckpointError as `read_params` does, for what the headers tell.
    """
    where = _locate(Path(path))
    return {n: np.dtype(FLOATS[t.dtype]) for n, t in where.items() if t.dtype in FLOATS}


def assemble(config: ModelConfig, mesh: Mesh | None, dtype: Any, fetch: Fetch) -> dict[str, Any]:
    """Stacked parameters of `dtype`, filled in place one layer at a time.

    Tables come first: while they are read the stacks do not exist yet, so the peak is that of the
    finished parameters and one layer.
    """
    weights = weight_map(config)
    flat = {
        w.path: jax.block_until_ready(fetch([w], 0)[w.path].astype(dtype))
        for w in weights
        if not w.stacked
    }
    stacked = [w for w in weights if w.stacked]
    shapes = {w.path: w.shape(config) for w in stacked}
    stacks: dict[str, jax.Array] = jax.jit(
        lambda: {path: jnp.zeros(shape, dtype) for path, shape in shapes.items()},
        out_shardings={w.path: place(w.logical_axes, w.shape(config), mesh) for w in stacked},
    )()
    for layer in range(config.num_layers):
        stacks = jax.block_until_ready(_fill(stacks, fetch(stacked, layer), layer))
    return nest({w.path: (flat | stacks)[w.path] for w in weights})


def place(axes: Sequence[str | None], shape: tuple[int, ...], mesh: Mesh | None) -> Sharding:
    """Where an array with these logical axes goes; the first device without a mesh."""
    if mesh is None:
        return SingleDeviceSharding(jax.devices()[0])
    return NamedSharding(mesh, partition(tuple(axes), shape, mesh))


@functools.partial(jax.jit, donate_argnums=0)
def _fill(stacks: dict[str, jax.Array], parts: dict[str, jax.Array], layer: Any) -> Any:
    return {path: _put(x, parts[path].astype(x.dtype), layer) for path, x in stacks.items()}


def _put(stack: jax.Array, part: jax.Array, layer: Any) -> jax.Array:
    # As integers: XLA copies bfloat16 on a CPU one by one, through float32.
    bits = jnp.dtype(f"u{stack.dtype.itemsize}")
    stack_bits, part_bits = (jax.lax.bitcast_convert_type(x, bits) for x in (stack, part))
    filled = jax.lax.dynamic_update_index_in_dim(stack_bits, part_bits, layer, 0)
    return jax.lax.bitcast_convert_type(filled, stack.dtype)


def _locate(path: Path) -> dict[str, Stored]:
    """Tensors of the text model by the names that families.py knows."""
    index = path / INDEX
    if (path / SINGLE).exists():  # first, as transformers does
        found = read_header(path / SINGLE)
    elif index.exists():
        found = _by_index(index)
    else:
        refuse_foreign(path)
        raise CheckpointError(f"{path}: no weights; expected {SINGLE} or {INDEX}")
    text = {_text_name(n): t for n, t in found.items() if not _OTHER_HALF.match(n)}
    if len(text) < len(found):
        others = len(found) - len(text)
        _log.warning("%s: the text half of a multimodal model; %d tensors ignored", path, others)
    return text


def refuse_foreign(path: Path) -> None:
    """CheckpointError for a folder that is empty, or whose weights are in another format."""
    if (path / INDEX).exists() or (path / SINGLE).exists():
        return
    for pattern, why in _FOREIGN:
        if any(path.glob(pattern)):
            raise CheckpointError(f"{path}: {why}")
    if not any(path.iterdir()):
        raise CheckpointError(f"{path}: empty, no weights; expected {SINGLE} or {INDEX}")


def _text_name(name: str) -> str:
    for theirs, ours in (*_TEXT, _TEXT_HEAD):
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def _by_index(index: Path) -> dict[str, Stored]:
    try:
        names = json.loads(index.read_text())["weight_map"]
        files = {name: index.parent / file for name, file in names.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: not an index of shards: {error!r}") from None
    headers = {}
    for file in sorted(set(files.values())):
        if file.parent != index.parent:
            raise CheckpointError(f"{index}: names {file}, which is not beside it")
        if not file.exists():
            raise CheckpointError(f"{file}: missing shard, named by {INDEX}")
        headers[file] = read_header(file)
    for name, file in files.items():
        if name not in headers[file]:
            raise CheckpointError(f"tensor {name}: not in its shard {file.name}")
    return {name: headers[file][name] for name, file in files.items()}


def _check_names(where: Mapping[str, Any], config: ModelConfig, path: Path) -> None:
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


def _check_tensor(tensor: Stored, expected: tuple[int, ...]) -> None:
    if tensor.dtype not in FLOATS:
        accepted = ", ".join(FLOATS)
        raise CheckpointError(
            f"tensor {tensor.name}: quantised ({tensor.dtype}); expected one of {accepted}"
        )
    if tensor.shape != expected:
        raise CheckpointError(
            f"tensor {tensor.name}: shape {list(tensor.shape)}; expected {list(expected)}"
        )


class _Reader:
    """`Fetch` of safetensors: pieces of a layer are read by threads, each piece once."""

    def __init__(
        self, where: dict[str, Stored], config: ModelConfig, mesh: Mesh | None, dtype: Any,
        pool: ThreadPoolExecutor,
    ):  # fmt: skip
        self.where, self.config, self.mesh = where, config, mesh
        self.dtype, self.pool = jnp.dtype(dtype), pool
        # Kept from layer to layer: the caller is done with one before it asks for the next.
        self.buffers: dict[tuple, np.ndarray] = {}

    def __call__(self, weights: Sequence[Weight], layer: int, /) -> dict[str, jax.Array]:
        tasks: list[tuple[str, Future]] = []
        makers = {w.path: self._start(w, layer, tasks) for w in weights}
        for name, task in tasks:
            if not task.result():
                raise CheckpointError(f"tensor {name}: NaN or infinite as {self.dtype}")
        return {path: make() for path, make in makers.items()}

    def _start(self, w: Weight, layer: int, tasks: list[tuple[str, Future]]) -> Any:
        """Puts the reading of one tensor's pieces into `tasks`; gives what makes the array."""
        stored = self.where[w.names(self.config)[layer]]
        tensor, shape = stored.map(), w.shape(self.config)[1 if w.stacked else 0 :]
        sharding = place(w.axes.split(), shape, self.mesh)
        pieces: dict[tuple, np.ndarray] = {}
        for index in sharding.addressable_devices_indices_map(shape).values():
            spans = _spans(index, shape)
            if spans in pieces:
                continue
            part, turned = _part(w, tensor, spans, self.config)
            out = self._buffer(w, spans, stored.dtype)
            flat = out.reshape(part.shape[::-1] if turned else part.shape)
            pieces[spans] = out
            tasks += [
                (stored.name, self.pool.submit(_stage, flat, part, rows, turned, self.dtype))
                for rows in staging.blocks(part)
            ]
        return lambda: jax.make_array_from_callback(
            shape, sharding, lambda index: pieces[_spans(index, shape)]
        )

    def _buffer(self, w: Weight, spans: tuple, stored: str) -> np.ndarray:
        # Devices hold no float64.
        kind = np.dtype(np.float32 if stored == "F64" else FLOATS[stored])
        shape = tuple(stop - start for start, stop in spans)
        if not w.stacked:
            # Never kept: on a CPU the array may use this very memory.
            return staging.empty(shape, kind)
        key = (w.path, spans, kind)
        if key not in self.buffers:
            self.buffers[key] = staging.empty(shape, kind)
        return self.buffers[key]


def _spans(index: Any, shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    return tuple(s.indices(size)[:2] for s, size in zip(index, shape, strict=True))


def _part(
    weight: Weight, tensor: np.ndarray, spans: Sequence[tuple[int, int]], config: ModelConfig
) -> tuple[np.ndarray, bool]:
    """One device's part of a stored tensor as [rows, columns], and whether ours is its transpose.

    spans: per axis of ours.  Only the outermost axis of a stored dimension may be split.
    """
    sizes, axes = axis_sizes(config), weight.axes.split()
    span = dict(zip(axes, spans, strict=True))
    ranges = []
    for first, *rest in weight.groups:
        width = math.prod(sizes[axis] for axis in rest)
        ranges.append(slice(span[first][0] * width, span[first][1] * width))
    stored_axes = [axis for group in weight.groups for axis in group]
    part = tensor[tuple(ranges)]
    return (part if part.ndim == 2 else part[None]), axes != stored_axes


def _stage(out: np.ndarray, part: np.ndarray, rows: slice, turned: bool, dtype: Any) -> bool:
    """Copies rows of a part; whether they are finite as `dtype`."""
    if out.dtype == part.dtype:
        staging.copy(staging.words(out), staging.words(part), rows, turned)
    else:
        staging.copy(out, part, rows, turned)
    return staging.finite(part[rows], dtype)


def write_params(
    path: str | Path,
    params: dict[str, Any],
    config: ModelConfig,
    dtype: Any,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Stacked parameters as a Hugging Face checkpoint: shards and index, or model.safetensors.

    dtype: of all tensors, or by name.  The tied head is left out.  Layers are gathered one at a
    time and written as they come; of several processes all must call, and the first one writes.
    Raises ValueError if a leaf has not the shape that the config gives it.
    """
    path = Path(path)
    plan: dict[str, tuple[str, tuple[int, ...]]] = {}
    sources: dict[str, tuple[Weight, int]] = {}
    for w, layer in _order(config):
        if leaf(params, w.path).shape != w.shape(config):
            found = list(leaf(params, w.path).shape)
            raise ValueError(f"{w.path}: shape {found}; expected {list(w.shape(config))}")
        name = w.names(config)[layer]
        kind = dtype[name] if isinstance(dtype, Mapping) else dtype
        plan[name], sources[name] = (to_name(kind), w.stored_shape(config)), (w, layer)
    split = split_state_dict_into_shards_factory(
        {
            name: math.prod(shape) * np.dtype(FLOATS[d]).itemsize
            for name, (d, shape) in plan.items()
        },
        get_storage_size=lambda size: size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_bytes,
    )
    # Not the plan's order: a tensor that is larger than a shard gets one of its own.
    names = [name for names in split.filename_to_tensors.values() for name in names]
    with ThreadPoolExecutor() as pool:
        wanted = [(*sources[name], FLOATS[plan[name][0]]) for name in names]
        tensors = _tensors(params, config, wanted, pool)
        if jax.process_index():
            collections.deque(tensors, maxlen=0)  # takes part in the gathering
            return
        for file, inside in split.filename_to_tensors.items():
            write_file(path / file, {name: plan[name] for name in inside}, tensors)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (path / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _order(config: ModelConfig) -> list[tuple[Weight, int]]:
    """The tensors as they are written: the tables, then layer by layer."""
    weights = weight_map(config)
    stacked = [w for w in weights if w.stacked]
    return [(w, 0) for w in weights if not w.stacked] + [
        (w, layer) for layer in range(config.num_layers) for w in stacked
    ]


def _tensors(
    params: dict[str, Any],
    config: ModelConfig,
    wanted: Sequence[tuple[Weight, int, Any]],
    pool: ThreadPoolExecutor,
) -> Iterator[np.ndarray]:
    """Each (weight, layer, dtype) in the stored layout; an array is valid until the next."""
    sizes = axis_sizes(config)
    buffers: dict[tuple, np.ndarray] = {}
    for w, layer, dtype in wanted:
        # Devices hold no float64.
        kind = np.dtype(np.float32 if dtype == np.float64 else dtype)
        x = leaf(params, w.path)
        x = hosts.fetch(
            _take(x, layer, kind) if w.stacked else x if x.dtype == kind else x.astype(kind)
        )
        if w.axes.split() != [axis for group in w.groups for axis in group]:
            part = x.reshape(math.prod(sizes[axis] for axis in w.groups[-1]), -1)
            key = (part.shape, kind)
            if key not in buffers:
                buffers[key] = staging.empty(part.shape[::-1], kind)
            _turn(buffers[key], part, pool)
            x = buffers[key]
        yield x.reshape(w.stored_shape(config)).astype(dtype, copy=False)


def _turn(out: np.ndarray, part: np.ndarray, pool: ThreadPoolExecutor) -> None:
    bits, source = staging.words(out), staging.words(part)
    list(pool.map(lambda rows: staging.copy(bits, source, rows, True), staging.blocks(part)))


@functools.partial(jax.jit, static_argnums=2)
def _take(stack: jax.Array, layer: Any, dtype: Any) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(stack, layer, 0, keepdims=False).astype(dtype)
