"""Generated tokens per second of the sampler on random Gemma weights: one JSON line.

    python tools/bench_rollout.py --model HF_DIR --mode batch --batch 8
    python tools/bench_rollout.py --size nano --mode turns --batch 8

`batch` generates --new tokens after a prompt of lognormal length (about 100 tokens, 20 to 300).
`turns` plays a tool loop on one cache: --turns times --turn-new tokens and an observation of
--observation tokens.  Greedy, no stop token, prompts and observations counted in the time.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from bench_step import SIZES

if TYPE_CHECKING:
    from mdpo_jax.rollout.sampler import DecodeState, Sampler


def make_prompts(count: int, vocab: int, seed: int, length: int | None) -> list[list[int]]:
    """`count` prompts of `length` tokens, or of lognormal lengths around 100."""
    rng = np.random.default_rng(seed)

    def draw() -> int:
        return int(np.clip(round(float(rng.lognormal(np.log(100), 0.4))), 20, 300))

    lengths = [length or draw() for _ in range(count)]
    return [rng.integers(4, vocab, n).tolist() for n in lengths]


def play(
    sampler: Sampler, state: DecodeState, prompts: list[list[int]], rounds: int, new: int,
    observations: np.ndarray,
) -> DecodeState:  # fmt: skip
    """All rounds of all prompts: `new` tokens each, and an observation between two rounds."""
    slots = list(range(len(prompts)))
    seeds = [(0, slot) for slot in slots]
    held = [len(p) for p in prompts]
    state = sampler.extend(state, slots, prompts, [0] * len(slots), seeds)
    for turn in range(rounds):
        left = new
        while left:
            count = min(left, sampler.shapes.block)
            state, _ = sampler.decode(state, np.full(len(slots), count, np.int32), 0.0)
            left -= count
        held = [n + new for n in held]
        # Every turn's observation is read, the last one's too: the peer's loop feeds it as well.
        if len(observations):
            state = sampler.extend(state, slots, observations[turn].tolist(), held, seeds)
            held = [n + observations.shape[-1] for n in held]
    return state


def main() -> None:
    """Warm up, time `--repeats` runs, print the line."""
    options = _options()
    import jax

    from mdpo_jax.model import transformer
    from mdpo_jax.model.families import ModelConfig
    from mdpo_jax.model.policy import load_policy
    from mdpo_jax.rollout.sampler import Sampler, Shapes

    if options.model:
        policy = load_policy(options.model)
        config, params = policy.config, policy.params
    else:
        config = ModelConfig("gemma", *SIZES[options.size])
        params = transformer.init_params(config, jax.random.key(options.seed))
    prompts = make_prompts(options.batch, config.vocab_size, options.seed, options.prompt_len)
    rounds, new, observation = options.turns, options.turn_new, options.observation
    if options.mode == "batch":
        rounds, new, observation = 1, options.new, 0
    shape = (rounds if observation else 0, options.batch, observation)
    observations = np.random.default_rng(options.seed).integers(4, config.vocab_size, shape)
    length = max(map(len, prompts)) + rounds * (new + observation)
    context = -(-length // 128) * 128
    sampler = Sampler(config, Shapes.make(options.batch, context, options.block), (), "float32")
    sampler.load(params)
    state = play(sampler, sampler.start(), prompts, rounds, new, observations)
    warm = sampler.compilations()

    def once(state: DecodeState) -> DecodeState:
        return jax.block_until_ready(play(sampler, state, prompts, rounds, new, observations))

    wall, cpu = _timed(once, state, options.repeats)
    tokens = options.batch * rounds * new
    line = {
        "bench": "generate", "peer": "mdpo_jax", "model": options.model or options.size,
        "mode": options.mode, "batch": options.batch, "prompt_tokens": sum(map(len, prompts)),
        "generated_tokens" if options.mode == "batch" else "cache_kept": {
            "per_s": _spread([tokens / s for s in wall]),
            "per_cpu_s": _spread([tokens / s for s in cpu]),
        },
        "turns": rounds, "turn_new": new, "observation": observation, "context": context,
        "compilations_after_warm_up": sampler.compilations() - warm,
        "python": platform.python_version(), "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
    }  # fmt: skip
    print(json.dumps(line))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="Hugging Face folder; default: random weights")
    parser.add_argument("--size", choices=list(SIZES), default="nano")
    parser.add_argument("--mode", choices=("batch", "turns"), default="batch")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--prompt-len", type=int, default=None, help="default: lognormal, ~100")
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--turn-new", type=int, default=60)
    parser.add_argument("--observation", type=int, default=30)
    parser.add_argument("--block", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def _timed(
    once: Callable[[DecodeState], DecodeState], state: DecodeState, repeats: int
) -> tuple[list[float], list[float]]:
    """Wall and CPU seconds of each call; the state is donated from one to the next."""
    wall, cpu = [], []
    for _ in range(repeats):
        start, process = time.perf_counter(), time.process_time()
        state = once(state)
        wall.append(time.perf_counter() - start)
        cpu.append(time.process_time() - process)
    return wall, cpu


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


if __name__ == "__main__":
    main()
