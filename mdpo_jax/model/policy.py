"""A policy: config, parameters and tokenizer as one value, read from and saved to a HF folder."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from mdpo_jax import hosts
from mdpo_jax.model import gemma_flax, transformer
from mdpo_jax.model.families import ModelConfig
from mdpo_jax.model.folders import new_folder, refuse_existing
from mdpo_jax.model.hf_config import from_hf, to_hf
from mdpo_jax.model.hub import find_model
from mdpo_jax.model.weights import CheckpointError, read_params, refuse_foreign, write_params

DTYPES = ("float32", "bfloat16", "float16")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")


@dataclasses.dataclass(frozen=True)
class Policy:
    """What the rest of the house calls a policy.

    params: stacked, on a device or a mesh.  hf_config: the source's config.json, whose fields that
    are not ours travel through `save`.  generation_config: the source's, if it had one.  source:
    the folder that it was read from.
    """

    config: ModelConfig
    params: dict[str, Any]
    tokenizer: Any
    hf_config: dict[str, Any] = dataclasses.field(default_factory=dict)
    generation_config: dict[str, Any] | None = None
    source: Path | None = None

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

    def save(
        self,
        directory: str | Path,
        dtype: str | Mapping[str, Any] | None = None,
        also: Mapping[str, str | Path] | None = None,
    ) -> Path:
        """Writes a Hugging Face folder; whole or not at all.

        dtype: of the weights, None for the parameters' own, or by stored tensor.  also: more files
        by name, as text or to be copied; they come last and replace what is there.  All goes into
        DIRECTORY.partial, which is fsynced and renamed.  Of several processes all must call; the
        first one writes.
        Raises FileExistsError if the directory exists.
        """
        target, dtype = Path(directory), dtype or self.dtype
        if isinstance(dtype, str):
            _dtype(dtype)
        refuse_existing(target)  # in every process, or the others would wait for the first
        hosts.wait()
        if hosts.first():
            with new_folder(target) as partial:
                write_params(partial, self.params, self.config, dtype)
                self._write_beside(partial, dtype, also or {})
        else:
            write_params(target, self.params, self.config, dtype)  # takes part in the gathering
        hosts.wait()
        return target

    def _write_beside(
        self, folder: Path, dtype: str | Mapping[str, Any], also: Mapping[str, str | Path]
    ) -> None:
        """All but the weights."""
        if not isinstance(dtype, str):
            # config.json names one type: that of most tensors.
            [(dtype, _)] = Counter(str(np.dtype(kind)) for kind in dtype.values()).most_common(1)
        _write_json(folder / "config.json", to_hf(self.config, self.hf_config, dtype))
        if self.generation_config is not None:
            _write_json(folder / "generation_config.json", self.generation_config)
        self.tokenizer.save_pretrained(folder)
        for name, content in also.items():
            if isinstance(content, Path):
                shutil.copyfile(content, folder / name)
            else:
                (folder / name).write_text(content, encoding="utf-8")


def load_policy(
    path_or_hub_id: str | Path, dtype: str = "float32", mesh: Mesh | None = None
) -> Policy:
    """The policy in a local folder, or of the hub's `org/name[@revision]`.

    A folder holds a Hugging Face model, or one of the official Flax checkpoints of Gemma.
    dtype: of the parameters, whatever is stored.  mesh: None for the first device.  Raises, in one
    line, FileNotFoundError for an absent folder or file, and CheckpointError for one that cannot be
    read or does not fit the others.
    """
    _dtype(dtype)
    return with_params(describe_policy(path_or_hub_id), dtype, mesh)


def with_params(policy: Policy, dtype: str = "float32", mesh: Mesh | None = None) -> Policy:
    """What `describe_policy` gave, with its parameters read; raises what `load_policy` raises."""
    kind, folder = jnp.dtype(_dtype(dtype)), policy.source
    if folder is None:
        raise ValueError("policy: made from scratch; expected one that was read from a folder")
    if gemma_flax.weights_folder(folder) is not None:
        params = gemma_flax.read_params(folder, policy.config, mesh, kind)
    else:
        params = read_params(folder, policy.config, mesh, kind)
    return dataclasses.replace(policy, params=params)


def describe_policy(path_or_hub_id: str | Path) -> Policy:
    """The policy that `load_policy` would give, without its parameters; raises what that raises."""
    folder = find_model(path_or_hub_id)
    if gemma_flax.weights_folder(folder) is not None:
        config, tokenizer, ids = gemma_flax.describe(folder)
        _check_vocabulary(folder, tokenizer, config)
        return Policy(config, {}, tokenizer, dict(ids), dict(ids), source=folder)
    refuse_foreign(folder)
    raw = _read_json(folder / "config.json")
    try:
        config = from_hf(raw)
    except ValueError as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from None
    generation = folder / "generation_config.json"
    generation_config = _read_json(generation) if generation.exists() else None
    _check_eos(generation, (generation_config or {}).get("eos_token_id"))
    return Policy(
        config=config,
        params={},
        tokenizer=_read_tokenizer(folder, config),
        hf_config=raw,
        generation_config=generation_config,
        source=folder,
    )


def _check_eos(file: Path, value: Any) -> None:
    ids = value if isinstance(value, list) else [value]
    if value is not None and not all(type(x) is int for x in ids):
        raise CheckpointError(f"{file}: eos_token_id: {value!r}; expected an id or a list of ids")


def fingerprint(params: Any) -> str:
    """16 hex digits that change with any bit of any leaf, its path, shape or dtype.

    The sha256 over two 32-bit sums a leaf: of every element's bits mixed with its place, modulo
    2**32, so the order of summation and hence mesh and device do not matter.  Computed where the
    leaf lies; nothing is gathered.  Against accidents, not forgery.
    """
    total = hashlib.sha256()
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        sums = hosts.fetch(_sums(jnp.asarray(x))).tolist()
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
    _check_vocabulary(path, tokenizer, config)
    return tokenizer


def _check_vocabulary(path: Path, tokenizer: Any, config: ModelConfig) -> None:
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest >= config.vocab_size:
        raise CheckpointError(
            f"{path}: the tokenizer has ids up to {highest}, the model a vocabulary of "
            f"{config.vocab_size}; expected ids below it"
        )


def _dtype(name: str) -> str:
    if name not in DTYPES:
        raise ValueError(f"dtype: {name!r}; expected one of {', '.join(DTYPES)}")
    return name


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise FileNotFoundError(f"{path}: missing")
    try:
        value = json.loads(path.read_text())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: {type(value).__name__}; expected a JSON object")
    return value


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
