"""Generated tokens per second of the sampler on random Gemma weights: one JSON line.

    python tools/bench_rollout.py --model HF_DIR --mode batch --batch 8
    python tools/bench_rollout.py --size nano --mode turns --batch 8

`batch` generates --new tokens after a prompt of lognormal length (about 100 tokens, 20 to 300).
`turns` plays a tool loop on one cache: --turns times --turn-new tokens and an observation of
--observation tokens.  Greedy by default, no stop token, prompts and observations counted in the time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from bench_step import SIZES

if TYPE_CHECKING:
    from mdpo_jax.model.families import ModelConfig
    from mdpo_jax.rollout.sampler import DecodeState, Sampler
    from mdpo_jax.rollout.sampling import Sampling


def make_prompts(count: int, vocab: int, seed: int, length: int | None) -> list[list[int]]:
    """`count` prompts of `length` tokens, or of lognormal lengths around 100."""
    rng = np.random.default_rng(seed)

    def draw() -> int:
        return int(np.clip(round(float(rng.lognormal(np.log(100), 0.4))), 20, 300))

    lengths = [length or draw() for _ in range(count)]
    return [rng.integers(4, vocab, n).tolist() for n in lengths]


def play(
    sampler: Sampler, state: DecodeState, prompts: list[list[int]], rounds: int, new: int,
    observations: np.ndarray, sampling: Sampling,
) -> DecodeState:  # fmt: skip
    """All rounds of all prompts: `new` tokens each, and an observation after each round."""
    slots = list(range(len(prompts)))
    seeds = [(0, slot) for slot in slots]
    held = np.array([len(p) for p in prompts])
    state = sampler.extend(state, slots, prompts, [0] * len(slots), seeds)
    for turn in range(rounds):
        left = new
        while left:
            count = min(left, sampler.shapes.block)
            state, _ = sampler.decode(state, held, np.full(len(slots), count), sampling)
            left, held = left - count, held + count
        # Every turn's observation is read, the last one's too: more than the peer's loop reads.
        if len(observations):
            state = sampler.extend(state, slots, observations[turn].tolist(), held.tolist(), seeds)
            held = held + observations.shape[-1]
    return state


def main() -> None:
    """Warm up, time `--repeats` runs, print the line."""
    options = _options()
    import jax

    from mdpo_jax.rollout.sampler import Sampler
    from mdpo_jax.rollout.sampling import Sampling
    from mdpo_jax.rollout.shapes import Shapes

    config, params = _model(options)
    prompts = make_prompts(options.batch, config.vocab_size, options.seed, options.prompt_len)
    rounds, new, observation = options.turns, options.turn_new, options.observation
    if options.mode == "batch":
        rounds, new, observation = 1, options.new, 0
    shape = (rounds if observation else 0, options.batch, observation)
    observations = np.random.default_rng(options.seed).integers(4, config.vocab_size, shape)
    length = max(map(len, prompts)) + rounds * (new + observation)
    context = options.context or -(-length // 128) * 128
    fine = jax.default_backend() == "cpu"
    shapes = Shapes.make(options.batch, context, options.block, fine=fine)
    sampler = Sampler(config, shapes, (), "float32")
    sampler.load(params)
    state = sampler.warm_up(sampler.start(), max(map(len, prompts)), max(observation, 1))
    job = prompts, rounds, new, observations, Sampling(options.temperature)
    state = play(sampler, state, *job)

    def once(state: DecodeState) -> DecodeState:
        return jax.block_until_ready(play(sampler, state, *job))

    laps = _timed(once, state, options.repeats)
    mode = {"turns": rounds, "turn_new": new, "observation": observation}
    _emit(
        bench="generate", peer="mdpo_jax", model=_name(options), mode=options.mode,
        batch=options.batch, prompt_tokens=sum(map(len, prompts)),
        **({"new": new} if options.mode == "batch" else mode),
        **{
            "generated_tokens" if options.mode == "batch" else "cache_kept": _rates(
                options.batch * rounds * new, laps
            )
        },
        context=context, temperature=options.temperature,
        compilations_after_warm_up=sampler.late_compilations(),
        python=platform.python_version(), cores=len(os.sched_getaffinity(0)),
        versions={"jax": jax.__version__}, device=jax.devices()[0].device_kind,
        peak_rss_mb=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    )  # fmt: skip


def _name(options: argparse.Namespace) -> str:
    return options.model.name if options.model else options.size


def _model(options: argparse.Namespace) -> tuple[ModelConfig, Any]:
    """Config and parameters; a folder needs no tokenizer, for no text is made."""
    import jax
    import jax.numpy as jnp

    from mdpo_jax.model import transformer
    from mdpo_jax.model.families import ModelConfig
    from mdpo_jax.model.hf_config import from_hf
    from mdpo_jax.model.weights import read_params

    if options.model:
        config = from_hf(json.loads((options.model / "config.json").read_text()))
        return config, read_params(options.model, config, None, jnp.float32)
    config = ModelConfig("gemma", *SIZES[options.size])
    return config, transformer.init_params(config, jax.random.key(options.seed))


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
    parser.add_argument("--context", type=int, default=None, help="cache length; default: enough")
    parser.add_argument("--temperature", type=float, default=0.0)
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


def _rates(tokens: int, laps: tuple[list[float], list[float]]) -> dict[str, Any]:
    """Tokens a second of each run, by wall clock and by CPU time."""
    found: dict[str, Any] = {}
    for name, seconds in zip(("per_s", "per_cpu_s"), laps, strict=True):
        values = [tokens / s for s in seconds]
        found[name] = {
            "median": statistics.median(values), "min": min(values), "max": max(values),
            "n": len(values),
        }  # fmt: skip
        found[f"total_{name}"] = tokens * len(seconds) / sum(seconds)
    return found


def _emit(**fields: Any) -> None:
    def short(x: Any) -> Any:
        if isinstance(x, dict):
            return {key: short(value) for key, value in x.items()}
        return float(f"{x:.5g}") if isinstance(x, float) else x

    print(json.dumps(short(fields)), flush=True)


if __name__ == "__main__":
    main()
