"""A policy: config, parameters and tokenizer as one value, read from and saved to a HF folder."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from mdpo_jax.model import transformer
from mdpo_jax.model.families import ModelConfig, from_hf, to_hf
from mdpo_jax.model.weights import CheckpointError, read_params, write_params

DTYPES = ("float32", "bfloat16", "float16")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")


@dataclasses.dataclass(frozen=True)
class Policy:
    """What the rest of the house calls a policy.

    params: stacked, on a device or a mesh.  hf_config: the source's config.json, whose fields that
    are not ours travel through `save`.  generation_config: the source's, if it had one.
    """

    config: ModelConfig
    params: dict[str, Any]
    tokenizer: Any
    hf_config: dict[str, Any] = dataclasses.field(default_factory=dict)
    generation_config: dict[str, Any] | None = None

    @property
    def dtype(self) -> str:
        """Of the parameters."""
        return str(transformer.unembedding(self.params).dtype)

    def logits(self, ids: Sequence[Sequence[int]] | np.ndarray) -> Float[Array, "rows length V"]:
        """Next-token logits at each place, computed in the parameters' dtype, as float32.

        ids: [rows, length], compiled once a shape.  Raises ValueError if rows differ in length or
        an id is outside the vocabulary.
        """
        try:
            tokens = np.asarray(ids, np.int32)
        except ValueError:
            raise ValueError("ids: rows of different lengths; expected [rows, length]") from None
        if tokens.ndim != 2:
            raise ValueError(f"ids: {tokens.ndim} axes; expected [rows, length]")
        size = self.config.vocab_size
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < size:
            raise ValueError(f"ids: {tokens.min()}..{tokens.max()}; expected 0..{size - 1}")
        return _forward(self.config, self.params, tokens)

    def save(self, directory: str | Path, dtype: str | None = None) -> Path:
        """Writes a Hugging Face folder; whole or not at all.  dtype: None for the parameters' own.

        All goes into DIRECTORY.partial, which is fsynced and renamed.
        Raises FileExistsError if the directory exists.
        """
        target, dtype = Path(directory), _dtype(dtype or self.dtype)
        if target.exists():
            raise FileExistsError(f"{target}: exists already; expected a new folder")
        partial = target.with_name(target.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write_params(partial, self.params, self.config, dtype)
        _write_json(partial / "config.json", to_hf(self.config, self.hf_config, dtype))
        if self.generation_config is not None:
            _write_json(partial / "generation_config.json", self.generation_config)
        self.tokenizer.save_pretrained(partial)
        for path in [*partial.rglob("*"), partial]:
            _fsync(path)
        partial.rename(target)
        _fsync(target.parent)
        return target


def load_policy(path: str | Path, dtype: str = "float32", mesh: Mesh | None = None) -> Policy:
    """The policy in a local Hugging Face folder; the network is never asked.

    mesh: None for the first device.  Raises, in one line, FileNotFoundError for an absent folder
    or file, and CheckpointError for one that cannot be read or does not fit the others.
    """
    path = Path(path).expanduser()
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such folder; expected a local Hugging Face model")
    raw = _read_json(path / "config.json")
    try:
        config = from_hf(raw)
    except ValueError as error:
        raise CheckpointError(f"{path / 'config.json'}: {error}") from None
    tokenizer = _read_tokenizer(path, config)
    generation = path / "generation_config.json"
    return Policy(
        config=config,
        params=read_params(path, config, mesh, jnp.dtype(_dtype(dtype))),
        tokenizer=tokenizer,
        hf_config=raw,
        generation_config=_read_json(generation) if generation.exists() else None,
    )


def fingerprint(params: Any) -> str:
    """16 hex digits that change with any bit of any leaf, its path, shape or dtype.

    The sha256 over two 32-bit sums a leaf: of every element's bits mixed with its place, modulo
    2**32, so the order of summation and hence mesh and device do not matter.  Computed where the
    leaf lies; nothing is gathered.  Against accidents, not forgery.
    """
    total = hashlib.sha256()
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        sums = np.asarray(_sums(jnp.asarray(x))).tolist()
        total.update(f"{jax.tree_util.keystr(path)} {x.shape} {x.dtype} {sums}\n".encode())
    return total.hexdigest()[:16]


@jax.jit
def _sums(x: jax.Array) -> jax.Array:
    width = x.dtype.itemsize * 8
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{width}")).astype(jnp.uint32)
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    sums = []
    for seed in (0x9E3779B9, 0x85EBCA6B):
        h = bits ^ (place * jnp.uint32(seed))
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):  # lowbias32
            h = (h ^ (h >> shift)) * jnp.uint32(factor)
        sums.append(jnp.sum(h ^ (h >> 16), dtype=jnp.uint32))
    return jnp.stack(sums)


@functools.partial(jax.jit, static_argnums=0)
def _forward(config: ModelConfig, params: dict[str, Any], tokens_BT: jax.Array) -> jax.Array:
    positions = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    dtype = transformer.unembedding(params).dtype
    hidden = transformer.hidden_states(
        config, params, tokens_BT, positions, jnp.ones_like(tokens_BT), dtype=dtype
    )
    return transformer.logits(config, params, hidden)


def _read_tokenizer(path: Path, config: ModelConfig) -> Any:
    from transformers import AutoTokenizer  # slow to import, and only this needs it

    if not any((path / name).exists() for name in TOKENIZER_FILES):
        raise FileNotFoundError(f"{path}: no tokenizer; expected {TOKENIZER_FILES[0]}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    except Exception as error:  # the library raises all kinds, OSError to bare Exception
        line = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path}: tokenizer cannot be read: {line}") from None
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest >= config.vocab_size:
        raise CheckpointError(
            f"{path}: the tokenizer has ids up to {highest}, the model a vocabulary of "
            f"{config.vocab_size}; expected ids below it"
        )
    return tokenizer


def _dtype(name: str) -> str:
    if name not in DTYPES:
        raise ValueError(f"dtype: {name!r}; expected one of {', '.join(DTYPES)}")
    return name


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise FileNotFoundError(f"{path}: missing")
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: {type(value).__name__}; expected a JSON object")
    return value


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
