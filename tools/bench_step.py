"""Step throughput on random pairs of random Gemma weights: one JSON line.

    python tools/bench_step.py --size nano --pairs 8 --steps 5

Lengths are those of the shared benchmark's specification: prompts lognormal about 100 tokens (20 to
300), responses lognormal about 300 (150 to 600), 15 % of a response observation.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time

import numpy as np

SIZES = {
    "nano": (512, 128, 512, 4, 4, 1, 32),
    "micro": (8192, 512, 2048, 8, 8, 1, 64),
}


def make_items(count: int, vocab: int, seed: int, longest: int):
    """`count` pairs of packed-ready sequences; reference log-probs 0."""
    from mdpo_jax.data.packing import Item

    rng = np.random.default_rng(seed)

    def length(median: float, sigma: float, low: int, high: int) -> int:
        return int(np.clip(round(float(rng.lognormal(np.log(median), sigma))), low, high))

    pairs = []
    for _ in range(count):
        prompt = length(100, 0.4, 20, 300)
        sides = []
        for _ in range(2):
            response = min(length(300, 0.45, 150, 600), longest - prompt)
            total = prompt + response
            weights = (rng.random(total) > 0.15).astype(np.float32)
            weights[:prompt] = 0
            ids = rng.integers(4, vocab, total).astype(np.int32)
            sides.append(Item(ids, weights, np.zeros(total, np.float32)))
        pairs.append(tuple(sides))
    return pairs


def main() -> None:
    """Time `--steps` steps after one that compiles."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=list(SIZES), default="nano")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--row-length", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    import jax

    from mdpo_jax.data.packing import Layout, pack
    from mdpo_jax.model import transformer
    from mdpo_jax.model.families import ModelConfig, count_params
    from mdpo_jax.training.losses import Forward, Objective
    from mdpo_jax.training.state import Optimiser, init_state
    from mdpo_jax.training.step import make_step, put

    config = ModelConfig("gemma", *SIZES[options.size])
    optimiser = Optimiser()
    state = init_state(transformer.init_params(config, jax.random.key(options.seed)), optimiser)
    step = make_step(config, Forward(), Objective("pairs"), optimiser)
    layout = Layout(options.rows, options.row_length, 2 * options.pairs)
    pairs = make_items(
        options.pairs * (options.steps + 1), config.vocab_size, options.seed, options.row_length
    )
    seconds, cpu, rates, fills = [], [], [], []
    for index in range(options.steps + 1):
        group = pairs[index * options.pairs : (index + 1) * options.pairs]
        wall, process = time.perf_counter(), time.process_time()
        batch = pack(group, layout)
        state, metrics = step(state, put(batch, None), np.float32(1e-6))
        jax.block_until_ready(metrics)
        wall, process = time.perf_counter() - wall, time.process_time() - process
        if index:
            tokens = sum(len(side.ids) for pair in group for side in pair)
            seconds.append(wall)
            cpu.append(process)
            rates.append(tokens / process)
            fills.append(batch.fill)
    line = {
        "bench": "dpo_step", "peer": "mdpo_jax", "size": options.size,
        "params": count_params(config), "pairs_per_step": options.pairs,
        "reference": "precomputed",
        "step_s": _spread(seconds), "step_cpu_s": _spread(cpu),
        "useful_tokens_per_cpu_s": _spread(rates), "real_fraction": statistics.mean(fills),
        "compilations": step._cache_size(),  # pyright: ignore[reportAttributeAccessIssue]
        "python": platform.python_version(),
        "jax": jax.__version__, "device": jax.devices()[0].device_kind,
    }  # fmt: skip
    print(json.dumps(line))


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


if __name__ == "__main__":
    main()
