"""Step throughput on the pairs of the shared benchmark: one JSON line, its fields those of the peers.

    taskset -c 0 python tools/bench_step.py --model DIR/gemma-nano --size nano --reference in_step

Without --model, random Gemma weights of that size.  The model's folder needs config.json and
safetensors, and no tokenizer.  `precomputed` scores the reference before the clock starts.
Observations do not count in the loss, as they do in TRL's, but every one of their tokens is
computed.  Tokens are useful that are not padding, a prompt once for each side; FLOPs are those that
a step needs without sharing it (tools/bench_pairs.py), so `real_fraction` may be over 1.
Each step takes the row length, of a few, that leaves the least padding.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import resource
import time
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from bench_pairs import BenchPair, Lap, figures, make_pairs, rounded

from mdpo_jax.host_memory import keep_freed
from mdpo_jax.learning import OptimiserName

SIZES = {
    "nano": (512, 128, 512, 4, 4, 1, 32),
    "micro": (8192, 512, 2048, 8, 8, 1, 64),
}
PACKAGES = ("jax", "jaxlib", "flax", "optax", "mdpo_jax")


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="a Hugging Face folder; none: random weights")
    parser.add_argument("--size", choices=list(SIZES), default="nano")
    parser.add_argument("--reference", choices=["in_step", "precomputed"], default="precomputed")
    parser.add_argument("--pairs", type=int, default=8, help="pairs a step")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=1, help="steps left out of the figures")
    parser.add_argument("--max-len", type=int, default=1024, help="of a sequence, and of a row")
    parser.add_argument("--rows", type=int, default=1, help="of a micro-batch")
    parser.add_argument("--lengths", type=int, default=20, help="row lengths to choose from; 1: the "
                        "longest for every step")  # fmt: skip
    parser.add_argument(
        "--apart", action="store_true", help="both sides with a prompt of their own"
    )
    parser.add_argument("--release", action="store_true", help="freed memory goes back at once")
    parser.add_argument("--whole-head", action="store_true",
                        help="log-probs of all tokens at once, in place of chunks")  # fmt: skip
    parser.add_argument("--scanned", action="store_true", help="layers in a loop on a CPU too")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--remat", choices=["none", "full", "dots"], default="none")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16")
    names = typing.get_args(OptimiserName)
    parser.add_argument("--optimiser", choices=names, default="adamw")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(given)
    for name in ("pairs", "steps", "warmup", "rows", "lengths"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}={getattr(options, name)}: expected at least 1")
    if options.model is not None and not (options.model / "config.json").is_file():
        parser.error(f"--model={options.model}: no config.json; expected a Hugging Face folder")
    if options.max_len <= 320:
        parser.error(f"--max-len={options.max_len}: expected more than 320; prompts have up to 300")
    return options


def model(options: argparse.Namespace) -> tuple[Any, Any]:
    """Configuration and float32 parameters."""
    import jax

    from mdpo_jax.model import transformer
    from mdpo_jax.model.families import ModelConfig
    from mdpo_jax.model.hf_config import from_hf
    from mdpo_jax.model.weights import read_params

    if options.model is None:
        config = ModelConfig("gemma", *SIZES[options.size])
        return config, transformer.init_params(config, jax.random.key(options.seed))
    config = from_hf(json.loads((options.model / "config.json").read_text()))
    vocab = SIZES[options.size][0]
    if config.vocab_size < vocab:
        raise SystemExit(
            f"--model={options.model}: a vocabulary of {config.vocab_size}; expected at least "
            f"{vocab}, that of --size={options.size}"
        )
    return config, read_params(options.model, config, None, np.dtype(np.float32))


def sides(pair: BenchPair) -> tuple[Any, Any]:
    """Both sequences, ready to pack; their reference log-probs are 0."""
    from mdpo_jax.data.packing import Item

    def one(response: np.ndarray, mask: np.ndarray) -> Item:
        ids = np.concatenate([pair.prompt, response])
        weights = np.concatenate([np.zeros(len(pair.prompt)), mask]).astype(np.float32)
        return Item(ids, weights, np.zeros(len(ids), np.float32))

    chosen = one(pair.chosen, pair.chosen_mask)._replace(correct=True)
    return chosen, one(pair.rejected, pair.rejected_mask)


def row_lengths(max_len: int, count: int) -> list[int]:
    """`count` lengths in even steps of 64s; the longest holds both sides of any pair."""
    most = -(-2 * max_len // 64)
    step = max(1, most // (2 * count))
    return [64 * n for n in range(most, most // 2 - 3, -step)][:count][::-1]


def measure(options: argparse.Namespace, config: Any, params: Any) -> dict[str, Any]:
    """Run the steps; the fields that depend on them."""
    import jax

    from mdpo_jax.data.fitting import best_length
    from mdpo_jax.data.packing import Layout, pack
    from mdpo_jax.model.kernels import sees_prefixes
    from mdpo_jax.pipeline.settings import unrolled
    from mdpo_jax.training.losses import Forward, Objective
    from mdpo_jax.training.state import Optimiser, init_state
    from mdpo_jax.training.step import Fixed, make_step, put
    from mdpo_jax.training.trainer import Trainer, copy_params

    in_step, size = options.reference == "in_step", options.pairs
    shared = sees_prefixes(options.attention, jax.default_backend()) and not options.apart
    forward = Forward(
        "bfloat16" if options.bf16 else "float32", options.remat,
        1 << 30 if options.whole_head else 2048, options.attention, shared,
        unrolled(options.remat, jax.default_backend()) and not options.scanned,
    )  # fmt: skip
    optimiser = Optimiser(name=options.optimiser)
    lengths = row_lengths(options.max_len, options.lengths)
    layout = Layout(options.rows, lengths[-1], 2 * size, shared)
    count = options.warmup + options.steps
    pairs = make_pairs(size * count, SIZES[options.size][0], options.seed, options.max_len)
    groups = [sides(pair) for pair in pairs]
    if not in_step:
        scores = Trainer(config, forward, optimiser, layout).score(
            params, [side for group in groups for side in group], 2 * size
        )
        both = [side for group in groups for side in group]
        both = [side._replace(reference=s) for side, s in zip(both, scores, strict=True)]
        groups = list(zip(both[::2], both[1::2], strict=True))
    fixed = Fixed(None, copy_params(params) if in_step else None)
    step = make_step(config, forward, Objective("pairs", eta=0.1), optimiser)
    size_before = step._cache_size()  # pyright: ignore[reportAttributeAccessIssue]
    state, laps, first = init_state(params, optimiser), [], None
    steps = [slice(index * size, (index + 1) * size) for index in range(count)]
    layouts = [best_length(groups[here], layout, lengths) for here in steps]
    # Compiled before the clock starts, as in a run's first steps.
    packed = (pack(groups[here], shape) for here, shape in zip(steps, layouts, strict=True))
    for batch in {batch.tokens.shape: batch for batch in packed}.values():
        step(init_state(copy_params(params), optimiser), put(batch, None), np.float32(0), fixed)
    for here, shape in zip(steps, layouts, strict=True):
        wall, cpu = time.perf_counter(), time.process_time()
        batch = pack(groups[here], shape)
        state, metrics = step(state, put(batch, None), np.float32(1e-6), fixed)
        jax.block_until_ready((state, metrics))
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        first = float(metrics["loss"]) if first is None else first
        micros = int(batch.sequence_mask.any(axis=1).sum())
        laps.append(Lap(wall, cpu, pairs[here], micros * shape.rows * shape.row_length))
    return figures(config, laps[options.warmup :], in_step) | {
        "first_loss": first,
        "row_lengths": sorted({shape.row_length for shape in layouts}),
        "shared_prompts": shared,
        "compilations": step._cache_size() - size_before,  # pyright: ignore[reportAttributeAccessIssue]
        "device": jax.devices()[0].device_kind,
    }


def main(given: Sequence[str] | None = None) -> None:
    """Measure and print."""
    from mdpo_jax.model.families import count_params

    options = arguments(given)
    if not options.release:
        keep_freed()  # as the train door does
    config, params = model(options)
    line = {
        "bench": "dpo_step", "peer": "mdpo_jax", "size": options.size,
        "model": options.model.name if options.model else "random",
        "reference": options.reference, "attention": options.attention,
        "checkpointing": options.remat != "none", "bf16": options.bf16,
        "pairs_per_step": options.pairs, "params": count_params(config),
        "optimiser": options.optimiser, **measure(options, config, params),
        "python": platform.python_version(), "cores": len(os.sched_getaffinity(0)),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }  # fmt: skip
    print(json.dumps(rounded(line)), flush=True)


if __name__ == "__main__":
    main()
