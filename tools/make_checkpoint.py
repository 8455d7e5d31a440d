"""A checkpoint of random weights at a real model's shape, written without holding the model.

    python tools/make_checkpoint.py --family gemma --size 2b --out DIR [--dtype bfloat16] [--shards N]

For measuring how checkpoints load, export and shard where the real ones cannot be had.  The
tokenizer is a small one; weights are normal with variance 1 / columns, norms near their neutral.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from mdpo_jax.data import synthetic
from mdpo_jax.data.vocabulary import train_tokenizer
from mdpo_jax.model import stored
from mdpo_jax.model.families import ModelConfig, count_params, weight_map
from mdpo_jax.model.hf_config import from_hf, to_hf

# vocabulary, width, MLP, layers, query heads, key heads, head_dim
SHAPES: dict[str, tuple[int, ...]] = {
    "gemma-nano": (512, 64, 192, 2, 4, 2, 32),
    "gemma-2b": (256000, 2048, 16384, 18, 8, 1, 256),
    "gemma-7b": (256000, 3072, 24576, 28, 16, 16, 256),
    "gemma2-nano": (512, 64, 192, 2, 4, 2, 32),
    "gemma2-2b": (256000, 2304, 9216, 26, 8, 4, 256),
    "gemma2-9b": (256000, 3584, 14336, 42, 16, 8, 256),
    "gemma3-nano": (512, 64, 192, 6, 4, 2, 32),
    "gemma3-4b": (262208, 2560, 10240, 34, 8, 4, 256),
    "llama-nano": (512, 64, 192, 2, 4, 2, 16),
    "llama-8b": (128256, 4096, 14336, 32, 32, 8, 128),
    "mistral-nano": (512, 64, 192, 2, 4, 2, 16),
    "mistral-7b": (32768, 4096, 14336, 32, 32, 8, 128),
    "qwen2-nano": (512, 64, 192, 2, 4, 2, 16),
    "qwen2-7b": (152064, 3584, 18944, 28, 28, 4, 128),
    "qwen3-nano": (512, 64, 192, 2, 4, 2, 16),
}
# What `from_hf` must hear beside the shape; all else is the library's default of the family.
EXTRA: dict[str, dict[str, Any]] = {
    "gemma3-4b": {
        "sliding_window": 1024,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        },
    },
    "llama-8b": {
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        },
    },
    "mistral-7b": {"sliding_window": None, "rms_norm_eps": 1e-5, "rope_theta": 1e6},
    "qwen2-7b": {"max_position_embeddings": 4096, "rope_theta": 1e4},
}  # fmt: skip


def model_config(name: str) -> ModelConfig:
    """The configuration of a model in `SHAPES`."""
    family = name.split("-")[0]
    fields = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
        "num_attention_heads", "num_key_value_heads", "head_dim",
    )  # fmt: skip
    types = {"gemma3": "gemma3_text"}
    raw = {"model_type": types.get(family, family), **dict(zip(fields, SHAPES[name], strict=True))}
    tied = family.startswith("gemma")
    return from_hf({**raw, "tie_word_embeddings": tied, **EXTRA.get(name, {})})


def tensors(config: ModelConfig, names: list[str], dtype: str, seed: int) -> Iterator[np.ndarray]:
    """Each named tensor, made when it is asked for, by its own stream."""
    weights = {name: w for w in weight_map(config) for name in w.names(config)}
    order = {name: i for i, name in enumerate(weights)}
    neutral = 0.0 if config.traits.unit_offset else 1.0
    for name in names:
        shape = weights[name].stored_shape(config)
        rng = np.random.default_rng([seed, order[name]])
        x = rng.standard_normal(shape, np.float32)
        x *= 0.02 if len(shape) == 1 else shape[1] ** -0.5
        if "norm" in name:
            x += neutral
        yield x.astype(jnp.dtype(dtype))


def write(
    config: ModelConfig, out: Path, dtype: str = "bfloat16", shards: int = 1, seed: int = 0
) -> None:
    """The folder: config, shards and index (or one file), tokenizer; `out` must not exist."""
    out.mkdir(parents=True)
    demos = synthetic.demonstrations(synthetic.Suite(), 300, seed)
    texts = (turn["content"] for demo in demos for turn in demo)
    tokenizer = train_tokenizer(texts, min(config.vocab_size, 448))
    tokenizer.save_pretrained(out)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    (out / "config.json").write_text(json.dumps(to_hf(config, ids, dtype), indent=2))
    sizes = {
        name: (stored.to_name(jnp.dtype(dtype)), w.stored_shape(config))
        for w in weight_map(config)
        for name in w.names(config)
    }
    itemsize = jnp.dtype(dtype).itemsize
    total = sum(math.prod(shape) for _, shape in sizes.values()) * itemsize
    groups: list[list[str]] = [[] for _ in range(shards)]
    so_far = 0
    for name, (_, shape) in sizes.items():
        groups[min(shards - 1, so_far * shards // total)].append(name)
        so_far += math.prod(shape) * itemsize
    groups = [group for group in groups if group]
    names = [f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
    if len(groups) == 1:
        names = ["model.safetensors"]
    for file, group in zip(names, groups, strict=True):
        plan = {name: sizes[name] for name in group}
        stored.write_file(out / file, plan, tensors(config, group, dtype, seed))
    if len(groups) > 1:
        where = {name: file for file, group in zip(names, groups, strict=True) for name in group}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def main() -> int:
    """Write it and say how large it is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--family", required=True, choices=sorted({n.split("-")[0] for n in SHAPES})
    )
    parser.add_argument("--size", required=True, help=", ".join(SHAPES))
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    name = f"{options.family}-{options.size}"
    if name not in SHAPES:
        parser.error(f"--size={options.size}: no such {options.family}; known: {', '.join(SHAPES)}")
    if options.out.exists():
        parser.error(f"--out={options.out}: exists already; expected a new folder")
    config = model_config(name)
    write(config, options.out, options.dtype, options.shards, options.seed)
    print(f"{options.out}: {name}, {count_params(config) / 1e9:.2f} B parameters")
    return 0


if __name__ == "__main__":
    sys.exit(main())
